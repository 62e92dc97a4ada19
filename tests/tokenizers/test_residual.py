"""Residual VQ and FSQ: exact inverses, the finer grids, gradients, dropout, and independence of how a batch is cut up."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensors import grad, normal
from torch import Tensor

from midway.tokenizers.fsq import FSQ
from midway.tokenizers.quantizers import residual
from midway.tokenizers.residual import Residual

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS: list[dict[str, Any]] = [
    {"levels": [8, 5, 6]},
    {"levels": [8, 5, 6], "symmetric": True},
    {"levels": [4, 3, 2], "form": "sigmoid"},
]


def fsq(depth: int, dropout: float = 0.0, **options: Any) -> Residual:
    return residual({"type": "fsq", **options}, depth, dropout)


def vq(depth: int = 3, size: int = 16, dim: int = 4, dropout: float = 0.0, **options: Any) -> Residual:
    """Residual VQ whose codebooks begin at Gaussian data."""
    quantizer = residual({"type": "vq", "codebook_size": size, "dim": dim, **options}, depth, dropout)
    quantizer.start(normal(40 * size, dim, seed=77))
    return quantizer


def books(quantizer: Residual) -> list[Tensor]:
    """The codebook (K, D) of each stage of residual VQ, as its state has them."""
    state = quantizer.state_dict()
    return [state[f"stages.{i}.codebook"] for i in range(quantizer.groups)]


# Inverses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        ({"levels": [8, 8, 5]}, 6),
        ({"levels": [512, 511]}, 2),
        ({"levels": [2, 2], "symmetric": True}, 18),
        ({"levels": [64, 63], "form": "sigmoid"}, 3),
    ],
)
def test_the_finest_grids_are_exact(options: dict[str, Any], depth: int) -> None:
    quantizer = fsq(depth, **options)
    size = math.prod(options["levels"])
    ends = torch.tensor([[0] * depth, [size - 1] * depth])
    drawn = torch.randint(0, size, (20000, depth), generator=torch.Generator().manual_seed(0))
    indices = torch.cat([ends, drawn]).unsqueeze(0)
    codes = quantizer.indices_to_codes(indices)
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    assert torch.equal(quantizer.snap(codes), codes)


def test_indices_of_the_first_stages_are_their_partial_sum() -> None:
    for quantizer, z in ((vq(), normal(5, 4, 3)), (fsq(3, levels=[5, 4]), normal(5, 2, 3))):
        indices = quantizer(z).indices
        total = torch.zeros(())
        for i in range(3):
            before = total
            total = quantizer.indices_to_codes(indices[..., : i + 1])
            assert not torch.equal(total, before)
        assert torch.equal(total, quantizer.indices_to_codes(indices))
        for wrong in (indices[..., :0], torch.cat([indices, indices], -1), torch.zeros(3, dtype=torch.int64)):
            with pytest.raises(ValueError, match=r"\(B, \*S, k\) with k from 1 to 3"):
                quantizer.indices_to_codes(wrong)


# Forward --------------------------------------------------------------------------------------------------------------


def test_each_stage_takes_the_code_nearest_to_what_is_left() -> None:
    quantizer = vq(3, 32).eval()
    z = normal(300, 4)
    out = quantizer(z)
    left = z.double()
    for book, indices in zip(books(quantizer), out.indices.unbind(-1), strict=True):
        distances = (left[:, None] - book.double()).square().sum(2)
        assert (distances.argmin(1) != indices).double().mean() < 0.01
        left = left - book.double()[indices]
    torch.testing.assert_close(z.double() - out.codes.double(), left, atol=1e-5, rtol=0)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("options", GRIDS)
def test_fsq_stages_are_one_uniform_quantizer(options: dict[str, Any], depth: int) -> None:
    """In units of a step each cell of the first grid is cut into L^(n-1) equal ones, with codes in their middles."""
    quantizer, one = fsq(depth, **options), FSQ(**options)
    z = 1.5 * normal(3, 3, 1000)
    assert torch.equal(quantizer.latents(z), one.latents(z))
    latents, codes = one.latents(z).double(), quantizer(z).codes.double()
    for channel, level in enumerate(options["levels"]):
        line = one.indices_to_codes(torch.arange(one.codebook_size or 0).unsqueeze(0))[0, channel].unique().double()
        step = (line[-1] - line[0]) / (level - 1)
        fine, lowest = step / level ** (depth - 1), line[0] - step / 2
        inside = (latents[:, channel] > lowest) & (latents[:, channel] < line[-1] + step / 2)
        expected = lowest + fine * (((latents[:, channel] - lowest) / fine).floor() + 0.5)
        wrong = ((codes[:, channel] - expected).abs() > 1e-6) & inside
        assert inside.double().mean() > 0.95
        assert wrong.double().mean() < 1e-3  # a latent on the border of two cells


def test_error_falls_with_depth_on_gaussian_data() -> None:
    z = normal(4000, 4, seed=3)
    quantizer = vq(4, 16).eval()
    indices = quantizer(z).indices
    errors = [(quantizer.indices_to_codes(indices[..., :k]) - z).square().mean().item() for k in range(1, 5)]
    assert errors[0] < 0.45  # of 1 without codes; the bound for 4 bits in 4 channels is 2^-2
    assert all(later < 0.5 * sooner for sooner, later in itertools.pairwise(errors))


# Gradients ------------------------------------------------------------------------------------------------------------


def test_gradient_is_straight_through_once_plus_the_commitment_of_every_stage() -> None:
    quantizer = vq(3, commitment=0.5)
    z, weight = normal(6, 4, 5).requires_grad_(), normal(6, 4, 5, seed=1)
    out = quantizer(z)
    ((out.codes * weight).sum() + out.loss).backward()
    left, commitment, expected = z.detach().double(), 0.0, weight.double()
    for book, indices in zip(books(quantizer), out.indices.unbind(-1), strict=True):
        left = left - book.double()[indices].movedim(-1, 1)
        commitment += left.square().mean().item()
        expected = expected + 2 * 0.5 * left / z.numel()
    torch.testing.assert_close(grad(z).double(), expected, atol=1e-6, rtol=1e-5)
    assert out.losses["commitment"].item() == pytest.approx(commitment, rel=1e-5)
    assert out.loss.item() == pytest.approx(0.5 * commitment, rel=1e-5)


def test_a_base_with_the_rotation_trick_rotates_from_the_latent_to_the_sum() -> None:
    quantizer = vq(2, dim=3, gradient="rotation")
    z, weight = normal(20, 3).requires_grad_(), normal(20, 3, seed=1)
    out = quantizer(z)
    (out.codes * weight).sum().backward()
    assert torch.equal(out.codes, quantizer.indices_to_codes(out.indices))
    for e, q, g, found in zip(z.detach().double(), out.codes.detach().double(), weight.double(), grad(z), strict=True):
        u, v = e / e.norm(), q / q.norm()
        w = (u + v) / (u + v).norm()
        turn = torch.eye(3, dtype=torch.float64) - 2 * torch.outer(w, w) + 2 * torch.outer(v, u)
        torch.testing.assert_close(turn @ u, v)
        torch.testing.assert_close(found.double(), q.norm() / e.norm() * turn.T @ g, atol=1e-4, rtol=1e-4)


# Dropout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [1.0, 0.4])
def test_depths_are_uniform_among_the_samples_that_are_cut(dropout: float) -> None:
    count, depth = 40000, 5
    quantizer = fsq(depth, dropout, levels=[5, 5])
    depths = quantizer.depths(normal(count, 1, 2), torch.zeros(count, 2, 2)).flatten()
    found = torch.bincount(depths, minlength=depth + 1).double() / count
    expected = torch.tensor([0.0] + [dropout / depth] * depth, dtype=torch.float64)
    expected[-1] += 1 - dropout
    assert found[0] == 0
    assert bool(((found - expected).abs() < 5 * (expected / count).sqrt() + 1e-12).all())


@pytest.mark.parametrize("make", [lambda p: vq(dropout=p), lambda p: fsq(3, p, levels=[8, 5, 7, 4])])
def test_dropout_takes_codes_out_of_the_sum_and_nothing_else(make: Callable[[float], Residual]) -> None:
    dropping, plain = make(1.0), make(0.0)
    assert dropping.noise_channels == plain.noise_channels + 1
    z, noise = normal(30, 4, 3), normal(30, dropping.noise_channels, 3, seed=1)
    out, again, whole = dropping(z, noise), dropping(z, noise), plain(z, noise[:, : plain.noise_channels])
    depths = dropping.depths(noise, z).flatten().tolist()
    assert set(depths) == {1, 2, 3}
    for sample, depth in enumerate(depths):
        indices = out.indices[sample : sample + 1, ..., :depth]
        assert torch.equal(out.codes[sample : sample + 1], dropping.indices_to_codes(indices))
    assert torch.equal(out.codes, again.codes)
    assert torch.equal(out.indices, whole.indices)
    assert torch.equal(out.loss, whole.loss)
    assert torch.equal(dropping.eval()(z, noise).codes, whole.codes)
    for missing in (None, noise[:, :-1], noise[:5]):
        with pytest.raises(ValueError, match="dropout in training takes noise"):
            dropping.train()(z, missing)


def test_a_stage_that_is_dropped_sends_no_gradient_and_still_learns() -> None:
    dropping, plain = vq(dropout=1.0), vq()
    z, noise = normal(30, 4, 3).requires_grad_(), normal(30, 2, 3, seed=1)
    out = dropping(z, noise)
    (gradient,) = torch.autograd.grad(out.loss, z)
    depths = dropping.depths(noise, z)
    left, expected = z.detach(), torch.zeros_like(z)
    for i, (book, indices) in enumerate(zip(books(dropping), out.indices.unbind(-1), strict=True)):
        left = left - book[indices].movedim(-1, 1)
        expected += torch.where(depths > i, 2 * 0.25 * left / z.numel(), 0)
    torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-4)
    dropping.observe(out)
    plain.observe(plain(z, noise[:, :1]))
    for quantizer in (dropping, plain):
        quantizer.update()
    for mine, other in zip(books(dropping), books(plain), strict=True):
        assert torch.equal(mine, other)


# Statistics -----------------------------------------------------------------------------------------------------------


def test_start_gives_each_stage_what_is_left() -> None:
    quantizer = residual({"type": "vq", "codebook_size": 8, "dim": 4}, 2)
    z = normal(8, 4).repeat(20, 1)
    quantizer.start(z)
    first, second = (book.square().sum(1).sqrt() for book in books(quantizer))
    assert torch.cdist(books(quantizer)[0], normal(8, 4)).amin(0).max() < 1e-5
    assert first.min() > 0.5
    assert second.max() < 1e-5


def test_codebooks_are_drawn_apart() -> None:
    quantizer = residual({"type": "vq", "codebook_size": 8, "dim": 4, "seed": 5}, 3)
    for one, other in itertools.combinations(books(quantizer), 2):
        assert not torch.equal(one, other)
    single = residual({"type": "vq", "codebook_size": 8, "dim": 4, "seed": 5}, 2)
    assert torch.equal(books(single)[0], books(quantizer)[0])
