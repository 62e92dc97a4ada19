"""The start of a tokenizer from principal components: closed forms, what each quantizer gets, degenerate images, once only."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from multiprocess import together
from quantizer_cases import CASES
from tensors import normal
from torch import Tensor
from torch.nn import functional as F

from midway.tokenizers import principal
from midway.tokenizers.fsq import saturation
from midway.tokenizers.networks import Decoder, Encoder
from midway.tokenizers.principal import balance, least_squares, mean_and_covariance
from midway.tokenizers.quantizers import make_quantizer
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def smooth(count: int = 60, channels: int = 1, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    """Images whose neighbouring pixels and channels are alike, within [-1, 1], with a mean that is not 0."""
    coarse = normal(count, 1, height // 4, width // 4, seed=seed)
    fine = normal(count, channels, height, width, seed=seed + 1)
    images = F.interpolate(coarse, (height, width), mode="bilinear") + 0.3 * fine
    return (0.3 * images + 0.2).clamp(-1, 1)


def patches(images: Tensor, factor: int) -> Tensor:
    """(N, P) float64."""
    return F.pixel_unshuffle(images, factor).movedim(1, -1).flatten(0, 2).double()


def components(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (P,), variances (P,) and unit directions (P, P), a row each, the largest first: by a singular value decomposition."""
    mean = rows.mean(0)
    _, values, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    return mean, values.square() / len(rows), directions


def started(quantizer: dict[str, Any], images: Tensor, factor: int = 2, **options: Any) -> Any:
    """A tokenizer after its start from square images."""
    torch.manual_seed(0)
    options = {"width": 8, "blocks": 1, "downsample": factor, "shortcut": "principal", **options}
    model = ImageTokenizer(images.shape[1], images.shape[2], quantizer=quantizer, **options).train()
    model.start(images)
    return model


SIZES = {
    "grey": (1, 8, 2, 3),
    "colour": (3, 8, 4, 5),
    "all components": (1, 8, 2, 4),
    "a patch is the image": (3, 8, 8, 6),
}
"""Channels, side, factor, components."""


@pytest.mark.parametrize("size", SIZES)
def test_the_identity_starts_as_the_reconstruction_of_principal_components(size: str) -> None:
    channels, side, factor, dim = SIZES[size]
    images = smooth(channels=channels, height=side, width=side)
    model = started({"type": "identity", "dim": dim}, images, factor)
    rows = patches(images, factor)
    mean, _, directions = components(rows)
    expected = (rows - mean) @ directions[:dim].T @ directions[:dim] + mean
    with torch.no_grad():
        found = patches(model(images).reconstruction, factor)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_whitening_is_exact() -> None:
    images = smooth(channels=3)
    z = patches(started({"type": "identity", "dim": 7}, images, 4).encode(images).detach(), 1)
    torch.testing.assert_close(z.mean(0), torch.zeros(7).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cov(z.T, correction=0), torch.eye(7).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("factor", "dim"), [(4, 5), (1, 1)])
def test_images_that_are_not_square(factor: int, dim: int) -> None:
    """The maps concern patches only, which may be pixels."""
    images, quantizer = smooth(channels=2, height=12, width=8), make_quantizer({"type": "identity", "dim": dim})
    encoder, decoder = Encoder(2, 8, factor, 1, dim), Decoder(dim, 8, factor, 1, 2, "nearest")
    principal.start(encoder.shortcut, decoder.linear_shortcut, quantizer, images, factor)
    rows = patches(images, factor)
    mean, _, directions = components(rows)
    with torch.no_grad():
        found = patches(decoder(encoder(images)), factor)
    torch.testing.assert_close(found, (rows - mean) @ directions[:dim].T @ directions[:dim] + mean, atol=2e-5, rtol=0)


def test_distances_of_a_codebook_are_those_of_the_patches() -> None:
    """In the span of the components, up to one factor; the root mean square of all channels is 1."""
    images, factor = smooth(channels=3), 4
    z = patches(started({"type": "vq", "codebook_size": 8, "dim": 6}, images, factor).encode(images).detach(), 1)
    rows = patches(images, factor)
    mean, values, directions = components(rows)
    projected = (rows - mean) @ directions[:6].T / values[:6].mean().sqrt()
    torch.testing.assert_close(torch.cdist(z, z), torch.cdist(projected, projected), atol=1e-4, rtol=1e-4)
    assert z.square().mean() == pytest.approx(1, abs=1e-4)


def test_unit_vectors_start_whitened() -> None:
    images = smooth(channels=3)
    quantizer = {"type": "vq", "codebook_size": 8, "dim": 4, "normalize": True}
    z = patches(started(quantizer, images, 4).encode(images).detach(), 1)
    torch.testing.assert_close(torch.cov(z.T, correction=0), torch.eye(4).double(), atol=1e-4, rtol=0)


FORMS = {"tanh": ({}, 1.0), "sigmoid": ({"form": "sigmoid"}, 2.0), "ifsq": ({"form": "ifsq"}, 1.25)}
FORMS |= {"symmetric": ({"symmetric": True}, 1.0), "fsp": ({"form": "fsp", "noise_dropout": 0.0}, 1.0)}


@pytest.mark.parametrize("form", FORMS)
def test_fsq_gets_equal_variances_in_the_span_of_the_components(form: str) -> None:
    options, std = FORMS[form]
    images, factor = smooth(channels=3), 4
    model = started({"type": "fsq", "levels": [7, 5, 5, 5], **options}, images, factor)
    z = patches(model.encode(images).detach(), 1)
    torch.testing.assert_close(z.std(0, correction=0), torch.full((4,), std).double(), atol=1e-4, rtol=0)
    directions = components(patches(images, factor))[2]
    weight = model.encoder.shortcut.weight.detach().flatten(1).double()
    torch.testing.assert_close(weight @ directions[:4].T @ directions[:4], weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_normal_distribution_uses_the_levels_of_fsq_about_evenly(form: str) -> None:
    """The outermost two have between 0.75 and 1.25 times their even share, and the entropy is at least 98 % of log2 L."""
    options, std = FORMS[form]
    for level in (3, 5, 7, 9):
        quantizer = make_quantizer({"type": "fsq", "levels": [level], **options})
        assert quantizer.start_channels()[0].std == pytest.approx(std)
        counts = quantizer(std * normal(1, 1, 40000)).counts
        assert counts is not None
        share = counts / counts.sum()
        assert torch.special.entr(share).sum() > 0.98 * torch.tensor(float(level)).log()
        assert 0.75 < (share[0] + share[-1]) / (2 / level) < 1.25, level


def test_fsq_uses_its_outer_levels_from_the_start_on_real_images(digits: Tensor) -> None:
    """Of four channels of 4x4 pixels of digits 37 %, from random maps 24 %; with even use 36 %."""
    edges = {}
    for shortcut in ("orthogonal", "principal"):
        model = started({"type": "fsq", "levels": [8, 5, 5, 5]}, digits, 4, shortcut=shortcut)
        edges[shortcut] = saturation(model.quantizer, model.encode(digits))["edge_mass"].item()
    assert edges["orthogonal"] < 0.25 < 0.35 < edges["principal"] < 0.4


@pytest.fixture(scope="module")
def digits() -> Tensor:
    from midway.gen.data.images import load_images, to_float

    return to_float(load_images("digits").images[:300])


@pytest.mark.parametrize("name", CASES)
def test_every_quantizer_starts_nearer_to_the_images_than_from_random_maps(name: str, digits: Tensor) -> None:
    """And nearer than the mean patch; the decoder is the best linear one, so that noise on it makes it worse."""
    errors = {}
    for shortcut in ("orthogonal", "principal"):
        model = started(CASES[name], digits, 4, shortcut=shortcut).eval()
        errors[shortcut] = error(model, digits)
    rows = patches(digits, 4)
    assert errors["principal"] < min(errors["orthogonal"], (rows - rows.mean(0)).square().mean().item())
    with torch.no_grad():
        model.decoder.linear_shortcut.weight += 0.02 * normal(*model.decoder.linear_shortcut.weight.shape)
    assert error(model, digits) > errors["principal"]


def error(model: ImageTokenizer, images: Tensor) -> float:
    """Mean squared."""
    with torch.no_grad():
        return (model(images).reconstruction - images).square().mean().item()


def test_channels_of_groups_are_components_one_after_the_other() -> None:
    base = {"type": "vq", "codebook_size": 4, "dim": 2}
    grouped = make_quantizer({"type": "grouped", "base": base, "groups": 3})
    assert [c.component for c in grouped.start_channels()] == [0, 1, 2, 3, 4, 5]
    two = make_quantizer(
        {"type": "two_level", "top": base, "bottom": {"type": "fsq", "levels": [2, 2], "form": "sigmoid"}}
    )
    assert [c.component for c in two.start_channels()] == [0, 1, 0, 1]


def test_a_frozen_codebook_is_spread_over_the_images() -> None:
    """SimVQ's codes get mean and covariance of z, up to the deviations of 4,096 normal vectors from theirs."""
    images = smooth(channels=3)
    model = started({"type": "simvq", "codebook_size": 4096, "dim": 4}, images, 4)
    z, codes = patches(model.encode(images).detach(), 1), model.quantizer.codes().detach().double()
    torch.testing.assert_close(codes.mean(0), z.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(codes.T), torch.cov(z.T), atol=0.1, rtol=0.1)
    model.quantizer.cover(model.encode(images).detach() + 5)
    torch.testing.assert_close(model.quantizer.codes().detach().double().mean(0), z.mean(0) + 5, atol=0.1, rtol=0)


def test_a_posterior_starts_with_little_noise() -> None:
    images = smooth()
    model = started({"type": "kl", "dim": 3}, images)
    mean, log_variance = model.quantizer.moments(model.encode(images))
    assert mean.std(dim=(0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert torch.equal(log_variance, torch.full_like(log_variance, -4))


# Degenerate images ----------------------------------------------------------------------------------------------------

FLAT = {
    "white": torch.ones(6, 1, 8, 8),
    "one grey a picture": torch.linspace(-1, 1, 6).view(-1, 1, 1, 1).expand(6, 1, 8, 8).contiguous(),
    "one picture": smooth(1),
    "rounding": torch.full((6, 1, 8, 8), 0.5) + 1e-4 * normal(6, 1, 8, 8),
    "two patches": smooth(2, height=4, width=4),
}


@pytest.mark.parametrize("images", FLAT)
@pytest.mark.parametrize(
    "name", ["fsq", "vq", "vq, unit, rotation", "simvq", "lfq", "bsq", "residual", "grouped", "kl", "identity"]
)
def test_flat_images_start_too(name: str, images: str) -> None:
    """More channels than directions that vary, or none at all: all numbers finite, no image further off than their mean."""
    x = FLAT[images]
    model = started(CASES[name], x, 4).eval()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(value.abs().max() < 1e3 for value in model.state_dict().values() if value.is_floating_point())
    rows = patches(x, 4)
    assert error(model, x) <= (rows - rows.mean(0)).square().mean() + 1e-6


def test_more_channels_than_pixels_of_a_patch() -> None:
    """The first four are the components, the others further directions, none twice; the reconstruction is exact."""
    images = smooth()
    model = started({"type": "identity", "dim": 9}, images)
    z = patches(model.encode(images).detach(), 1)
    covariance = torch.cov(z.T, correction=0)
    torch.testing.assert_close(covariance.diagonal(), torch.ones(9).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(covariance[:4, :4], torch.eye(4).double(), atol=1e-4, rtol=0)
    assert (covariance - torch.eye(9)).abs().max() < 0.9999
    torch.testing.assert_close(model(images).reconstruction, images, atol=1e-4, rtol=0)


def test_further_directions_mix_whitened_components_as_the_rows_of_the_map_do() -> None:
    images = smooth()
    torch.manual_seed(0)
    before: Any = ImageTokenizer(width=8, blocks=1, quantizer={"type": "identity", "dim": 7}, shortcut="principal")
    own = before.encoder.shortcut.weight.detach().flatten(1).double()
    z = patches(started({"type": "identity", "dim": 7}, images).encode(images).detach(), 1)
    mixed = F.normalize(own[4:] @ components(patches(images, 2))[2].T, dim=1)
    found = torch.cov(z.T, correction=0)[4:, :4]
    torch.testing.assert_close(found.abs(), mixed.abs(), atol=1e-4, rtol=0)


def test_distances_are_kept_where_a_codebook_has_more_channels_than_pixels() -> None:
    """What is beyond the components is constant."""
    images = smooth()
    z = patches(started({"type": "vq", "codebook_size": 8, "dim": 9}, images).encode(images).detach(), 1)
    rows = patches(images, 2)
    torch.testing.assert_close(
        torch.cdist(z, z), torch.cdist(rows, rows) / rows.var(0, correction=0).mean().sqrt(), atol=1e-4, rtol=1e-4
    )
    assert not z[:, 4:].any()


def test_what_varies_by_less_than_rounding_is_not_blown_up() -> None:
    """Pixels of the second column differ from the first by noise of a tenth of a grey level."""
    column = smooth(height=8, width=4)
    images = torch.stack([column, column + 2e-4 * normal(*column.shape)], -1).flatten(-2)
    weight = started({"type": "identity", "dim": 4}, images).encoder.shortcut.weight
    assert weight.abs().max() < 100
    noise = (2 / 255) ** 2 / 12
    levels = ((images + 1) * 127.5).double()
    error = (levels - levels.round()) / 127.5
    assert error.square().mean() == pytest.approx(noise, rel=0.05)


def test_what_varies_twice_as_much_as_rounding_counts() -> None:
    """In its standard deviation: of a patch of 2x2 two directions are differences of neighbours."""
    column = smooth(count=400, height=8, width=4)
    images = torch.stack([column, column + (8 * principal.NOISE) ** 0.5 * normal(*column.shape)], -1).flatten(-2)
    z = patches(started({"type": "identity", "dim": 4}, images).encode(images).detach(), 1)
    torch.testing.assert_close(torch.cov(z.T, correction=0), torch.eye(4).double(), atol=1e-3, rtol=0)


# The numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variances", [[5.0], [3, 1], [1, 1, 1], [9, 4, 1, 0], [7, 0.5, 0.4, 0.3, 0.2], list(range(1, 17))]
)
def test_balance_is_a_rotation_to_equal_variances(variances: list[float]) -> None:
    values = torch.tensor(variances, dtype=torch.float64).sort(descending=True).values
    rotation = balance(values)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(values)).double())
    torch.testing.assert_close(rotation.square() @ values, values.mean().expand(len(values)))
    if len(values) > 1 and variances[0] != variances[1]:
        assert (rotation.abs() > 0.05).sum(1).min() >= 2, "every channel is a mixture"


def test_least_squares_is_that_of_lstsq_and_keeps_what_it_cannot_know() -> None:
    codes, own = normal(500, 4, dtype=torch.float64), normal(6, 4, seed=1, dtype=torch.float64)
    targets = codes @ normal(4, 6, seed=2, dtype=torch.float64) + 3 + 0.1 * normal(500, 6, seed=3, dtype=torch.float64)
    weight, bias = least_squares(*mean_and_covariance([torch.cat([codes, targets], 1)]), own)
    ones = torch.ones(500, 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([codes, ones], 1), targets).solution
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], 1), expected.T)
    codes[:, 3] = 0.5
    weight, bias = least_squares(*mean_and_covariance([torch.cat([codes, targets], 1)]), own)
    torch.testing.assert_close(weight[:, 3], own[:, 3])
    torch.testing.assert_close((codes @ weight.T + bias).mean(0), targets.mean(0))


def test_moments_do_not_depend_on_chunks_nor_lose_digits_far_from_zero() -> None:
    rows = normal(1000, 3, dtype=torch.float64) + 1e6
    for parts in ([rows], rows.split(7), [rows[:1], rows[1:]]):
        mean, covariance = mean_and_covariance(parts)
        torch.testing.assert_close(mean, rows.mean(0))
        torch.testing.assert_close(covariance, torch.cov(rows.T, correction=0), rtol=1e-8, atol=1e-8)


# Once, everywhere the same --------------------------------------------------------------------------------------------

OTHERS: dict[str, dict[str, Any]] = {
    "vit": {"network": "vit", "width": 8, "heads": 2, "depth": 1},
    "pixels": {"quantizer": {"type": "identity", "dim": 1}, "downsample": 1},
    "orthogonal": {"shortcut": "orthogonal"},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_networks_without_such_a_shortcut_start_as_ever(kind: str) -> None:
    torch.manual_seed(0)
    model = ImageTokenizer(**{"width": 8, "shortcut": "principal", **OTHERS[kind]})
    before = copy.deepcopy(model.state_dict())
    model.start(smooth())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_start_changes_the_shortcuts_alone() -> None:
    torch.manual_seed(0)
    before = ImageTokenizer(width=8, shortcut="principal").state_dict()
    after = started({"type": "fsq", "levels": [8, 5, 5, 5]}, smooth(), blocks=2).state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {
        *(f"{name}.{part}" for name in ("encoder.shortcut", "decoder.shortcut.0") for part in ("weight", "bias")),
        "shortcut_started",
    }


def test_it_starts_once_also_after_saving_and_reading(tmp_path: Path) -> None:
    model = started(CASES["vq"], smooth())
    with torch.no_grad():
        model.encoder.shortcut.weight += 0.1  # training
    expected = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    for again in (model, ImageTokenizer.from_pretrained(tmp_path)):
        assert isinstance(again, ImageTokenizer)
        again.start(smooth(seed=9))
        assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


def test_an_artefact_from_before_the_option_is_read_and_starts_as_then(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ImageTokenizer(width=8)
    assert "shortcut_started" not in model.state_dict()
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    lines = [line for line in config.read_text().splitlines() if '"shortcut"' not in line]
    config.write_text("\n".join(lines))
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, ImageTokenizer)
    again.start(smooth())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_another_word_raises() -> None:
    with pytest.raises(ValueError, match="'principal' or 'orthogonal'"):
        ImageTokenizer(shortcut="pca")


def test_autocast_changes_no_bit() -> None:
    expected = started(CASES["fsq"], smooth()).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        found = started(CASES["fsq"], smooth()).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_weights_of_half_precision_start_too() -> None:
    images = smooth()
    made: Any = ImageTokenizer(width=8, quantizer={"type": "identity", "dim": 3}, shortcut="principal")
    model = made.to(torch.bfloat16)
    model.start(images)
    rows = patches(images, 2)
    mean, _, directions = components(rows)
    expected = (rows - mean) @ directions[:3].T @ directions[:3] + mean
    assert (patches(model(images).reconstruction, 2) - expected).abs().max() < 0.03


def test_processes_start_alike(tmp_path: Path) -> None:
    """Rank 0's numbers count, even if the weights or the images of another differ."""
    together(start_in_process, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = started(CASES["vq"], smooth()).state_dict()
    for key, value in alone.items():
        if ("shortcut" in key and "decoder" not in key) or "codebook" in key:
            assert torch.equal(value, first[key]), key
            assert torch.equal(value, second[key]), key
    assert torch.equal(first["decoder.shortcut.0.weight"], second["decoder.shortcut.0.weight"])
    assert torch.equal(first["decoder.shortcut.0.weight"], alone["decoder.shortcut.0.weight"])


def start_in_process(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    images = smooth() + 1e-6 * rank
    torch.save(started(CASES["vq"], images).state_dict(), folder / f"{rank}.pt")


def test_the_first_gradient_reaches_every_parameter() -> None:
    """Of the last layers, which start at zero, at once; of those behind them in the steps after it."""
    images = smooth()
    model = started({"type": "fsq", "levels": [8, 5, 5, 5]}, images)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(images).reconstruction - images).square().mean().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
