"""FSQ: the bijection, integer exactness, the bounded map and its gradient, and independence of the caller's dtype."""

import itertools
import math
import random

import pytest
import torch
from tensors import grad, normal

from midway.tokenizers.base import bits_per_image, perplexity, straight_through, usage
from midway.tokenizers.fsq import FSQ, FSQ_LEVELS, Form

FORMS: tuple[Form, ...] = ("tanh", "sigmoid")
LEVEL_SETS = [*FSQ_LEVELS.values(), (27, 27), (3, 4, 5), (16, 5, 3)]
WITH_TWO = [(2, 2, 2), (2, 9, 4)]
ODD = [(5, 3), (27, 27), (17, 17, 17), (7, 5, 5, 5, 5)]
CASES: list[tuple[tuple[int, ...], Form, bool]] = [
    *((levels, form, False) for levels in LEVEL_SETS for form in FORMS),
    *((levels, "sigmoid", False) for levels in WITH_TWO),
    *((levels, "tanh", True) for levels in LEVEL_SETS + WITH_TWO),
    *((levels, "ifsq", False) for levels in ODD),
    *((levels, "fsp", False) for levels in LEVEL_SETS + WITH_TWO),
]


@pytest.mark.parametrize(("levels", "form", "symmetric"), CASES)
def test_indices_and_codes_are_a_bijection_over_the_whole_codebook(
    levels: tuple[int, ...], form: Form, symmetric: bool
) -> None:
    quantizer = FSQ(levels, form, symmetric)
    indices = torch.arange(math.prod(levels)).view(1, -1)
    codes = quantizer.indices_to_codes(indices)
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    assert len(codes[0].T.unique(dim=0)) == quantizer.codebook_size
    assert torch.equal(quantizer.snap(codes), codes)


@pytest.mark.parametrize(("levels", "form", "symmetric"), CASES)
def test_every_code_is_reached_from_the_real_line(levels: tuple[int, ...], form: Form, symmetric: bool) -> None:
    quantizer = FSQ(levels, form, symmetric)
    line = torch.linspace(-12, 12, 4001)
    digits = quantizer.latents_to_digits(quantizer.latents(line.repeat(len(levels), 1)[None]))[0]
    for channel, level in zip(digits, levels, strict=True):
        assert channel.unique().tolist() == list(range(level))
        assert bool((channel.diff() >= 0).all())


def test_first_channel_is_the_least_significant_digit() -> None:
    quantizer = FSQ([3, 4, 5], "sigmoid")
    digits = torch.tensor(list(itertools.product(range(3), range(4), range(5)))).T[None]
    expected = digits[0, 0] + 3 * digits[0, 1] + 12 * digits[0, 2]
    assert torch.equal(quantizer.digits_to_indices(digits)[0], expected)


@pytest.mark.parametrize(
    "levels",
    [
        [2] * 27,
        [2] * 40,
        [2] * 62,
        [16] * 10,
        [16] * 15 + [4],
        [8] * 20 + [3],
        [8, 7, 5] * 7,
        [1021, 1031, 1033, 1049],
        [65536, 65535, 65533, 8191],
    ],
)
@pytest.mark.parametrize(("form", "symmetric"), [("sigmoid", False), ("tanh", True)])
def test_huge_codebooks_are_exact_integers(levels: list[int], form: Form, symmetric: bool) -> None:
    """A float32 sum is wrong beyond 2**24 codes. 1e5 digits at random against Python's integers."""
    quantizer = FSQ(levels, form, symmetric)
    source = random.Random(0)
    tokens = [[source.randrange(level) for level in levels] for _ in range(100_000 // len(levels))]
    tokens += [[0] * len(levels), [level - 1 for level in levels]]
    expected = [sum(d * math.prod(levels[:i]) for i, d in enumerate(token)) for token in tokens]
    codes = quantizer.digits_to_codes(torch.tensor(tokens).T[None])
    indices = quantizer.codes_to_indices(codes)
    assert indices[0].tolist() == expected
    assert torch.equal(quantizer.indices_to_codes(indices), codes)
    assert quantizer(codes).counts is None


def test_straight_through_is_exact_forward_and_identity_backward() -> None:
    carrier = (1e4 * normal(1000)).requires_grad_()
    value, weight = normal(1000, seed=1), normal(1000, seed=2)
    out = straight_through(value, carrier)
    (out * weight).sum().backward()
    assert torch.equal(out, value)
    assert torch.equal(grad(carrier), weight)


def test_counts_usage_and_perplexity() -> None:
    quantizer = FSQ([8, 5, 5, 5])
    counts = quantizer(normal(8, 4, 16, 16)).counts
    assert counts.sum() == 8 * 256
    assert counts.shape == (1000,)
    assert usage(torch.tensor([1, 0, 3, 0])) == 0.5
    assert perplexity(torch.tensor([3, 0, 3, 0])) == pytest.approx(2)
    assert perplexity(torch.ones(64, dtype=torch.int64)) == pytest.approx(64)
    assert bits_per_image(64, 1024) == 640
    with pytest.raises(ValueError, match="at least one batch"):
        perplexity(torch.zeros(3))


@pytest.mark.parametrize(
    ("levels", "form", "message"),
    [
        ([], "tanh", "at least one"),
        ([8, 1], "tanh", "from 2"),
        ([8.0, 5], "tanh", "integer"),
        ([65537], "tanh", "to 65536"),
        ([2, 8], "tanh", "symmetric=True, or form='sigmoid'"),
        ([65536] * 3 + [16385], "tanh", r"up to 2\*\*62"),
        ([8], "clamp", "choose"),
        ([17, 8], "ifsq", "odd"),
    ],
)
def test_unusable_settings_raise(levels: list[int], form: Form, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FSQ(levels, form)
    assert FSQ([65536] * 3 + [16384]).codebook_size == 2**62
