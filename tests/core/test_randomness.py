"""Counter-based randomness: SplitMix64 by plain integers, exact invariance, distribution, independence."""

import hashlib
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.core.randomness import keep, normal, permutation, uniform, words
from midway.gen.training.batches import Context

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _reference(seed: int, purpose: str, step: int, sample: int, count: int) -> list[int]:
    """`words` of one sample in Python integers, as signed 64-bit."""
    key = 0
    for part in (seed, int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little"), step):
        key = _mix((key + (part + 1) * GOLDEN) & MASK)
    key = _mix((key + sample * GOLDEN) & MASK)
    unsigned = [_mix((key + (j + 1) * GOLDEN) & MASK) for j in range(count)]
    return [value - 2**64 if value >> 63 else value for value in unsigned]


def _ids(count: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + count)


# ---- the words ----


def test_the_finaliser_is_that_of_splitmix64() -> None:
    """The first outputs of the published generator from state 1234567 (Vigna's splitmix64.c)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [_mix((1234567 + (j + 1) * GOLDEN) & MASK) for j in range(4)] == published
    state = torch.tensor([randomness._signed(1234567 + (j + 1) * GOLDEN) for j in range(4)])
    assert [value & MASK for value in randomness._mix(state).tolist()] == published


@pytest.mark.parametrize("seed", [0, 1, -7, 2**40 + 3])
def test_the_ways_of_the_cpu_and_of_other_devices_agree_bit_for_bit(seed: int) -> None:
    ids = torch.tensor([0, 1, 63, 2**40, 2**62, -1])
    key = randomness._key(seed, "noise", 12345678901)
    array, tensor = randomness._words_array(key, ids, 7), randomness._words_tensor(key, ids, 7)
    assert torch.equal(torch.from_numpy(array.view(np.int64)), tensor)
    assert np.array_equal(randomness._unit_array(array), randomness._unit_tensor(tensor).numpy())


@pytest.mark.parametrize("plain", [True, False])
def test_several_purposes_at_once_are_each_of_them_alone(monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    """On the CPU and elsewhere."""
    ids = torch.tensor([0, 5, 2**40, -1])
    alone = [uniform(3, purpose, 7, ids) for purpose in ("time", "label", "flip")]
    if not plain:
        monkeypatch.setattr(randomness, "_is_plain", lambda _: False)
    found = Context(3, 7, ids).uniforms("time", "label", "flip")
    assert len(found) == 3
    assert all(map(torch.equal, found, alone))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, -1])
@pytest.mark.parametrize("step", [0, 1, 10**6])
def test_words_are_those_of_plain_integers(seed: int, step: int) -> None:
    ids = [0, 1, 17, 2**40, 2**62]
    got = words(seed, "noise", step, torch.tensor(ids), 5)
    assert got.tolist() == [_reference(seed, "noise", step, i, 5) for i in ids]


def test_a_shorter_draw_is_the_beginning_of_a_longer_one() -> None:
    assert torch.equal(words(3, "a", 2, _ids(4), 3), words(3, "a", 2, _ids(4), 9)[:, :3])


# ---- invariance ----


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5, 5), (4, 8, 8)])
def test_a_sample_is_the_same_alone_in_any_batch_and_in_any_order(shape: tuple[int, ...]) -> None:
    """Bit for bit: a batch-dependent kernel or a stream's position would show here."""
    total = 131
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    for draw in (normal, uniform, partial(keep, probability=0.7)):
        whole = draw(7, "noise", 3, _ids(total), shape)
        assert torch.equal(draw(7, "noise", 3, order, shape), whole[order])
        for size in (1, 2, 3, 7, 16, 64, 130):
            parts = torch.cat([draw(7, "noise", 3, part, shape) for part in _ids(total).split(size)])
            assert torch.equal(parts, whole)


def test_shapes_and_types() -> None:
    assert uniform(0, "t", 0, _ids(5)).shape == (5,)
    assert uniform(0, "t", 0, _ids(5), (2, 3)).dtype == torch.float64
    assert normal(0, "t", 0, _ids(5), (3, 1)).shape == (5, 3, 1)
    assert normal(0, "t", 0, _ids(5), (3, 1)).dtype == torch.float32
    assert normal(0, "t", 0, _ids(0), (3,)).shape == (0, 3)


# ---- distribution ----


def test_uniform_moments_and_kolmogorov_smirnov() -> None:
    u = uniform(1, "time", 5, _ids(2000), (100,)).flatten().numpy()
    n = len(u)
    for power in (1, 2, 3, 4):
        mean, variance = 1 / (power + 1), 1 / (2 * power + 1) - 1 / (power + 1) ** 2
        assert abs((u**power).mean() - mean) < 4 * math.sqrt(variance / n)
    assert stats.kstest(u, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("shape", [(300,), (301,)], ids=["even", "odd"])
def test_normal_moments_and_kolmogorov_smirnov(shape: tuple[int, ...]) -> None:
    """Both halves of Box-Muller, together and apart."""
    x = normal(1, "noise", 5, _ids(2000), shape).double().numpy()
    half = (shape[0] + 1) // 2
    for part in (x.ravel(), x[:, :half].ravel(), x[:, half:].ravel()):
        for power in (1, 2, 3, 4, 6):
            mean = 0.0 if power % 2 else float(math.prod(range(1, power, 2)))
            variance = math.prod(range(1, 2 * power, 2)) - mean**2
            assert abs((part**power).mean() - mean) < 4 * math.sqrt(variance / len(part))
        assert stats.kstest(part, "norm").pvalue > 1e-3


def test_the_extreme_words_give_numbers_inside_the_open_interval() -> None:
    """ln u and logit u are finite for every word, though 2^53 - 1/2 rounds to 2^53."""
    bits = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    unit = randomness._unit_tensor(bits)
    assert np.array_equal(randomness._unit_array(bits.numpy().view(np.uint64)), unit.numpy())
    assert bool(((unit > 0) & (unit < 1)).all())


# ---- masks ----


@pytest.mark.parametrize("probability", [2.0**-64, 0.1, 0.5, 0.9, 1 - 2.0**-53, 1.0])
def test_a_mask_selects_the_lowest_words_in_a_share_of_its_probability(probability: float) -> None:
    """As a threshold on signed words in plain integers: a share of exactly `probability` of all 2^64."""
    share = int(probability * 2**64)
    expected = [[w + 2**63 < share for w in _reference(5, "drop", 2, i, 60)] for i in range(40)]
    got = keep(5, "drop", 2, _ids(40), (3, 4, 5), probability)
    assert got.dtype == torch.bool
    assert got.tolist() == torch.tensor(expected).view(40, 3, 4, 5).tolist()
    assert torch.equal(Context(5, 2, _ids(40)).keep("drop", (3, 4, 5), probability), got)


@pytest.mark.parametrize("probability", [0.01, 0.3, 0.5, 0.9])
def test_the_share_kept_is_within_statistics_over_all_and_in_every_place(probability: float) -> None:
    kept = keep(1, "drop", 5, _ids(4000), (10, 10), probability).double()
    deviation = math.sqrt(probability * (1 - probability))
    assert abs(kept.mean().item() - probability) < 4 * deviation / math.sqrt(kept.numel())
    assert (kept.mean(0) - probability).abs().max() < 5 * deviation / math.sqrt(len(kept))


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.5, math.nan])
def test_an_invalid_probability_raises(probability: float) -> None:
    with pytest.raises(ValueError, match=f"probability is {probability}; give a number in"):
        keep(0, "drop", 0, _ids(2), (3,), probability)


# ---- independence ----


def test_purpose_step_seed_and_sample_give_unrelated_numbers() -> None:
    """All pairwise correlations of 24 streams stay under 4.5 standard errors, also between squares."""
    streams = [
        normal(seed, purpose, step, torch.tensor([sample]), (20_000,))[0]
        for seed in (0, 1)
        for purpose in ("noise", "time", "noise2")
        for step in (0, 1)
        for sample in (0, 1)
    ]
    for x in (torch.stack(streams).double(), torch.stack(streams).double().square()):
        correlation = torch.corrcoef(x).fill_diagonal_(0)
        assert correlation.abs().max() < 4.5 / math.sqrt(x.shape[1])


def test_neighbouring_entries_of_one_sample_are_independent() -> None:
    """A pair of Box-Muller shares its radius: neither the values nor their squares may show it."""
    x = normal(0, "noise", 0, _ids(20_000), (6,)).double()
    for values in (x, x.square(), x.abs()):
        correlation = torch.corrcoef(values.T).fill_diagonal_(0)
        assert correlation.abs().max() < 4.5 / math.sqrt(len(x))


def test_consecutive_samples_and_steps_are_independent() -> None:
    u = torch.stack([uniform(0, "time", step, _ids(2000)) for step in range(20)])
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(a.numel())
        cells, *_ = np.histogram2d(a.flatten().numpy(), b.flatten().numpy(), bins=8, range=[[0, 1]] * 2)
        assert stats.chisquare(cells.ravel()).pvalue > 1e-3


def test_no_two_keys_collide() -> None:
    """4 seeds x 4 steps x 4 purposes x 500 samples: 32,000 first words, all different."""
    first = [words(s, p, t, _ids(500), 1) for s in range(4) for t in range(4) for p in ("a", "b", "order", "noise")]
    assert len(torch.cat(first).unique()) == 4 * 4 * 4 * 500


# ---- permutations ----


@pytest.mark.parametrize("size", [1, 2, 10, 1437])
def test_a_permutation_holds_every_item_once(size: int) -> None:
    for epoch in range(3):
        assert torch.equal(permutation(0, "order", epoch, size).sort().values, torch.arange(size))


def test_permutations_differ_by_epoch_seed_and_purpose_and_repeat_exactly() -> None:
    found = [permutation(s, p, e, 50) for s in (0, 1) for p in ("order", "split") for e in (0, 1, 2)]
    assert len({tuple(order.tolist()) for order in found}) == len(found)
    assert torch.equal(found[0], permutation(0, "order", 0, 50))


def test_every_item_visits_every_place_equally_often() -> None:
    size, epochs = 6, 3000
    places = torch.stack([permutation(0, "order", epoch, size) for epoch in range(epochs)])
    counts = torch.stack([(places == item).sum(0) for item in range(size)]).double()
    statistic = ((counts - epochs / size).square() / (epochs / size)).sum().item()
    assert stats.chi2.sf(statistic, (size - 1) ** 2) > 1e-3


def test_numbers_at_places_are_those_of_the_whole_row() -> None:
    ids = torch.tensor([5, 0, 2**61, 3])
    places = torch.tensor([[0, 6], [6, 6], [3, 1], [5, 2]])
    expected = uniform(7, "noise", 3, ids, (7,)).gather(1, places)
    assert torch.equal(randomness.uniform_at(7, "noise", 3, ids, places), expected)
