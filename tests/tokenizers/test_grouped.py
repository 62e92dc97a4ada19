"""Product quantization: each group is its base on its own channels; exact inverses, one update for all."""

import itertools
from typing import Any

import pytest
import torch
from tensors import grad, normal

from midway.tokenizers.fsq import FSQ
from midway.tokenizers.grouped import Grouped
from midway.tokenizers.quantizers import grouped

pytestmark = pytest.mark.usefixtures("one_thread")


def vq(groups: int = 2, size: int = 16, dim: int = 3, **options: Any) -> Grouped:
    """Grouped VQ whose codebooks begin at Gaussian data."""
    quantizer = grouped({"type": "vq", "codebook_size": size, "dim": dim, **options}, groups)
    quantizer.start(normal(20 * size, groups * dim, seed=77))
    return quantizer


@pytest.mark.parametrize(
    "base", [{"type": "vq", "codebook_size": 1000, "dim": 3}, {"type": "fsq", "levels": [64] * 10}]
)
def test_large_codebooks_are_inverted(base: dict[str, Any]) -> None:
    quantizer = grouped(base, 4)
    size = quantizer.codebook_size or 0
    indices = torch.randint(0, size, (2, 500, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.codes_to_indices(quantizer.indices_to_codes(indices)), indices)


def test_the_nearest_of_all_tuples_is_found() -> None:
    quantizer = vq(2, 6).eval()
    tuples = torch.tensor(list(itertools.product(range(6), repeat=2))).unsqueeze(0)
    codes = quantizer.indices_to_codes(tuples)[0].T.double()
    z = normal(200, 6)
    nearest = torch.cdist(z.double(), codes).argmin(1)
    assert torch.equal(quantizer(z).indices, tuples[0, nearest])


def test_gradient_is_straight_through_plus_the_commitment_over_all_channels() -> None:
    quantizer = vq(3)
    z, weight = normal(6, 9, 5).requires_grad_(), normal(6, 9, 5, seed=1)
    out = quantizer(z)
    ((out.codes * weight).sum() + out.loss).backward()
    error = z.detach().double() - out.codes.detach().double()
    torch.testing.assert_close(grad(z).double(), weight + 2 * 0.25 * error / z.numel(), atol=1e-6, rtol=1e-5)
    assert out.losses["commitment"].item() == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(0.25 * error.square().mean().item(), rel=1e-5)


def test_latents_are_those_of_each_group() -> None:
    z, base = normal(2, 6, 9), {"type": "fsq", "levels": [5, 4, 3]}
    assert torch.equal(grouped(base, 2).latents(z), FSQ([5, 4, 3] * 2).latents(z))


def test_codebooks_are_drawn_apart_and_other_shapes_raise() -> None:
    drawn = grouped({"type": "vq", "codebook_size": 4, "dim": 2}, 2).state_dict()
    assert not torch.equal(drawn["parts.0.codebook"], drawn["parts.1.codebook"])
    quantizer = vq(2)
    for indices in (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"\(B, \*S, 2\)"):
            quantizer.indices_to_codes(indices)
