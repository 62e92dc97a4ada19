"""VQ: nearest codes, the running-mean codebook in closed form, and its independence of how a batch is cut up."""

import math
from typing import Literal

import pytest
import torch
from tensors import normal
from torch import Tensor

from midway.tokenizers import clustering
from midway.tokenizers.base import usage
from midway.tokenizers.clustering import kmeans, nearest_code, squared_distance
from midway.tokenizers.codebook_statistics import highest_priority
from midway.tokenizers.vq import VQ, laplace

pytestmark = pytest.mark.usefixtures("one_thread")


def fixed(size: int = 16, dim: int = 4, restart_threshold: float = 0.0, decay: float = 0.9) -> VQ:
    """A VQ whose codebook counts as initialised, so that the data does not choose it."""
    quantizer = VQ(size, dim, decay=decay, restart_threshold=restart_threshold)
    quantizer.step.fill_(0)
    return quantizer


def with_dead_codes(size: int, dead: int, threshold: float = 1.0, count: float = 1e-3) -> VQ:
    """The last `dead` codes are far away and out of use."""
    quantizer = fixed(size, restart_threshold=threshold)
    quantizer.codebook[size - dead :] += 100
    quantizer.count[size - dead :] = count
    quantizer.total.copy_(quantizer.codebook * quantizer.count[:, None])
    return quantizer


def learn(quantizer: VQ, *batches: Tensor) -> None:
    """A step of training on each batch."""
    for batch in batches:
        quantizer.observe(quantizer(batch))
        quantizer.update()


def blobs(count: int, dim: int, per_blob: int) -> Tensor:
    return (6 * normal(count, 1, dim, seed=5) + normal(count, per_blob, dim)).reshape(-1, dim)


# Nearest code ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 20.0])
@pytest.mark.parametrize(("size", "dim"), [(1, 3), (512, 8), (1000, 64)])
def test_nearest_code_agrees_with_brute_force_in_float64(size: int, dim: int, offset: float) -> None:
    rows, codes = normal(3000, dim) + offset, normal(size, dim, seed=1) + offset
    distances = torch.cdist(rows.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = nearest_code(rows, codes)
    excess = distances.gather(1, found[:, None]).squeeze(1) - distances.amin(1)
    assert (found != distances.argmin(1)).double().mean() < 1e-3
    assert excess.max() < 1e-4


def test_ties_go_to_the_lowest_index() -> None:
    codes = normal(10, 4).repeat(3, 1)
    assert nearest_code(codes, codes).tolist() == [*range(10)] * 3
    assert nearest_code(torch.zeros(1, 1), torch.tensor([[1.0], [-1.0]])).tolist() == [0]


@pytest.mark.parametrize("scores", [1, 700, 64 * 1000])
def test_chunking_does_not_change_the_result(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, codes = normal(1000, 8), normal(64, 8, seed=1)
    whole = nearest_code(rows, codes)
    monkeypatch.setattr(clustering, "_SCORES_PER_CHUNK", scores)
    assert torch.equal(nearest_code(rows, codes), whole)
    assert nearest_code(rows[:0], codes).shape == (0,)


def test_reduced_precision_products_are_switched_off_and_on_again() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with clustering.full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


# Running means --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_codebook_follows_the_closed_form(normalize: bool) -> None:
    """van den Oord et al. 2017, app. A.1, in float64, one vector at a time: smoothed means, or unit vectors along the sums."""
    quantizer = VQ(16, 4, decay=0.9, eps=1e-5, restart_threshold=0.0, normalize=normalize)
    quantizer.step.fill_(0)
    codes = quantizer.codebook.double()
    count, total = torch.ones(16, dtype=torch.float64), codes.clone()
    for step in range(6):
        batch = 3 * normal(50 + 10 * step, 4, seed=step) + 1
        learn(quantizer, batch)
        hits, sums = torch.zeros_like(count), torch.zeros_like(total)
        for vector in batch.double():
            latent = vector / vector.norm() if normalize else vector
            nearest = (codes - latent).square().sum(1).argmin()
            hits[nearest] += 1
            sums[nearest] += latent
        count, total = 0.9 * count + 0.1 * hits, 0.9 * total + 0.1 * sums
        smoothed = (count + 1e-5) / (count.sum() + 16 * 1e-5) * count.sum()
        codes = total / (total.norm(dim=1) if normalize else smoothed)[:, None]
    torch.testing.assert_close(quantizer.codebook.double(), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.count.double(), count, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.codes(), quantizer.codebook)
    assert quantizer.step == 6


def test_total_count_is_a_geometric_series_and_smoothing_keeps_it() -> None:
    quantizer = fixed()
    learn(quantizer, *[normal(40, 4)] * 5)
    expected = 0.9**5 * 16 + (1 - 0.9**5) * 40
    assert quantizer.count.sum().item() == pytest.approx(expected, rel=1e-5)
    assert laplace(quantizer.count, 1e-2).sum().item() == pytest.approx(expected, rel=1e-5)


def test_a_fixed_batch_converges_to_its_cluster_means() -> None:
    quantizer = fixed(3, 2, decay=0.5)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]))
    quantizer.total.copy_(quantizer.codebook)
    batch = quantizer.codebook.repeat_interleave(20, 0) + normal(60, 2)
    learn(quantizer, *[batch] * 40)
    torch.testing.assert_close(quantizer.codebook, batch.view(3, 20, 2).mean(1), atol=1e-4, rtol=1e-4)


# Initialisation and restarts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(12, 12), (12, 30), (40, 40)])
def test_kmeans_is_as_good_as_scikit_learn(count: int, size: int) -> None:
    from sklearn.cluster import KMeans  # here, because the spawned processes import this module too

    rows = blobs(count, 4, 100)
    centres = kmeans(rows, size, 10, torch.Generator().manual_seed(0))
    best = KMeans(size, random_state=0).fit(rows.numpy()).score(rows.numpy())
    assert squared_distance(rows, centres).sum().item() < -1.05 * best


def test_start_initialises_the_codebook_from_data() -> None:
    rows = blobs(8, 4, 50)
    quantizer = VQ(8, 4)
    assert not quantizer.initialised
    quantizer.start(rows)
    assert quantizer(rows).losses["commitment"] < 1.3
    assert quantizer.initialised
    assert quantizer.count.tolist() == [1.0] * 8
    assert quantizer.step == 0
    spatial = VQ(8, 4)
    spatial.start(rows.view(25, 16, 4).movedim(-1, 1))
    assert equal(learned(spatial), learned(quantizer))
    batch = VQ(8, 4, init="batch")
    batch.start(rows)
    assert all((code == rows).all(1).any() for code in batch.codebook)


@pytest.mark.parametrize("iterations", [0, 10])
@pytest.mark.parametrize(
    ("count", "times", "size"), [(1, 1, 7), (5, 1, 5), (5, 1, 64), (5, 200, 5), (5, 200, 64), (1, 500, 3), (7, 9, 60)]
)
@pytest.mark.parametrize("spherical", [False, True])
def test_no_more_different_vectors_than_codes_are_the_codes(
    count: int, times: int, size: int, spherical: bool, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clustering, "nearest_code", lambda *_: pytest.fail("a search that cannot change anything"))
    rows = normal(count, 4)
    rows = rows / rows.norm(dim=1, keepdim=True) if spherical else rows
    centres = kmeans(rows.repeat(times, 1), size, iterations, torch.Generator().manual_seed(0), spherical)
    assert centres.shape == (size, 4)
    hits = (centres[:, None] == rows).all(2).sum(0)
    assert hits.sum() == size
    assert hits.max() - hits.min() <= 1


def test_kmeans_ends_where_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(rows: Tensor, codes: Tensor) -> Tensor:
        calls.append(1)
        return nearest_code(rows, codes)

    monkeypatch.setattr(clustering, "nearest_code", counting)
    rows = torch.tensor([[0.0], [1.0], [100.0], [101.0]]).repeat(50, 1)
    centres = kmeans(rows, 2, 1000, torch.Generator().manual_seed(0))
    assert centres.flatten().sort().values.tolist() == [0.5, 100.5]
    assert len(calls) < 20


def test_fewer_vectors_than_codes_still_initialise() -> None:
    quantizer = VQ(64, 4)
    quantizer.start(normal(10, 4))
    assert quantizer(normal(10, 4)).losses["commitment"] < 1e-10
    with pytest.raises(ValueError, match="empty"):
        VQ(4, 4).start(torch.zeros(0, 4))


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_restart_revives_dead_codes(threshold: float) -> None:
    quantizer = fixed(64, 4, restart_threshold=threshold, decay=0.99)
    quantizer.codebook[8:] += 100
    quantizer.total[8:] += 100
    learn(quantizer, *(normal(512, 4, seed=step) for step in range(30)))
    share = usage(quantizer(normal(4096, 4, seed=99)).counts)
    assert share == 0.125 if threshold == 0 else share > 0.9


@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_restarted_codes_are_vectors_of_the_batch_and_live_ones_stay(threshold: float) -> None:
    quantizer, plain = (with_dead_codes(32, 16, each, 0.25) for each in (threshold, 0.0))
    rows = normal(300, 4)
    for each in (quantizer, plain):
        learn(each, rows)
    dead = plain.count < threshold
    assert dead.sum() >= 16
    torch.testing.assert_close(quantizer.codebook[~dead], plain.codebook[~dead], atol=1e-4, rtol=1e-4)
    assert torch.cdist(quantizer.codebook[dead], rows).amin(1).max() < 1e-3
    assert quantizer.count[dead].tolist() == [threshold] * int(dead.sum())
    assert len(quantizer.codebook.unique(dim=0)) == 32


def test_no_more_codes_restart_than_there_are_vectors() -> None:
    quantizer = with_dead_codes(32, 16)
    learn(quantizer, normal(4, 4))
    limit = 4 / (4 * 32)
    assert (quantizer.count[16:] == limit).sum() == 4
    assert quantizer.count[16:].max() == limit


def test_small_batches_do_not_restart_the_whole_codebook() -> None:
    """With 16 vectors for 64 codes every code is hit less than once a step."""
    quantizer = fixed(64, 4, restart_threshold=1.0, decay=0.99)
    before = quantizer.codebook.clone()
    learn(quantizer, *(normal(16, 4, seed=step) for step in range(20)))
    assert (quantizer.codebook - before).norm(dim=1).median() < 0.5


# Skipped and broken steps ---------------------------------------------------------------------------------------------

LEARNED = ("codebook", "count", "total")


def learned(quantizer: VQ) -> list[Tensor]:
    return [quantizer.state_dict()[name].clone() for name in LEARNED]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("z", [torch.full((4, 4), 2e38), torch.zeros(0, 4, 3)], ids=["overflow", "none"])
def test_a_step_whose_sum_overflows_or_is_of_nothing_changes_nothing(z: Tensor) -> None:
    quantizer = fixed(restart_threshold=1.0)
    before = learned(quantizer)
    quantizer.observe(quantizer(z, z))
    quantizer.update()
    assert equal(learned(quantizer), before)


@pytest.mark.parametrize("init", ["kmeans", "batch"])
@pytest.mark.parametrize("spoil", [math.nan, math.inf])
def test_initialisation_uses_finite_vectors_only(init: Literal["kmeans", "batch"], spoil: float) -> None:
    rows = blobs(8, 4, 50)
    spoilt = rows.repeat_interleave(2, 0)
    spoilt[::2, 1] = spoil
    quantizer, expected = VQ(8, 4, init=init), VQ(8, 4, init=init)
    quantizer.start(spoilt)
    expected.start(rows)
    assert equal(learned(quantizer), learned(expected))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_without_finite_vectors_the_codebook_stays_as_it_was_drawn(value: float) -> None:
    quantizer = VQ(8, 4)
    before = learned(quantizer)
    quantizer.start(torch.full((20, 4), value))
    assert quantizer.initialised
    assert equal(learned(quantizer), before)


def test_vectors_whose_sum_overflows_leave_a_finite_codebook() -> None:
    quantizer = VQ(8, 4)
    quantizer.start(torch.full((20, 4), 2e38))
    assert all(value.isfinite().all() for value in learned(quantizer))


# Which vectors codes restart from -------------------------------------------------------------------------------------


def test_codes_restart_from_the_vectors_of_largest_noise() -> None:
    quantizer = with_dead_codes(32, 8)
    z, noise = normal(10, 4, 3, 2), normal(10, 4, 3, 2, seed=1)
    quantizer.observe(quantizer(z, noise))
    quantizer.update()
    rows = z.movedim(1, -1).reshape(-1, 4)[noise[:, 0].flatten().argsort(descending=True)]
    torch.testing.assert_close(quantizer.total[24:], rows[:8] * quantizer.count[24:, None])
    with pytest.raises(ValueError, match="noise"):
        quantizer.observe(quantizer(z, noise[:1]))


def test_equal_priorities_are_ordered_by_the_vectors_not_by_their_places() -> None:
    candidates = torch.cat([normal(40, 3), torch.tensor([0.25, 0.75, 1.0, -1.0]).repeat_interleave(10)[:, None]], 1)
    best = highest_priority(candidates, 35)
    for seed in range(5):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(highest_priority(candidates[order], 35)[:30], best[:30])
    assert best[:, -1].tolist() == [1.0] * 10 + [0.75] * 10 + [0.25] * 10 + [-1.0] * 5
