"""Two levels of codes: their order, a snap that agrees with forward, and a bottom that is told the top."""

import itertools
from typing import Any, cast

import pytest
import torch
from quantizer_cases import VQ, started
from tensors import grad, normal
from torch.nn import functional as F

from midway.tokenizers.quantizers import make_quantizer, two_level
from midway.tokenizers.two_level import TwoLevel, _pooled, _repeated

pytestmark = pytest.mark.usefixtures("one_thread")

FSQ = {"type": "fsq", "levels": [3, 4]}


def two_levels(case: str | dict[str, Any]) -> TwoLevel:
    """Started, with a conditioning that is not zero."""
    return cast(TwoLevel, started(case))


def test_the_top_comes_first_and_rows_follow_one_another() -> None:
    quantizer = two_level({"type": "fsq", "levels": [101]}, {"type": "fsq", "levels": [101]})
    indices = torch.arange(80).unsqueeze(0)
    codes = quantizer.indices_to_codes(indices)
    value = (indices - 50) / 50
    assert torch.equal(codes[0, 1], value[0, 16:].view(8, 8))
    for row, column in itertools.product(range(8), range(8)):
        assert codes[0, 0, row, column] == value[0, 4 * (row // 2) + column // 2]


@pytest.mark.parametrize("kind", ["two_level", "two_level, mixed"])
def test_snapping_a_snapped_point_changes_nothing(kind: str) -> None:
    quantizer = two_levels(kind).eval()
    codes = quantizer.snap(normal(50, quantizer.dim, 4, 4))
    assert torch.equal(quantizer.snap(codes), codes)
    top = codes[:, : quantizer.top.dim]
    assert torch.equal(top[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3), top)
    loose = codes.clone()
    loose[:, : quantizer.top.dim] += 0.3 * torch.tensor([[1.0, -1.0], [2.0, -2.0]]).repeat(2, 2)
    assert torch.equal(quantizer.snap(loose), codes)  # what averages to nothing over 2x2


def test_latents_follow_the_definition() -> None:
    quantizer = two_levels("two_level").eval()
    z = normal(4, 7, 4, 4)
    top = F.avg_pool2d(z[:, :3], 2).double()
    book = quantizer.state_dict()["top.codebook"].double()
    code = book[torch.cdist(top.movedim(1, -1).reshape(-1, 3), book).argmin(1)].view(4, 2, 2, 3).movedim(-1, 1)
    weight, bias = (p.detach().double() for p in quantizer.condition.parameters())
    bottom = z[:, 3:].double() + F.pixel_shuffle(F.conv2d(F.pad(code, (1, 1, 1, 1)), weight, bias), 2)
    expected = torch.cat([F.interpolate(top, scale_factor=2), bottom], 1)
    torch.testing.assert_close(quantizer.latents(z).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["two_level", "fsq"])
def test_gradient_is_that_of_latents_and_of_the_commitments(kind: str) -> None:
    quantizer = two_levels(kind if kind == "two_level" else {"type": "two_level", "top": FSQ, "bottom": FSQ})
    z, weight = normal(2, quantizer.in_dim, 4, 4).requires_grad_(), normal(2, quantizer.dim, 4, 4, seed=1)
    out = quantizer(z)
    found = torch.autograd.grad((out.codes * weight).sum(), [z, quantizer.condition.weight], retain_graph=True)
    wanted = torch.autograd.grad((quantizer.latents(z) * weight).sum(), [z, quantizer.condition.weight])
    for one, other in zip(found, wanted, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    if kind == "two_level":
        error = (quantizer.latents(z) - out.codes).detach().double()
        parts = error[:, :3, ::2, ::2].square().mean() + error[:, 3:].square().mean()
        assert out.losses["commitment"].item() == pytest.approx(parts.item(), rel=1e-5)
        assert out.loss.item() == pytest.approx(0.25 * parts.item(), rel=1e-5)


def test_gradient_in_closed_form_for_a_bottom_that_is_told_nothing() -> None:
    quantizer = two_level(VQ, {**VQ, "dim": 4})
    quantizer.start(normal(30, 7, 4, 4, seed=77))
    z, weight = normal(2, 7, 4, 4).requires_grad_(), normal(2, 7, 4, 4, seed=1)
    (quantizer(z).codes * weight).sum().backward()
    spread = F.avg_pool2d(weight[:, :3], 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(grad(z), torch.cat([spread, weight[:, 3:]], 1))


def test_the_conditioning_learns_to_tell_the_bottom_what_the_top_knows() -> None:
    """The bottom's input repeats the top: once it is subtracted, the rest is small enough for its few codes."""
    quantizer = two_level({"type": "fsq", "levels": [9]}, {"type": "fsq", "levels": [9]})
    optimizer = torch.optim.Adam([*quantizer.condition.parameters()], lr=0.05)
    z = normal(64, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3).repeat(1, 2, 1, 1)
    losses = []
    for _ in range(60):
        loss = quantizer(z).codes[:, 1].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_start_begins_the_bottom_at_what_the_top_leaves_to_it() -> None:
    quantizer, alone = two_levels("two_level"), make_quantizer({**VQ, "dim": 4})
    z = normal(30, 7, 4, 4, seed=77)
    alone.start(quantizer.latents(z)[:, 3:])
    assert torch.equal(quantizer.state_dict()["bottom.codebook"], alone.state_dict()["codebook"])


def test_other_shapes_raise() -> None:
    quantizer = two_levels("two_level, mixed")
    calls = (quantizer, quantizer.latents, quantizer.snap, quantizer.codes_to_indices, quantizer.start)
    for shape in ((2, 6, 4, 4), (2, 5, 3, 3), (2, 5, 4, 6), (2, 5, 16), (2, 5, 0, 0)):
        for call in calls:
            with pytest.raises(ValueError, match=r"takes|square grid"):
                call(torch.zeros(shape))
    for shape in ((2, 19), (2, 15), (2, 0), (2, 20, 1), (20,)):
        with pytest.raises(ValueError, match=r"\(B, L\)"):
            quantizer.indices_to_codes(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"0\.\.11"):
        quantizer.indices_to_codes(torch.full((1, 20), 12))
    with pytest.raises(ValueError, match=r"\(B, L, 2\)"):
        two_levels("two_level, parts").indices_to_codes(torch.zeros(1, 20, 3, dtype=torch.int64))
    assert quantizer(torch.zeros(0, 5, 4, 4)).codes.shape == (0, 5, 4, 4)


def test_the_mean_of_four_copies_is_the_original_bit_for_bit() -> None:
    x = normal(4, 3, 8, 8)
    assert torch.equal(_pooled(_repeated(x)), x)
