"""The contract of all baselines: scores, losses and samples by sample, files, autocast, training, errors."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import batch, context, randomise
from safetensors.torch import save_file
from torch import Tensor

from midway.gen.baselines.base import Baseline, write_baseline
from midway.gen.baselines.density import DensityBaseline
from midway.gen.baselines.flow import CouplingFlow
from midway.gen.baselines.flow_config import FlowConfig, glow, nice, realnvp
from midway.gen.baselines.registry import load_trained_baseline, read_baseline
from midway.gen.baselines.tarflow import TarFlow, TarFlowConfig
from midway.gen.baselines.vae import VAE, VAEConfig
from midway.gen.core.errors import DataError
from midway.gen.data.images import load_images, to_uint8
from midway.gen.data.levels import bits_per_dim, to_levels
from midway.gen.training.batches import Context, ImageBatch

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (1, 4, 4)
TAR = TarFlowConfig(flows=2, depth=1, width=8, heads=2, mlp_ratio=2, entry="symmetric")
MODELS: dict[str, tuple[type[Baseline], Any, float]] = {
    "vae": (VAE, VAEConfig(latent_dim=2, downsample=2, width=8, blocks=1, mixtures=2, free_bits=0.5, beta=2.0), 0.2),
    "nice": (CouplingFlow, nice(8, 4), 0.3),
    "realnvp": (CouplingFlow, realnvp(8, 2), 0.3),
    "glow": (CouplingFlow, glow(8, 2, 2), 0.3),
    "variational": (CouplingFlow, replace(glow(8, 2, 2), dequantise="variational", draws=3), 0.3),
    "tarflow": (TarFlow, TAR, 0.2),
    "tarflow logit": (TarFlow, replace(TAR, entry="logit", draws=3), 0.2),
    "tarflow gaussian": (TarFlow, replace(TAR, noise="gaussian"), 0.2),
}
"""Class, configuration and standard deviation of the random weights."""
LIKELIHOODS = [name for name in MODELS if "gaussian" not in name]
SEEDS, LABELS = torch.tensor([5, 1, 9]), torch.arange(3)
BATCH = batch(8, SHAPE)


def make(name: str, classes: int = 3) -> Baseline:
    cls, config, std = MODELS[name]
    torch.manual_seed(0)
    return randomise(cls(config, SHAPE, 17, classes), std).eval().requires_grad_(False)  # pyright: ignore


def score(model: Baseline, images: Tensor = BATCH.images, labels: Tensor = BATCH.labels, which: Context | None = None):
    return model.log_likelihood(images, labels, which or context(len(images)))


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_without_samples_has_no_loss(name: str, classes: int) -> None:
    model = make(name, classes).requires_grad_(True)
    loss, logs = model.loss(batch(0, SHAPE), context(0))
    loss.backward()
    assert loss.item() == 0 and all(value.item() == 0 for value in logs.values())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_scores_depend_on_the_sample_and_not_on_its_batch(name: str) -> None:
    model = make(name)
    whole = score(model)
    assert whole.dtype == torch.float64
    assert torch.equal(whole, score(model))
    parts = [score(model, BATCH.images[[i]], BATCH.labels[[i]], context(1, first=i)) for i in range(8)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    flipped = score(model, BATCH.images.flip(0), BATCH.labels.flip(0), Context(0, 0, torch.arange(8).flip(0)))
    torch.testing.assert_close(flipped.flip(0), whole, rtol=1e-5, atol=1e-5)
    for other in (context(8, first=8), context(8, step=1)):
        assert not torch.isclose(score(model, which=other), whole, rtol=1e-6).any()
    assert not torch.isclose(score(model, labels=(BATCH.labels + 1) % 3), whole, rtol=1e-6).any()
    plain = make(name, classes=0)
    assert torch.equal(score(plain), plain.log_likelihood(BATCH.images, None, context(8))), "labels are ignored"


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_of_u_are_averaged_inside_the_logarithm(name: str) -> None:
    model = make(name)
    if not isinstance(model, DensityBaseline):
        return
    model.config = replace(model.config, draws=5)
    k = to_levels(BATCH.images, 17)
    draws = torch.stack([model.bound(k, BATCH.labels, context(8), draw).double() for draw in range(5)])
    torch.testing.assert_close(score(model), draws.exp().mean(0).log(), rtol=1e-10, atol=0)
    assert draws.std(0).min() > 0.01


IDENTITY_FLOW = FlowConfig("additive", 0, checkerboards=2, actnorm=False, entry="symmetric")


@pytest.mark.parametrize("new", [CouplingFlow(IDENTITY_FLOW, SHAPE, 17), TarFlow(TAR, SHAPE, 17)])
def test_a_new_identity_has_the_density_of_its_normal_prior(new: Baseline) -> None:
    """Entry "symmetric": -1/2 (2x - 1)^2 - 1/2 ln 2 pi + ln 2 - ln L a dimension, by hand."""
    x = (to_levels(BATCH.images, 17) + context(8).uniform("dequantise 0", SHAPE)) / 17
    by_hand = -0.5 * (2 * x - 1) ** 2 - 0.5 * math.log(2 * math.pi) + math.log(2) - math.log(17)
    torch.testing.assert_close(score(new.eval()), by_hand.flatten(1).sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(name: str) -> None:
    """As accumulation and several processes need, free bits included."""
    model = make(name)
    cut = [ImageBatch(BATCH.images[i : i + 2], BATCH.labels[i : i + 2]) for i in range(0, 8, 2)]
    parts = [model.loss(part, context(2, first=2 * i))[0].item() for i, part in enumerate(cut)]
    assert sum(parts) / 4 == pytest.approx(model.loss(BATCH, context(8))[0].item(), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_under_autocast_is_summed_in_float32(name: str) -> None:
    model = make(name)
    plain = model.loss(BATCH, context(8))[0].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logs = model.loss(BATCH, context(8))
    assert {loss.dtype, *(value.dtype for value in logs.values())} == {torch.float32}
    assert 0 < abs(loss.item() - plain) < 0.05 * abs(plain)


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_is_a_function_of_its_seed_and_label(name: str) -> None:
    model = make(name)
    seeds, labels = torch.arange(20), torch.arange(20) % 3
    whole = model.sample(seeds, labels)
    assert whole.shape == (20, *SHAPE) and whole.dtype == torch.float32
    assert whole.abs().max() <= 1
    if name in LIKELIHOODS and name != "vae":
        to_levels(to_uint8(whole), 17)  # raises for other values
        torch.testing.assert_close(whole, to_uint8(whole).float() / 127.5 - 1)
    torch.testing.assert_close(model.sample(seeds.flip(0), labels.flip(0)).flip(0), whole)
    torch.testing.assert_close(model.sample(seeds[5:7], labels[5:7]), whole[5:7])
    assert len(whole.flatten(1).unique(dim=0)) > 15
    assert not torch.equal(model.sample(seeds, (labels + 1) % 3), whole)
    passes = {"tarflow": 4, "tarflow logit": 4, "tarflow gaussian": 4 + 2}
    assert model.sample_nfe == passes.get(name, 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = make(name)
    write_baseline(tmp_path, model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded, _ = read_baseline(tmp_path)
    assert (loaded.config, loaded.image_shape, loaded.levels, loaded.classes) == (model.config, SHAPE, 17, 3)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded.sample(SEEDS, LABELS), model.sample(SEEDS, LABELS))
    assert torch.equal(loaded.loss(BATCH, context(8))[0], model.loss(BATCH, context(8))[0])


def test_files_that_do_not_fit_raise_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run directory"):
        load_trained_baseline(tmp_path)
    model = make("vae")
    write_baseline(tmp_path, model)
    with pytest.raises(DataError, match="cannot be read"):
        read_baseline(tmp_path)
    other = VAE(replace(model.config, mixtures=1), SHAPE, 17, 3)
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"(?s)another shape.*train the model again"):
        read_baseline(tmp_path)
    (tmp_path / "model.json").write_text((tmp_path / "model.json").read_text().replace('"vae"', '"gan"'))
    with pytest.raises(DataError, match="KeyError: 'gan'"):
        read_baseline(tmp_path)


@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize(
    ("cls", "config", "most"),
    [
        (VAE, VAEConfig(latent_dim=4, width=24, blocks=1), 3.0),
        (CouplingFlow, glow(16, 1, 2), 3.6),
        (TarFlow, TarFlowConfig(flows=2, depth=1, width=16, heads=2), 3.7),
    ],
)
def test_thirty_steps_learn_digits(cls: type[Baseline], config: Any, most: float, classes: int) -> None:
    """Held-out bits per dimension; a uniform model has 4.09."""
    digits = load_images("digits")
    torch.manual_seed(0)
    model = cls(config, (1, 8, 8), 17, classes)
    train = ImageBatch(digits.images[:64], digits.labels[:64])
    model.start(train, context(64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(30):
        loss, _ = model.loss(train, context(64, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    nats = model.eval().log_likelihood(digits.images[64:128], digits.labels[64:128], context(64))
    assert bits_per_dim(nats, 64).mean() < most


Act = Callable[[Baseline], object]
ERRORS: dict[str, tuple[Act, str]] = {
    "no labels": (lambda model: model.sample(SEEDS), "needs 3 labels, one an image; these are none"),
    "number of labels": (lambda model: model.sample(SEEDS, LABELS[:2]), r"of shape \(2,\)"),
    "labels above": (lambda model: model.sample(SEEDS, LABELS + 1), "classes 0 to 2"),
    "labels below": (
        lambda model: model.loss(ImageBatch(BATCH.images, BATCH.labels - 1), context(8)),
        "classes 0 to 2",
    ),
    "values": (lambda model: model.loss(ImageBatch(BATCH.images + 1, BATCH.labels), context(8)), "none of 17 levels"),
    "shape": (
        lambda model: model.loss(ImageBatch(BATCH.images[..., :2], BATCH.labels), context(8)),
        r"the model's are \(1, 4, 4\)",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", ["vae", "glow", "tarflow", "tarflow gaussian"])
def test_invalid_input_raises_value_errors(name: str, error: str) -> None:
    act, message = ERRORS[error]
    with pytest.raises(ValueError, match=message):
        act(make(name))


@pytest.mark.parametrize("name", ["nice", "tarflow", "tarflow gaussian"])
def test_samples_that_are_not_finite_raise(name: str) -> None:
    model = make(name)
    for parameter in model.parameters():
        parameter.fill_(math.nan)
    with pytest.raises(ValueError, match="samples are not finite"):
        model.sample(SEEDS, LABELS)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: VAE(VAEConfig(downsample=16), SHAPE, 17), "choose one that divides both sides"),
        (lambda: VAE(VAEConfig(), (1, 8, 8), 300), "levels is 300"),
        (lambda: VAE(VAEConfig(), (1, 8, 8), 17, -1), "classes is -1"),
        (lambda: VAEConfig(mixtures=0), "mixtures must be 1 or more"),
        (lambda: VAEConfig(beta=-1), "beta must be finite"),
        (lambda: CouplingFlow(glow(8, scales=2), (1, 6, 6), 17), "3x3 cannot be squeezed"),
        (lambda: glow(8, scales=0), "at least two"),
        (lambda: replace(glow(), draws=0), "draws is 0"),
        (lambda: replace(glow(), logit_margin=0.5), "logit_margin is 0.5"),
        (
            lambda: TarFlow(replace(TAR, patch=3), SHAPE, 17),
            "4x4 cannot be cut into patches of 3: choose one that divides",
        ),
        (lambda: TarFlow(replace(TAR, heads=3), SHAPE, 17), "cannot be divided into 3 heads"),
        (lambda: replace(TAR, logit_margin=0.5), "logit_margin is 0.5"),
        (lambda: replace(TAR, sigma=0.0), "sigma is 0.0"),
        (lambda: replace(TAR, flows=0), "flows is 0"),
        (lambda: replace(TAR, label_dropout=1.0), "label_dropout is 1.0"),
        (lambda: score(make("tarflow gaussian")), "no likelihood of integers"),
    ],
)
def test_invalid_configurations_raise_value_errors(act: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_models_follow_to_float64_and_not_to_half_precision(name: str, dtype: torch.dtype) -> None:
    plain, model = make(name), make(name).to(dtype)
    wanted = dtype if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in model.parameters()} == {wanted}
    tolerance = 1e-4 if dtype == torch.float64 else 0
    torch.testing.assert_close(score(model), score(plain), rtol=tolerance, atol=0)
    assert model.sample(SEEDS, LABELS).isfinite().all()
    loss, _ = model.requires_grad_().loss(BATCH, context(8))
    loss.backward()
    assert loss.dtype == wanted
