"""What lies between logits and a token: truncated laws, schedules, orders, and random numbers by seed."""

import math

import pytest
import torch
from scipy import stats
from tensors import normal

from midway.gen.core import randomness
from midway.gen.core.errors import UsageError
from midway.gen.priors.decoding import DECAYS, Decay, Decoding, counts, guided, halton_order, law_of
from midway.gen.priors.draws import SeededDraws


def _law(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities by loops."""
    p = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[: top_k or None]
    total, nucleus = sum(p[i] for i in kept), []
    for i in kept:
        nucleus.append(i)
        if sum(p[j] for j in nucleus) / total >= top_p:
            break
    total = sum(p[i] for i in nucleus)
    return [p[i] / total if i in nucleus else 0 for i in range(len(p))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 4, 9])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.9, 1.0])
def test_temperature_then_top_k_then_top_p(temperature: float, top_k: int, top_p: float) -> None:
    logits = 2 * normal(5, 7, dtype=torch.float64)
    found = law_of(logits, Decoding(temperature=temperature, top_k=top_k, top_p=top_p)).exp()
    expected = [_law(row, temperature, top_k, top_p) for row in logits.tolist()]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-14)


def test_the_least_temperatures_are_the_most_probable_value() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -math.inf]])
    assert law_of(logits, Decoding(temperature=0)).exp().tolist() == [[0, 1, 0, 0]]
    for temperature in (1e-6, 1e-30, 5e-324):
        assert law_of(logits, Decoding(temperature=temperature)).exp().tolist() == [[0, 0.5, 0.5, 0]]


def test_guidance_is_an_extrapolation_from_the_logits_without_a_class() -> None:
    logits = normal(6, 2, 4, dtype=torch.float64)
    for scale in (0.0, 1.0, 3.5, -1.0):
        assert torch.allclose(guided(logits, scale), logits[3:] + scale * (logits[:3] - logits[3:]), atol=1e-13)


def test_the_scale_of_guidance_rises_from_1() -> None:
    assert [Decoding(guidance=3).scale(share) for share in (0, 0.5, 1)] == [3, 3, 3]
    assert [Decoding(guidance=3, ramp=2).scale(share) for share in (0, 0.5, 1)] == [1, 1.5, 3]
    assert [Decoding(guidance=w).copies for w in (1, 1.5, 0)] == [1, 2, 2]


@pytest.mark.parametrize("decay", DECAYS)
def test_every_evaluation_decides_a_token_and_all_are_decided(decay: Decay) -> None:
    share = {
        "cosine": lambda u: math.cos(math.pi * u / 2),
        "arccos": lambda u: 2 / math.pi * math.acos(u),
        "linear": lambda u: 1 - u,
    }[decay]
    for length in range(1, 65):
        for steps in range(1, length + 1):
            found = counts(decay, length, steps)
            assert len(found) == steps and sum(found) == length and min(found) >= 1
            left = length
            for s, count in enumerate(found, 1):
                free = steps - s < left - count and count > 1  # not held up by "at least one each"
                left -= count
                if free:
                    assert left == math.floor(length * share(s / steps) + 1e-9)


def test_known_schedules() -> None:
    assert counts("linear", 12, 4) == [3, 3, 3, 3]
    assert counts("cosine", 256, 8)[:4] == [5, 15, 24, 31]  # 256 cos(pi s / 16) = 251.08, 236.5, 212.9, 181.0
    assert counts("arccos", 256, 8)[:3] == [21, 21, 21]  # 256 arccos(s / 8) 2 / pi = 235.6, 214.8, 193.2
    assert all(counts(decay, 9, 9) == [1] * 9 for decay in ("cosine", "arccos", "linear"))
    for steps in (0, 10):
        with pytest.raises(ValueError, match=f"{steps} evaluations for 9 tokens: .* give 1 to 9"):
            counts("cosine", 9, steps)


def test_halton_points_visit_every_place_once() -> None:
    for rows in range(1, 13):
        for columns in range(1, 13):
            assert sorted(halton_order(rows, columns)) == list(range(rows * columns))


def test_the_first_halton_points() -> None:
    """(1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9), (3/8, 2/9), all of them edges of a grid of 8 x 9."""
    places = [(4, 3), (2, 6), (6, 1), (1, 4), (5, 7), (3, 2)]
    assert list(halton_order(8, 9)[:6]) == [row * 9 + column for row, column in places]
    assert list(halton_order(1, 9)[:5]) == [3, 6, 1, 4, 7]


def test_halton_points_are_spread() -> None:
    """Of the first 16 of 8 x 8 places each quarter of the grid has 4."""
    quarters = [(place // 8 // 4, place % 8 // 4) for place in halton_order(8, 8)[:16]]
    assert max(quarters.count(quarter) for quarter in set(quarters)) <= 5 and len(set(quarters)) == 4


def test_draws_have_the_frequencies_of_the_law() -> None:
    law = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0], dtype=torch.float64)
    rows, places = 4000, torch.tensor([3, 0])
    draws = SeededDraws(torch.arange(rows))
    found = draws.categorical(law.log().expand(rows, 2, -1), places.expand(rows, -1), 0)
    assert found.shape == (rows, 2) and found.dtype == torch.int64
    kept = law > 0
    for column in found.unbind(1):
        frequencies = column.bincount(minlength=6)
        assert frequencies[1] == frequencies[5] == 0
        assert stats.chisquare(frequencies[kept], rows * law[kept]).pvalue > 1e-3
    pairs = (found[:, 0] * 6 + found[:, 1]).bincount(minlength=36).view(6, 6)[kept][:, kept]
    assert (
        stats.chisquare(pairs.flatten(), rows * torch.outer(law[kept], law[kept]).flatten()).pvalue > 1e-3
    )  # places are independent of each other


def test_draws_are_functions_of_seed_place_digit_and_attempt() -> None:
    law, seeds = normal(6, 3, 50).log_softmax(-1), torch.tensor([4, 8, 15, 16, 23, 42])
    places = torch.tensor([[2, 7, 0]] * 6)
    whole = SeededDraws(seeds).categorical(law, places, 1, 2)
    for row in range(6):
        for column in range(3):
            one = SeededDraws(seeds[row : row + 1])
            at = law[row : row + 1, column : column + 1], places[row : row + 1, column : column + 1]
            assert one.categorical(*at, 1, 2).item() == whole[row, column]
    others = [SeededDraws(seeds).categorical(law, places, *at) for at in ((0, 2), (1, 0), (1, 3))]
    assert all(bool((other != whole).any()) for other in others)
    u = randomness.uniform(0, "prior digit 1", 2, seeds, (8,)).gather(1, places)
    below = law.double().exp().cumsum(-1)
    assert bool((below.gather(-1, whole[..., None]).squeeze(-1) > u - 1e-6).all())


def test_settings_that_draw_nothing() -> None:
    with pytest.raises(ValueError, match="rule is 'raster'; choose one of causal, random, halton, certain, maskgit"):
        Decoding("raster")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="decay is 'square'; choose one of cosine, arccos, linear"):
        Decoding(decay="square")  # pyright: ignore[reportArgumentType]
    for wrong in (
        {"top_p": 0},
        {"top_p": 1.1},
        {"temperature": -1},
        {"top_k": -1},
        {"steps": 0},
        {"guidance": math.nan},
    ):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} is"):
            Decoding(**wrong)  # pyright: ignore[reportArgumentType]
