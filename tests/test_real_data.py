"""What a short training on real images must reach: floors with a margin below what was measured (0.063 and 0.073)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resuming import records

from midway.gen.data.images import to_float
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.flags.tasks import TokenizerConfig, TokenizerTask
from midway.gen.training.config import TrainConfig
from midway.gen.trainings import train_tokenizer

CIFAR_ZIP = Path(__file__).parents[1] / ".." / "shared" / "data" / "cifar10-train.zip"
VQ = TokenizerConfig(quantizer="vq", codebook_size=1024, dim=8, width=48, downsample=4)
FSQ = TokenizerConfig(levels=(8, 5, 5, 5), width=48, downsample=4)
TRAIN = TrainConfig(steps=800, batch_size=64, lr=1e-3, decay="cosine", ema=0.99)
SHORT = replace(TRAIN, steps=200)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("model", "most", "least_usage"), [(VQ, 0.08, 0.95), (FSQ, 0.09, 0.5)], ids=["vq", "fsq"])
def test_800_steps_on_20000_images_of_cifar10(
    model: TokenizerConfig, most: float, least_usage: float, tmp_path: Path
) -> None:
    """Held-out mean squared error over the variance of the images, and the share of codes in use."""
    if not CIFAR_ZIP.exists():
        pytest.skip("no cifar10-train.zip in ../shared/data beside the repository")
    data = DataConfig(str(CIFAR_ZIP), held_out=0.6)
    run = train_tokenizer.train(TokenizerTask(tmp_path / "run", data, model, train=TRAIN))
    assert run is not None
    held_out = load_splits(data).held_out.images[:]
    assert len(load_splits(data).train.images) == 20_000
    final = records(run.path)[-1]
    assert final["held_out_mse"] / to_float(held_out).var().item() <= most
    assert final["held_out_usage"] >= least_usage
    assert torch.isfinite(torch.tensor(final["held_out_perplexity"]))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_restarts_raise_the_perplexity_of_a_codebook_by_half_at_least(tmp_path: Path) -> None:
    """200 steps, K = 1024: k-means and restarts against running means from a sample of the data (measured: 821 and 449)."""
    if not CIFAR_ZIP.exists():
        pytest.skip("no cifar10-train.zip in ../shared/data beside the repository")
    found = []
    for options in ("{}", '{"restart_threshold": 0, "init": "batch"}'):
        model = replace(VQ, options=options)
        task = TokenizerTask(tmp_path / f"{len(found)}", DataConfig(str(CIFAR_ZIP), held_out=0.6), model, train=SHORT)
        run = train_tokenizer.train(task)
        assert run is not None
        found.append(records(run.path)[-1]["held_out_perplexity"])
    assert found[0] > 1.5 * found[1], found
