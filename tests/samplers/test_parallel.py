"""Sampling in parallel over time: exact after enough waves, within the tolerance, and how many waves that takes."""

import math

import numpy as np
import pytest
import torch
from oracles import gaussian, mixture, noise_at, rmse
from torch import Tensor

from midway.samplers import grids
from midway.samplers.guidance import classifier_free, conditional, interval
from midway.samplers.parallel import (
    ParallelConfig,
    ParallelSample,
    _Mixing,
    gaussian_slopes,
    picard_slopes,
    sample_parallel,
)
from midway.samplers.prediction import Field, Prediction, expand
from midway.samplers.rows import NoiseSource
from midway.samplers.sample import EvaluationCounter, sample
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule
from midway.samplers.solvers import SOLVERS, ddim, euler
from midway.samplers.table import Table

SCHEDULES = [Linear(), Cosine(), VP(), EDM()]
names = [type(s).__name__ for s in SCHEDULES]
METHODS = {
    "picard": ParallelConfig("picard"),
    "anderson": ParallelConfig("picard", memory=3),
    "gaussian": ParallelConfig("gaussian"),
    "gaussian anderson": ParallelConfig("gaussian", memory=2),
}


def _config(method: str, tolerance: float, window: int | None = None) -> ParallelConfig:
    return ParallelConfig(METHODS[method].method, tolerance, window, METHODS[method].memory)


def _grid(schedule: Schedule, steps: int) -> grids.Grid:
    return grids.karras(schedule, steps, rho_max=80, rho_min=0.01)


def _relative_rmse(got: Tensor, want: Tensor) -> float:
    return rmse(got, want) / rmse(want)


def _run(schedule: Schedule, steps: int, config: ParallelConfig) -> tuple[ParallelSample, float]:
    """DDIM on the mixture: what was found, and its distance from the sequential end."""
    field, grid = mixture().field(schedule), _grid(schedule, steps)
    table, x = ddim(schedule, grid), noise_at(schedule, grid[0])
    found = sample_parallel(lambda copies: field, table, schedule, x, config)
    return found, _relative_rmse(found.x, sample(field, table, x))


def _source(table: Table) -> NoiseSource | None:
    """The same draws at every call of this function; None for a table without noise."""
    generator = torch.Generator().manual_seed(3)
    return (lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)) if table.stochastic else None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SOLVERS)
def test_after_as_many_waves_as_evaluations_the_end_is_the_sequential_one(name: str, method: str) -> None:
    """Multi-stage, multistep and stochastic tables, too; with no tolerance nothing settles before it is exact."""
    for schedule, analytic_first, window in [(EDM(), False, None), (Cosine(), True, None), (Cosine(), False, 3)]:
        field, grid = mixture().field(schedule), _grid(schedule, 6)
        table, x = SOLVERS[name].build(schedule, grid, analytic_first), noise_at(schedule, grid[0])
        want = sample(field, table, x, _source(table))
        config = _config(method, 0.0, window)
        found = sample_parallel(lambda copies, f=field: f, table, schedule, x, config, _source(table))
        assert found.waves <= table.nfe
        torch.testing.assert_close(found.x, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [Linear(), EDM()], ids=["Linear", "EDM"])
@pytest.mark.parametrize("name", SOLVERS)
def test_gaussian_data_take_one_wave_with_their_own_slope(name: str, schedule: Schedule) -> None:
    field = gaussian(0.0, 0.0, std=0.7).field(schedule)
    table = SOLVERS[name].build(schedule, _grid(schedule, 8))
    x = noise_at(schedule, table.grid[0])

    def run(variance: float) -> ParallelSample:
        config = ParallelConfig("gaussian", 1e-9, variance=variance)
        return sample_parallel(lambda copies: field, table, schedule, x, config, _source(table))

    found = run(0.49)
    assert (found.waves, found.evaluations) == (1, table.nfe)
    torch.testing.assert_close(found.x, sample(field, table, x, _source(table)), rtol=0, atol=1e-8)
    assert run(0.5).waves > 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_slopes_are_what_they_say(schedule: Schedule) -> None:
    """gaussian: autodiff of the exact denoiser; picard: the velocity does not move, and a = 1 on Euler's table."""
    grid = _grid(schedule, 5)
    times = torch.tensor(grid[:-1], dtype=torch.float64)
    field = gaussian(0.4, std=0.7).field(schedule)
    x = torch.zeros(len(times), 1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(field(x, times).x0.sum(), x)
    torch.testing.assert_close(gaussian_slopes(schedule, times, 0.49), slope[:, 0], rtol=1e-10, atol=0)
    picard = picard_slopes(schedule, times)
    (d_alpha, d_sigma), alpha, sigma = schedule.rates(times), schedule.alpha(times), schedule.sigma(times)
    d_velocity = d_alpha * picard + d_sigma * (1 - alpha * picard) / sigma
    torch.testing.assert_close(d_velocity, torch.zeros_like(picard), rtol=0, atol=1e-10)
    for row, g in zip(euler(schedule, grid).rows, picard.tolist(), strict=True):
        assert row.states[-1] + row.predictions[-1] * g == pytest.approx(1, abs=1e-10)
    if isinstance(schedule, Cosine | VP):
        torch.testing.assert_close(picard, gaussian_slopes(schedule, times), rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", ["gaussian", "gaussian anderson"])
def test_the_gaussian_iteration_does_not_see_the_schedule(method: str) -> None:
    """On DDIM's table and one rho grid it is the same iteration of y = x / alpha: same waves, same evaluations, same end."""
    found = [_run(schedule, 20, _config(method, 1e-4)) for schedule in SCHEDULES]
    assert len({(f.waves, f.evaluations) for f, _ in found}) == 1
    for (f, _), schedule in zip(found, SCHEDULES, strict=True):
        alpha = schedule.alpha(torch.tensor(_grid(schedule, 20)[-1], dtype=torch.float64))
        torch.testing.assert_close(f.x / alpha, found[-1][0].x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [20, 50, pytest.param(100, marks=pytest.mark.slow)])
def test_gaussian_takes_at_most_six_tenths_of_picards_waves(steps: int) -> None:
    """On EDM, to within 1e-4 of the sequential end. Mixing brings Picard part of the way."""

    def waves(method: str) -> int:
        runs = (_run(EDM(), steps, _config(method, 10 ** (-k / 4))) for k in range(8, 21))
        return next(found.waves for found, error in runs if error <= 1e-4)

    picard, anderson, gaussian = waves("picard"), waves("anderson"), waves("gaussian")
    print(f"{steps} steps: picard {picard}, anderson {anderson}, gaussian {gaussian} waves")
    assert gaussian <= 0.6 * picard
    assert gaussian <= anderson < picard
    assert gaussian <= 8


@pytest.mark.parametrize("schedule", [Linear(), EDM()], ids=["Linear", "EDM"])
@pytest.mark.parametrize("method", METHODS)
def test_the_tolerance_is_kept(method: str, schedule: Schedule) -> None:
    """Mixed states settle on a residual, which bounds their error less tightly than the change of a plain wave does."""
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        found, error = _run(schedule, 50, _config(method, tolerance))
        assert error <= (4 if "anderson" in method else 1) * tolerance
        assert found.waves < 25


def test_the_tolerance_holds_for_the_worst_sample() -> None:
    """One sample of the mixture among 31 of a Gaussian, which settle at once, takes the waves that it takes alone."""
    schedule, data = EDM(), mixture()
    table = ddim(schedule, _grid(schedule, 30))
    x, config = noise_at(schedule, table.grid[0], 32), ParallelConfig(tolerance=1e-4)

    def field(x: Tensor, t: Tensor) -> Prediction:
        sigma = expand(schedule.sigma(t), x)
        hard = (torch.arange(len(x)) % 32 == 0)[:, None]
        x0 = torch.where(hard, data.field(schedule)(x, t).x0, x / (1 + sigma.square()))
        return Prediction(x0, (x - x0) / sigma)

    among = sample_parallel(lambda copies: field, table, schedule, x, config)
    alone = sample_parallel(lambda copies: data.field(schedule), table, schedule, x[:1], config)
    assert (among.waves, among.evaluations) == (alone.waves, alone.evaluations)
    torch.testing.assert_close(among.x[:1], alone.x, rtol=0, atol=1e-12)


def test_a_smaller_tolerance_takes_more_waves() -> None:
    waves = [_run(EDM(), 50, ParallelConfig("gaussian", tolerance))[0].waves for tolerance in (1e-1, 1e-3, 1e-6, 0)]
    assert waves == sorted(set(waves))


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_counted_and_a_window_bounds_the_batch(method: str) -> None:
    schedule, steps, window = EDM(), 30, 7
    grid = _grid(schedule, steps)
    table, x = ddim(schedule, grid), noise_at(schedule, grid[0])
    sizes, counter = [], EvaluationCounter(mixture().field(schedule))

    def field(x: Tensor, t: Tensor) -> Prediction:
        sizes.append(len(x) // 8)
        return counter(x, t)

    found = sample_parallel(lambda copies: field, table, schedule, x, _config(method, 1e-4, window))
    assert counter.evaluations == 8 * found.evaluations == 8 * sum(sizes)
    assert len(sizes) == found.waves
    assert max(sizes) == sizes[0] == window
    assert steps / window <= found.waves < steps
    assert _relative_rmse(found.x, sample(mixture().field(schedule), table, x)) <= 4e-4


@pytest.mark.parametrize("schedule", [Linear(), EDM()], ids=["Linear", "EDM"])
def test_states_that_enter_a_window_start_from_the_latest_prediction(schedule: Schedule) -> None:
    """A point mass off 0: after one evaluation, every window is right at once."""
    table = ddim(schedule, _grid(schedule, 40))
    x = noise_at(schedule, table.grid[0])

    def field(x: Tensor, t: Tensor) -> Prediction:
        return Prediction(torch.full_like(x, 3.0), x)

    found = sample_parallel(lambda copies: field, table, schedule, x, ParallelConfig(tolerance=1e-4, window=10))
    assert found.waves <= 40 / 10 + 2
    torch.testing.assert_close(found.x, sample(field, table, x), rtol=0, atol=1e-3)


def test_a_window_of_one_is_the_sequential_sampler() -> None:
    found, error = _run(VP(), 12, ParallelConfig("gaussian", 1e-2, window=1))
    assert (found.waves, found.evaluations) == (12, 12)
    assert error < 1e-14


def test_a_table_without_evaluations_takes_no_wave() -> None:
    table = euler(Linear(), (1.0, 0.9), analytic_first=True)
    x = torch.ones(2, 3, dtype=torch.float64)

    def never(copies: int) -> Field:
        raise AssertionError("nothing is to be evaluated")

    found = sample_parallel(never, table, Linear(), x)
    assert (found.waves, found.evaluations) == (0, 0)
    torch.testing.assert_close(found.x, 0.9 * x, rtol=0, atol=1e-12)


def _labelled(x: Tensor, t: Tensor, labels: Tensor) -> Prediction:
    """N(label, 1/4) on EDM; label 9 is no class."""
    sigma = expand(EDM().sigma(t), x)
    mean = torch.where(labels == 9, 0.5, labels)[:, None].to(x)
    x0 = mean + 0.25 / (0.25 + sigma.square()) * (x - mean)
    return Prediction(x0, (x - x0) / sigma)


def test_guidance_in_an_interval_is_paid_for_where_it_acts() -> None:
    schedule = EDM()
    table, labels = ddim(schedule, _grid(schedule, 12)), torch.arange(8) % 3
    x, counter = noise_at(schedule, table.grid[0]), EvaluationCounter(_labelled)

    def fields(copies: int) -> Field:
        these = labels.repeat(copies)
        guided = classifier_free(counter, these, torch.full_like(these, 9), 3.0)
        return interval(guided, conditional(counter, these), schedule, 0.3, 5.0)

    rhos = [80 * time for time in table.times]
    inside = sum(0.3 < rho <= 5 for rho in rhos)
    want = sample(fields(1), table, x)
    counter.evaluations = 0
    found = sample_parallel(fields, table, schedule, x, ParallelConfig(tolerance=1e-9, window=12))
    torch.testing.assert_close(found.x, want, rtol=0, atol=1e-7)
    assert 2 < inside < 10
    assert 8 * found.evaluations < counter.evaluations < 2 * 8 * found.evaluations
    counter.evaluations = 0
    first_wave = sample_parallel(fields, table, schedule, x, ParallelConfig(tolerance=math.inf))
    assert first_wave.waves == 1
    assert counter.evaluations == 8 * (12 + inside)


def test_mixing_is_the_triangular_least_squares_of_every_sample() -> None:
    """Against numpy's lstsq, sample by sample and state by state, for a wave with two waves before it."""
    generator = torch.Generator().manual_seed(0)
    states, samples, dim, norms = 4, 3, 5, [1.0, 4.0, 2.0, 0.5, 0.25]
    waves = [torch.randn(2, states, samples, dim, dtype=torch.float64, generator=generator) for _ in range(3)]
    mixing, mixed = _Mixing(memory=2), {}
    for x, g in waves:
        mixed = mixing.step(dict(enumerate(x, 1)), dict(enumerate(g, 1)), norms)
    x = np.stack([wave[0].numpy() for wave in waves])
    g = np.stack([wave[1].numpy() for wave in waves])
    r = g - x
    for b in range(samples):
        for i in range(states):
            scale = 1 / np.array(norms[1 : i + 2])[:, None]
            columns = [((r[k + 1] - r[k])[: i + 1, b] * scale).ravel() for k in range(2)]
            gamma = np.linalg.lstsq(np.stack(columns, 1), (r[2][: i + 1, b] * scale).ravel(), rcond=None)[0]
            want = g[2, i, b] - sum(gamma[k] * (g[k + 1] - g[k])[i, b] for k in range(2))
            np.testing.assert_allclose(mixed[i + 1][b].numpy(), want, rtol=0, atol=1e-7)


def test_mixing_takes_states_that_enter_late_and_waves_that_do_not_change() -> None:
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    mixing = _Mixing(memory=2)
    mixing.step({1: x[0], 2: x[1]}, {1: x[1], 2: x[2]}, [1.0] * 4)
    mixed = mixing.step({2: x[1], 3: x[0]}, {2: x[2], 3: x[1]}, [1.0] * 4)  # state 2 as before, state 3 new
    assert torch.equal(mixed[2], x[2])
    assert torch.equal(mixed[3], x[1])


def test_a_float32_state_stays_one() -> None:
    """Also where the network returns another dtype, and where the last row weighs that alone (sigma = 0)."""
    schedule = EDM()
    table = ddim(schedule, (*_grid(schedule, 20), 0.0))
    field, x = mixture().field(schedule), noise_at(schedule, table.grid[0])

    def in_double(x: Tensor, t: Tensor) -> Prediction:
        assert x.dtype == t.dtype == torch.float32
        return field(x.double(), t.double())

    found = sample_parallel(lambda n: in_double, table, schedule, x.float(), ParallelConfig(tolerance=1e-4))
    assert found.x.dtype == torch.float32
    assert _relative_rmse(found.x.double(), sample(field, table, x)) < 2e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_is_not_finite_is_an_error(method: str) -> None:
    schedule = EDM()
    table = ddim(schedule, _grid(schedule, 10))
    good = mixture().field(schedule)

    def field(x: Tensor, t: Tensor) -> Prediction:
        prediction = good(x, t)
        return Prediction(torch.where(expand(t < 0.01, x), math.nan, prediction.x0), prediction.eps)

    with pytest.raises(FloatingPointError, match=r"t = .* in wave 1: if `sample` gives finite"):
        sample_parallel(lambda n: field, table, schedule, noise_at(schedule, table.grid[0]), _config(method, 1e-4))


def test_what_cannot_work_raises_an_error() -> None:
    for arguments, words in [
        ({"method": "newton"}, "choose one of picard, gaussian"),
        ({"tolerance": -1.0}, "at least 0"),
        ({"tolerance": math.nan}, "at least 0"),
        ({"window": 0}, "at least 1 evaluation"),
        ({"memory": -1}, "0 is no acceleration"),
        ({"variance": 0.0}, "must be positive"),
    ]:
        with pytest.raises(ValueError, match=words):
            ParallelConfig(**arguments)
    table = ddim(EDM(), (0.9, 0.5))
    assert isinstance(table, Table)
    with pytest.raises(ValueError, match="was made for EDM"):
        sample_parallel(lambda n: mixture().field(EDM()), table, Cosine(), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="pass a noise source"):
        sample_parallel(lambda n: mixture().field(EDM()), ddim(EDM(), (0.9, 0.5), eta=0.7), EDM(), torch.zeros(1, 2))
