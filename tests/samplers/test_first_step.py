"""The exact first step of a flow: known means in place of the first evaluation, and solvers that do not see the shift."""

from collections.abc import Callable

import pytest
import torch
from oracles import Mixture, mixture, uneven_grid
from torch import Tensor

from midway.samplers import grids
from midway.samplers.first_step import centered, class_means, remove_mean, restore_mean
from midway.samplers.guidance import ConditionalField, TimedField, at_time, classifier_free, interval
from midway.samplers.prediction import Field, Prediction, expand
from midway.samplers.sample import EvaluationCounter, NoiseSource, sample
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule
from midway.samplers.solvers import SOLVERS, ddim, euler
from midway.samplers.table import Table

SCHEDULES = [Linear(), Cosine(), VP(), EDM(sigma_max=5.0)]
names = [type(s).__name__ for s in SCHEDULES]
MEANS = torch.tensor([[0.7, -1.5], [2.0, 0.25]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 0, 1])


def _noise(count: int = 5) -> Tensor:
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _mean(data: Mixture) -> Tensor:
    return data.weights @ data.means


def _of_class(label: int) -> Mixture:
    """The mixture of the oracles, moved: classes whose means are not 0."""
    data = mixture()
    return Mixture(data.weights, data.means + MEANS[label], data.stds)


def _labelled(schedule: Schedule) -> ConditionalField:
    """A conditional field: classes 0 and 1, and 2 for both together in equal parts."""
    zero, one = _of_class(0), _of_class(1)
    both = Mixture(torch.cat([zero.weights, one.weights]) / 2, torch.cat([zero.means, one.means]), zero.stds.repeat(2))
    fields = [data.field(schedule) for data in (zero, one, both)]

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Prediction:
        x0 = torch.stack([field(x, t).x0 for field in fields])[labels, torch.arange(len(x))]
        return Prediction(x0, (x - expand(schedule.alpha(t), x) * x0) / expand(schedule.sigma(t), x))

    return network


def _class_mean(label: int) -> Tensor:
    return torch.stack([_mean(_of_class(0)), _mean(_of_class(1))]).mean(0) if label == 2 else _mean(_of_class(label))


def _shifted(
    field: Field, table: Table, schedule: Schedule, x: Tensor, mean: Tensor, noise: NoiseSource | None
) -> Tensor:
    moved = sample(centered(field, schedule, mean), table, remove_mean(x, schedule, table.grid[0], mean), noise)
    return restore_mean(moved, schedule, table.grid[-1], mean)


def _source(table: Table) -> NoiseSource | None:
    generator = torch.Generator().manual_seed(3)
    return (lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)) if table.stochastic else None


@pytest.mark.parametrize("build", [euler, ddim])
def test_at_pure_noise_the_analytic_first_step_is_the_evaluated_one(build: Callable[..., Table]) -> None:
    """Means of classes (B, *), a table that starts at t = 1, and one evaluation less."""
    schedule = Linear()
    labels, x = LABELS, _noise()
    counter = EvaluationCounter(lambda x, t: _labelled(schedule)(x, t, labels))
    mean = torch.stack([_class_mean(label) for label in labels.tolist()])
    grid = (1.0, 0.8, 0.5, 0.2)
    want = sample(counter, build(schedule, grid), x)
    assert counter.evaluations == 5 * 3
    table = build(schedule, grid, analytic_first=True)
    got = _shifted(counter, table, schedule, x, mean, None)
    assert counter.evaluations == 5 * (3 + 2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    uncentered = sample(counter, table, x)
    assert (uncentered - want).abs().max() > 0.1


def test_the_velocity_at_pure_noise_is_the_state_less_the_mean() -> None:
    table = euler(Linear(), (1.0, 0.9), analytic_first=True)
    x, mean = _noise(), MEANS[LABELS]
    got = _shifted(mixture().field(Linear()), table, Linear(), x, mean, None)
    torch.testing.assert_close(got, x - 0.1 * (x - mean), rtol=0, atol=1e-12)


def test_under_guidance_the_mean_is_the_guided_combination_of_means() -> None:
    schedule, scale = Linear(), 2.5
    x, null = _noise(), torch.full_like(LABELS, 2)
    field = classifier_free(_labelled(schedule), LABELS, null, scale)
    of_class = torch.stack([_class_mean(label) for label in LABELS.tolist()])
    mean = torch.lerp(_class_mean(2).expand_as(of_class), of_class, scale)
    grid = (1.0, 0.6, 0.3)
    got = _shifted(field, euler(schedule, grid, analytic_first=True), schedule, x, mean, None)
    torch.testing.assert_close(got, sample(field, euler(schedule, grid), x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_commutes_with_the_shift_on_the_straight_schedule(name: str) -> None:
    schedule, (start, end) = Linear(), (0.97, 0.05)
    table, mean = SOLVERS[name].build(schedule, uneven_grid(start, end, 8)), MEANS[LABELS]
    field, x = mixture().field(schedule), _noise()
    got = _shifted(field, table, schedule, x, mean, _source(table))
    torch.testing.assert_close(got, sample(field, table, x, _source(table)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_solvers_that_are_exact_for_a_point_mass_commute_with_the_shift_on_every_schedule(schedule: Schedule) -> None:
    times = schedule.time_of_rho(torch.tensor([3.0, 0.1], dtype=torch.float64)).tolist()
    field, x, mean = mixture().field(schedule), _noise(), MEANS[LABELS]
    for name in ("ddim", "dpm2", "dpmpp2m"):
        table = SOLVERS[name].build(schedule, uneven_grid(times[0], times[1], 8))
        got = _shifted(field, table, schedule, x, mean, None)
        torch.testing.assert_close(got, sample(field, table, x), rtol=0, atol=1e-11)
    table = euler(schedule, uneven_grid(times[0], times[1], 8))
    difference = (_shifted(field, table, schedule, x, mean, None) - sample(field, table, x)).abs().max()
    if isinstance(schedule, Linear | EDM):
        assert difference < 1e-11
    else:  # Euler's step follows alpha's tangent, which moves a point mass off its curve
        assert difference > 1e-2


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_a_centred_field_is_the_field_of_centred_data(schedule: Schedule) -> None:
    data, t = _of_class(1), torch.full((5,), 0.4, dtype=torch.float64)
    mean, x = _mean(data), _noise()
    around_zero = Mixture(data.weights, data.means - mean, data.stds).field(schedule)(x, t)
    got = centered(data.field(schedule), schedule, mean)(x, t)
    torch.testing.assert_close(got.x0, around_zero.x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.eps, around_zero.eps, rtol=0, atol=1e-12)
    alpha, sigma = schedule.alpha(t[:1]), schedule.sigma(t[:1])
    torch.testing.assert_close(alpha * got.x0 + sigma * got.eps, x, rtol=0, atol=1e-12)
    moved = x + alpha * mean
    features = data.field(schedule)(moved, t).features
    assert features is not None and got.features is not None
    torch.testing.assert_close(got.features, features, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_a_state_moves_in_and_out_again(schedule: Schedule) -> None:
    x, mean = _noise(), MEANS[LABELS]
    moved = remove_mean(x, schedule, 0.3, mean)
    alpha = schedule.alpha(torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(moved, x - alpha * mean, rtol=0, atol=1e-15)
    torch.testing.assert_close(restore_mean(moved, schedule, 0.3, mean), x, rtol=0, atol=1e-15)


def test_a_field_with_times_keeps_them() -> None:
    """Centred guidance in an interval: `at` chooses inside, equal choices are equal fields, others are not."""
    schedule, mean = EDM(), MEANS[LABELS]
    x, t = _noise(), torch.full((5,), 0.5, dtype=torch.float64)
    guided, plain = _of_class(0).field(schedule), _of_class(1).field(schedule)
    field = centered(interval(guided, plain, schedule, 1.0, 10.0), schedule, mean)
    assert isinstance(field, TimedField)
    inside, outside = at_time(field, 5 / 80), at_time(field, 0.5)
    torch.testing.assert_close(inside(x, t).x0, centered(guided, schedule, mean)(x, t).x0, rtol=0, atol=0)
    torch.testing.assert_close(outside(x, t).x0, centered(plain, schedule, mean)(x, t).x0, rtol=0, atol=0)
    assert inside == at_time(field, 6 / 80)
    assert hash(inside) == hash(at_time(field, 6 / 80))
    assert inside != outside
    assert inside != centered(guided, schedule, mean.clone())


def test_class_means_are_summed_in_float64_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midway.samplers.first_step.CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    latents = (torch.randn(100, 2, 3, 3, generator=generator) * 1e-3 + 1000).float()
    labels = torch.randint(0, 4, (100,), generator=generator)
    got = class_means(latents, labels, 4)
    want = torch.stack([latents[labels == label].double().mean(0) for label in range(4)])
    assert got.shape == (4, 2, 3, 3)
    assert got.dtype == torch.float32
    assert torch.equal(got, want.float())


def test_a_class_without_latents_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 0, 1\]"):
        class_means(torch.zeros(3, 2), torch.tensor([0, 0, 2]), 3)
    with pytest.raises(ValueError, match="of no other"):
        class_means(torch.zeros(3, 2), torch.tensor([0, 1, 2]), 2)


def test_a_grid_that_starts_short_of_pure_noise_gains_too() -> None:
    """At rho = 80 the centred analytic step misses the evaluated one by far less than the step about 0 does."""
    schedule = Linear()
    grid = grids.uniform(schedule, 6)
    field, x, mean = _of_class(1).field(schedule), _noise(), _mean(_of_class(1))
    want, table = sample(field, euler(schedule, grid), x), euler(schedule, grid, analytic_first=True)
    centred = (_shifted(field, table, schedule, x, mean, None) - want).abs().max()
    plain = (sample(field, table, x) - want).abs().max()
    assert centred < 0.05 * plain
