"""ImageTokenizer and the continuous quantizers: closed forms, round trips, bit-equal artefacts, useful refusals."""

import copy
import json
import math
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from quantizer_cases import CASES, DISCRETE, LEARNING, SUMS
from torch import Tensor

from midway.gen.data.images import to_float
from midway.gen.tokenizer.objective import TokenizerObjective
from midway.gen.training.batches import Context, ImageBatch
from midway.tokenizers import networks
from midway.tokenizers.kl import KL, Identity, gaussian_kl
from midway.tokenizers.networks import ResidualBlock
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int = 6, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    return 2 * torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) - 1


def tokenizer(name: str, latent_space: str = "pre", upsample: str = "nearest") -> ImageTokenizer:
    """A small tokenizer after a few training steps, in evaluation mode, with measured latents."""
    return copy.deepcopy(_trained(name, latent_space, upsample))


@cache
def _trained(name: str, latent_space: str, upsample: str) -> ImageTokenizer:
    torch.manual_seed(1)
    model = ImageTokenizer(
        width=16, blocks=1, quantizer=CASES[name], latent_space=latent_space, upsample=upsample
    ).train()
    model.start(images(40))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(3):
        out = model(images(seed=step), torch.randn(6, *model.noise_shape))
        ((out.reconstruction - images(seed=step)).square().mean() + out.quantized.loss).backward()
        optimizer.step()
        model.observe(out.quantized)
        model.update()
    return measured(model.eval())


def measured(model: ImageTokenizer) -> ImageTokenizer:
    with torch.no_grad():
        raw = model.raw_latents(images(64, model.image_shape[0], model.image_shape[1]))
    model.set_latent_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3), correction=0))
    return model


# KL and identity ------------------------------------------------------------------------------------------------------


def test_kl_agrees_with_monte_carlo() -> None:
    mean, log_variance = torch.tensor([[0.7, -1.2]]), torch.tensor([[-1.0, 0.5]])
    posterior = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
    torch.manual_seed(0)
    draws = posterior.sample(torch.Size([200_000]))
    estimate = (posterior.log_prob(draws) - torch.distributions.Normal(0.0, 1.0).log_prob(draws)).sum(-1).mean()
    assert gaussian_kl(mean, log_variance).item() == pytest.approx(estimate.item(), rel=0.01)


def test_kl_is_summed_over_an_image_and_averaged_over_the_batch() -> None:
    z = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, log_variance = z[:, :3].double(), z[:, 3:].double()
    expected = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / 5
    out = KL(3, weight=0.1)(z)
    assert out.losses["kl"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(0.1 * expected.item(), rel=1e-5)
    assert out.indices.shape == (5, 0)
    assert out.counts is None


def test_kl_draws_in_training_only_unless_noise_is_given() -> None:
    quantizer, z, noise = KL(2), torch.randn(3, 4, 5), torch.randn(3, 2, 5)
    expected = z[:, :2] + torch.exp(z[:, 2:] / 2) * noise
    for mode in (True, False):
        torch.testing.assert_close(quantizer.train(mode)(z, noise).codes, expected)
    assert torch.equal(quantizer.eval()(z).codes, z[:, :2])
    assert not torch.equal(quantizer.train()(z).codes, quantizer(z).codes)
    with pytest.raises(ValueError, match="noise"):
        quantizer(z, noise[:1])


def test_kl_survives_extreme_variances() -> None:
    z = torch.tensor([[0.0, 1e9], [0.0, -1e9]]).requires_grad_()
    out = KL(1)(z)
    assert torch.isfinite(out.codes).all()
    assert torch.isfinite(out.loss)
    assert KL(1).moments(z)[1].flatten().tolist() == [20, -30]


def test_identity_is_the_identity_and_has_no_indices() -> None:
    z = torch.randn(2, 3, 4)
    quantizer = Identity(3)
    assert torch.equal(quantizer(z).codes, z)
    assert torch.equal(quantizer.snap(quantizer.latents(z)), z)
    with pytest.raises(ValueError, match="continuous"):
        quantizer.indices_to_codes(torch.zeros(1, 1, dtype=torch.int64))


# Tokenizer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "upsample"),
    [*((name, "nearest") for name in CASES), *(("fsq", upsample) for upsample in get_args(networks.Upsample))],
)
def test_encode_quantize_decode_is_forward(name: str, upsample: str) -> None:
    model = tokenizer(name, upsample=upsample)
    out = model(images())
    assert out.reconstruction.shape == images().shape
    assert out.quantized.codes.shape == (6, *model.latent_shape)
    assert torch.equal(model.decode(out.quantized.codes), out.reconstruction)
    assert model.tokens == (20 if name.startswith("two_level") else 16)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", DISCRETE)
def test_tokens_are_those_of_forward_and_decode_to_its_reconstruction(name: str, training: bool) -> None:
    model = tokenizer(name).train(training)
    noise = torch.randn(6, *model.noise_shape, generator=torch.Generator().manual_seed(3))
    noise[:, -1:] = 9  # of dropout: every sample is rounded, by all stages
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for batch, draws in zip(images().split([1, 2, 3]), noise.split([1, 2, 3]), strict=True):
                out, indices = model(batch, draws), model.encode_indices(batch)
                assert torch.equal(indices, out.quantized.indices)
                assert torch.equal(model.decode_indices(indices), out.reconstruction)


def test_an_encoder_that_is_not_finite_has_no_tokens() -> None:
    model = tokenizer("fsq")
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        model.encode_indices(images())


@pytest.mark.parametrize("latent_space", ["pre", "post"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in SUMS])
def test_latents_are_standardised_and_decode_to_the_reconstruction(name: str, latent_space: str) -> None:
    model = tokenizer(name, latent_space)
    many = model.encode_latents(images(64))
    torch.testing.assert_close(many.mean((0, 2, 3)), torch.zeros(many.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(many.std((0, 2, 3), correction=0), torch.ones(many.shape[1]), atol=1e-4, rtol=0)
    decoded = model.decode_latents(model.encode_latents(images()))
    torch.testing.assert_close(decoded, model(images()).reconstruction, atol=1e-5, rtol=1e-5)
    if latent_space == "post":
        unsnapped = model.decode_latents(model.encode_latents(images()), snap=False)
        torch.testing.assert_close(unsnapped, decoded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in DISCRETE if name not in SUMS])
def test_snapping_removes_small_noise(name: str) -> None:
    model = tokenizer(name, "post")
    latents = model.encode_latents(images())
    noisy = latents + 0.01 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.decode_latents(noisy), model.decode_latents(latents))
    assert not torch.equal(model.decode_latents(noisy, snap=False), model.decode_latents(latents))


def test_reading_latents_in_training_mode_is_not_training() -> None:
    model = tokenizer("vq", "post").train()
    before = model.quantizer.state_dict()["codebook"].clone()
    model.encode_latents(images())
    model.encode_indices(images())
    model.update()
    assert torch.equal(model.quantizer.state_dict()["codebook"], before)


@pytest.mark.parametrize("latent_tokens", [None, 3])
def test_a_transformer_is_saved_and_loaded_bit_for_bit(latent_tokens: int | None, tmp_path: Path) -> None:
    model = measured(
        ImageTokenizer(width=16, downsample=2, network="vit", depth=1, heads=2, latent_tokens=latent_tokens).eval()
    )
    assert model.latent_shape == ((4, 4, 4) if latent_tokens is None else (4, 1, 3))
    assert torch.equal(model.decode_indices(model.encode_indices(images())), model(images()).reconstruction)
    model.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, ImageTokenizer)
    assert torch.equal(loaded(images()).reconstruction, model(images()).reconstruction)
    assert torch.equal(loaded.decode_latents(loaded.encode_latents(images())), model(images()).reconstruction)


def test_latent_tokens_are_a_transformers() -> None:
    with pytest.raises(ValueError, match="only network='vit'"):
        ImageTokenizer(latent_tokens=4)
    with pytest.raises(ValueError, match="choose 'conv' or 'vit'"):
        ImageTokenizer(network="unet")


def test_the_default_quantizer_is_written_out(tmp_path: Path) -> None:
    ImageTokenizer(width=8).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantizer"] == {"type": "fsq", "levels": [8, 5, 5, 5]}


def test_half_precision_weights_leave_quantizer_and_statistics_in_float32(tmp_path: Path) -> None:
    whole = tokenizer("vq")
    whole.save_pretrained(tmp_path)
    model = ImageTokenizer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert isinstance(model, ImageTokenizer)
    assert next(model.encoder.parameters()).dtype == torch.bfloat16
    for name in ("bottleneck.codebook", "bottleneck.total", "latent_mean", "latent_std"):
        assert torch.equal(model.state_dict()[name], whole.state_dict()[name])
    assert model(images()).reconstruction.dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_pass_through(channels: int, tmp_path: Path) -> None:
    model = ImageTokenizer(channels, quantizer={"type": "identity", "dim": channels}, downsample=1)
    batch = images(4, channels)
    assert not list(model.parameters())
    assert model.latent_shape == (channels, 8, 8)
    assert torch.equal(model(batch).reconstruction, batch)
    assert torch.equal(model.raw_latents(batch), batch)
    measured(model)
    torch.testing.assert_close(model.decode_latents(model.encode_latents(batch)), batch, atol=1e-6, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, ImageTokenizer)
    assert torch.equal(loaded.encode_latents(batch), model.encode_latents(batch))


def test_unmeasured_latents_are_refused_with_the_remedy() -> None:
    model = ImageTokenizer(width=8)
    for use in (lambda: model.encode_latents(images()), lambda: model.decode_latents(torch.zeros(1, 4, 4, 4))):
        with pytest.raises(ValueError, match="set_latent_statistics"):
            use()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-9])
def test_impossible_statistics_raise(bad: float) -> None:
    model = ImageTokenizer(width=8)
    with pytest.raises(ValueError, match="std"):
        model.set_latent_statistics(torch.ones(4), torch.tensor([1, 1, bad, 1]))
    with pytest.raises(ValueError, match="mean"):
        model.set_latent_statistics(torch.zeros(3), torch.ones(4))
    assert not bool(model.latents_measured)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 9}, "image_size 9"),
        ({"downsample": 3}, "power of two"),
        ({"upsample": "lanczos"}, "pixel_shuffle"),
        ({"latent_space": "mid"}, "'pre' or 'post'"),
        ({"downsample": 1, "quantizer": {"type": "identity", "dim": 4}}, "1 channels"),
    ],
)
def test_unusable_settings_raise(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTokenizer(**settings)


def test_unusable_images_raise() -> None:
    model = ImageTokenizer(width=8)
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\)"):
        model(images(2, 3))
    with pytest.raises(ValueError, match="uint8"):
        model(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="codes"):
        model.decode(torch.zeros(1, 4, 8, 8))


def test_noise_makes_the_reconstruction_a_function_of_its_arguments() -> None:
    model = tokenizer("kl").train()
    noise = torch.randn(6, *model.latent_shape)
    assert torch.equal(model(images(), noise).reconstruction, model(images(), noise).reconstruction)
    assert not torch.equal(model(images()).reconstruction, model(images()).reconstruction)


# Under the training loop ----------------------------------------------------------------------------------------------


def batch_of(count: int = 12, seed: int = 0, step: int = 0) -> tuple[ImageBatch, Context]:
    """Random bytes, and a context whose sample ids are 0 .. count - 1."""
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed + step))
    labels = torch.zeros(count, dtype=torch.int64)
    return ImageBatch(pixels.to(torch.uint8), labels), Context(seed, step, torch.arange(count))


def objective(name: str, flip: bool = False, upsample: str = "pixel_shuffle") -> TokenizerObjective:
    """Untrained, in training mode, always with the same weights."""
    torch.manual_seed(1)
    model = ImageTokenizer(width=16, blocks=2, quantizer=CASES[name], upsample=upsample)
    return TokenizerObjective(model, flip).train()


def test_the_switch_of_diffusers_reaches_every_block() -> None:
    model = ImageTokenizer(width=8)
    model.enable_gradient_checkpointing()
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    assert [block.gradient_checkpointing for block in blocks] == [True] * 4


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("flip", [False, True])
def test_start_sets_a_codebook_from_these_images_and_nothing_else(name: str, flip: bool) -> None:
    model, expected = objective(name, flip), objective(name)
    batch, context = batch_of(40)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = context.either(batch.images, batch.images.flip(-1), "flip") if flip else batch.images
    books = [key for key in before if key.endswith("codebook")]
    assert bool(books) == (name in LEARNING)
    if books:
        with torch.no_grad():
            expected.tokenizer.quantizer.start(expected.tokenizer.encode(to_float(images)))
        assert not any(torch.equal(expected.state_dict()[key], before[key]) for key in books)
    for seed in (0, 7):  # the second time nothing happens
        model.start(batch_of(40, seed)[0], context)
        assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())
    model.loss(*batch_of(step=3))
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_skipped_step_does_not_reach_the_codebook() -> None:
    model = objective("vq")
    model.start(*batch_of())
    before = model.state_dict()["tokenizer.bottleneck.codebook"].clone()
    for kept in (False, True):
        model.loss(*batch_of(step=1))
        model.after_step(torch.tensor(kept))
        assert torch.equal(model.state_dict()["tokenizer.bottleneck.codebook"], before) != kept


def mirrored(batch: ImageBatch, context: Context, flip: bool = True) -> Tensor:
    """Which samples of a batch the encoder sees mirrored, bool (B,)."""
    model, seen = objective("fsq", flip), []
    model.tokenizer.encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model.loss(batch, context)
    images = to_float(batch.images)
    plain, turned = ((seen[0] == each).flatten(1).all(1) for each in (images, images.flip(-1)))
    assert (plain ^ turned).all()
    return turned


def test_half_of_the_images_are_mirrored_by_seed_step_and_sample() -> None:
    batch, context = batch_of(400)
    turned = mirrored(batch, context)
    assert abs(int(turned.sum()) - 200) < 50  # five standard deviations
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:100]
    others = ImageBatch(batch.images.flip(0)[:100], batch.labels[:100])
    assert torch.equal(mirrored(others, Context(0, 0, order)), turned[order])
    for context in (Context(1, 0, torch.arange(400)), Context(0, 1, torch.arange(400))):
        assert 100 < int((mirrored(batch, context) ^ turned).sum()) < 300
    assert not mirrored(batch, context, flip=False).any()


def test_a_mirrored_image_is_also_what_is_to_be_reconstructed() -> None:
    batch, context = batch_of()
    images = context.either(batch.images, batch.images.flip(-1), "flip")
    expected, _ = objective("fsq").loss(ImageBatch(images, batch.labels), context)
    assert torch.equal(objective("fsq", flip=True).loss(batch, context)[0], expected)
