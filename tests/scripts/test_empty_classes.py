"""A class without a training image is named by every command that meets it, and no seed draws it."""

from pathlib import Path

import numpy as np
import pytest
from pictures import noise, save
from pipelines import Script

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
NAMED = "1 of 3 classes: bee"


@pytest.fixture
def insects(tmp_path: Path) -> Path:
    """Classes ant and cicada of 60 images, and bee, whose only file is damaged."""
    for index in range(120):
        save(tmp_path / "insects" / ("ant", "cicada")[index % 2] / f"{index}.png", noise(8, 8, seed=index))
    (tmp_path / "insects" / "bee").mkdir()
    (tmp_path / "insects" / "bee" / "0.png").write_bytes(b"")
    return tmp_path / "insects"


def test_a_class_without_training_images_is_named_and_not_sampled(
    insects: Path, succeed: Script, script: Script, tmp_path: Path
) -> None:
    steps = "--steps 1 --batch-size 8 --ema 0"
    data = f"--data {insects} --on-bad-image skip {steps}"
    tokenizer, model, features, vae = (tmp_path / name for name in ("tokenizer", "model", "features", "vae"))
    trainings = (
        f"train_tokenizer digits-fsq {data} --model.width 8 --out {tokenizer}",
        f"train_latent digits-dit --tokenizer {tokenizer} {steps} --model.dit.width 16 --model.dit.depth 1 --out {model}",
        f"train_features {data} --width 8 --dim 8 --out {features}",
        f"train_baseline digits-vae --conditional {data} --validate-every 0 --patience-validations 0 --out {vae}",
    )
    for line in trainings:
        assert f"no images    of {NAMED}; a class without training images is not sampled" in succeed(line).out
    solver = f"train_solver amed --model {model} --nfe 4 --steps 1 --distill.trajectories 8 --distill.teacher-steps 4"
    succeed(f"{solver} --grid uniform")
    sweep = (
        f"evaluate --model {model} --features {features} --baselines {vae} --solvers ddim,amed --nfe 4 --grids uniform"
    )
    done = succeed(f"{sweep} --n 8 --blocks 1 --exact-nfe 0 --metrics kid --export-npz {tmp_path / 'npz'}")
    assert f"Classes without training images, so no seed draws them: {NAMED}." in done.out
    assert "so no seed draws them" in (model / "report" / "report.md").read_text()
    labels = [np.load(path)["arr_1"].tolist() for path in sorted((tmp_path / "npz").iterdir())]
    assert labels == [[0, 2] * 4] * 3, "ddim, amed and the baseline"
    likelihood = tmp_path / "likelihood"
    succeed(f"evaluate_likelihood --models {vae} --features none --n 8 --iwae 0 --draws 1 --out {likelihood}")
    assert "so no seed draws them" in (likelihood / "report.md").read_text()
    done = succeed(
        f"evaluate_tokenizer --tokenizers {tokenizer} --features none --noise 0 --out {tmp_path / 'figures'}"
    )
    assert f"Classes without training images: {NAMED}." in done.out
    checked = succeed(f"data check {insects} --on-bad-image skip").out
    assert "classes without training images, which are not sampled (1): bee" in checked
    succeed(f"sample --model {model} --n 4 --nfe 4 --out {tmp_path / 'grid.png'}")
    refused = script(*f"sample --model {model} --n 4 --nfe 4 --labels 1 --out {tmp_path / 'other.png'}".split())
    assert refused.code == 2 and "bee" in refused.err and not (tmp_path / "other.png").exists()
