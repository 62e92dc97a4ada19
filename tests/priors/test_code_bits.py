"""Bits of codes: independent codes by enumeration, priors whatever their batches, and in which order they stand."""

import math

import pytest
import torch

from midway.gen.priors.config import Kind, PriorConfig
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.likelihood import bits_name, code_bits, independent_bits
from midway.gen.priors.registry import make_prior
from midway.gen.training.batches import CodeBatch

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUT = CodeLayout(((2, 2),), ((3, 2), (5,)))


def codes(count: int) -> CodeBatch:
    generator = torch.Generator().manual_seed(0)
    digits = [torch.randint(0, size, (count, 4), generator=generator) for size in LAYOUT.sizes]
    return CodeBatch(torch.stack(digits, -1), torch.arange(count) % 3)


def test_independent_codes_are_frequencies_counted_once_more() -> None:
    train, held_out = codes(20).tokens, codes(31).tokens[20:]
    found = independent_bits(train.split(7), held_out, LAYOUT)
    for bits, image in zip(found.tolist(), held_out, strict=True):
        expected = 0.0
        for place in range(4):
            for digit, size in enumerate(LAYOUT.sizes):
                count = int((train[:, place, digit] == image[place, digit]).sum())
                expected -= math.log2((count + 1) / (20 + size))
        assert bits == pytest.approx(expected, rel=1e-12)
    assert independent_bits([], held_out, LAYOUT).tolist() == pytest.approx([LAYOUT.bits] * 11)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_bits_of_a_prior_do_not_depend_on_batches(kind: Kind) -> None:
    torch.manual_seed(0)
    prior = make_prior(PriorConfig(kind, width=16, depth=1, heads=2), LAYOUT, 3).eval()
    with torch.no_grad():
        for weight in (p for p in prior.parameters() if p.dim() > 1):
            weight.mul_(10)
    found, again = (code_bits(prior, codes(11), batch_size=size) for size in (11, 4))
    assert found.dtype == torch.float64 and torch.allclose(found, again, atol=1e-4)
    assert found.std() > 1  # of laws that are far from uniform
    few = code_bits(prior, codes(11), masks=1)
    assert torch.allclose(few, found) == (kind == "causal")
    assert bits_name(prior) == ("exact" if kind == "causal" else "bound, 4 mask(s) an image")
