"""The density that the probability-flow ODE gives, against data whose density is known at every noise level."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import Mixture, exact_solution, gaussian, mixture, rmse, times_of, uneven_grid
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.diffusion import likelihood
from midway.gen.diffusion.likelihood import COSINE, Cost, cosine_table, on_cosine
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.samplers.grids import RHO_MIN, Grid, uniform
from midway.samplers.prediction import Field, Prediction, expand
from midway.samplers.sample import EvaluationCounter
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule, Shifted
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table

ALL = [Linear(), Cosine(), VP(), EDM(), Shifted(Linear(), 3.0), EDM(sigma_max=40.0)]
names = ["linear", "cosine", "vp", "edm", "shifted", "edm40"]
IDS = torch.arange(8)


def log_likelihood(
    field: Field, schedule: Schedule, table: Table | tuple[str, int], x: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Cost]:
    """Also by (solver, steps), which runs on the cosine schedule from rho = 0.002 on, where the state is x / c."""
    if isinstance(table, Table):
        return likelihood.log_likelihood(field, schedule, table, x, *arguments, **options)
    time = schedule.time_of_rho(number(RHO_MIN))
    c = torch.hypot(schedule.alpha(time), schedule.sigma(time)).item()
    carried, solver = on_cosine(field, schedule), cosine_table(schedule, *table)
    nats, cost = likelihood.log_likelihood(carried, COSINE, solver, x / c, *arguments, **options)
    return nats - x[0].numel() * math.log(c), cost


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def points(data: Mixture, count: int = 8) -> Tensor:
    """(count, D): draws of the data."""
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(data.weights, count, replacement=True, generator=generator)
    noise = torch.randn(count, data.means.shape[1], generator=generator, dtype=torch.float64)
    return data.means[which] + data.stds[which, None] * noise


def density(data: Mixture, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """ln p_t(x) (B,) of a mixture, term by term."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for weight, mean, std in zip(data.weights, data.means, data.stds, strict=True):
        variance = (alpha * std) ** 2 + sigma**2
        square = (x - alpha * mean).square().sum(1)
        total += weight * (-square / (2 * variance)).exp() / (2 * math.pi * variance) ** (x.shape[1] / 2)
    return total.log()


def expected(data: Mixture, schedule: Schedule, x: Tensor, start: float, end: float) -> Tensor:
    """ln p of the data at `start`, with N(0, alpha^2 + sigma^2) in place of the data at `end`."""
    times = torch.tensor([start, end], dtype=torch.float64)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    last = exact_solution(data, schedule, x, start, end)
    prior = density(gaussian(0.0, 0.0, std=1.0), last, alpha[1], sigma[1])
    return density(data, x, alpha[0], sigma[0]) - density(data, last, alpha[1], sigma[1]) + prior


@dataclass(frozen=True)
class Correlated:
    """A Gaussian whose covariance is not diagonal."""

    mean: Tensor
    covariance: Tensor

    def field(self, schedule: Schedule) -> Field:
        def predict(x: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = schedule.alpha(t)[0], schedule.sigma(t)[0]
            total = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean), dtype=torch.float64)
            eps = sigma * torch.linalg.solve(total, (x.flatten(1) - alpha * self.mean).T).T.view_as(x)
            return Prediction((x - sigma * eps) / alpha, eps)

        return predict


CORRELATED = Correlated(
    torch.tensor([0.3, -0.5], dtype=torch.float64), torch.tensor([[0.9, 0.6], [0.6, 0.8]], dtype=torch.float64)
)


# ---- the density ----


@pytest.mark.parametrize("schedule", ALL, ids=names)
def test_a_mixture_has_its_own_density_on_every_schedule(schedule: Schedule) -> None:
    data = mixture()
    start, end = times_of(schedule, 0.002, min(80.0, schedule.rho(number(1)).item()))
    x = schedule.alpha(number(start)) * points(data)
    got, cost = log_likelihood(data.field(schedule), schedule, ("rk4", 20), x)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected(data, schedule, x, start, end), rtol=0, atol=1e-4)
    assert cost == Cost(80, 160)


@pytest.mark.parametrize("schedule", ALL[:4], ids=names[:4])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpmpp2m", 2), ("rk4", 4)])
def test_a_table_carries_the_density_at_its_order(schedule: Schedule, solver: str, order: int) -> None:
    data = mixture()
    low, high = times_of(schedule, 0.4, 4.0)
    x = schedule.alpha(number(low)) * points(data)
    want = expected(data, schedule, x, low, high)
    errors = []
    for steps in (32, 64):
        table = SOLVERS[solver].build(schedule, uneven_grid(low, high, steps))
        errors.append(rmse(log_likelihood(data.field(schedule), schedule, table, x)[0], want))
    assert math.log2(errors[0] / errors[1]) > order - 0.3, errors
    assert errors[1] < {1: 1e-1, 2: 2e-2, 4: 3e-4}[order]


def test_a_correlated_gaussian_of_several_axes_has_its_closed_form() -> None:
    """Of mean 0 as the noise has, so that nothing is left of it at rho = 10000."""
    schedule = Linear()
    data = Correlated(0 * CORRELATED.mean, CORRELATED.covariance)
    table = SOLVERS["rk4"].build(schedule, uniform(schedule, 60, rho_max=1e4)[::-1])
    x = torch.randn(5, 1, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = table.grid[0]
    noised = (1 - t) ** 2 * data.covariance + t**2 * torch.eye(2, dtype=torch.float64)
    want = torch.distributions.MultivariateNormal(torch.zeros(2).double(), noised).log_prob(x.flatten(1))
    got, _ = log_likelihood(data.field(schedule), schedule, table, x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_its_slope_is_the_score() -> None:
    schedule, data = Linear(), mixture()
    table = SOLVERS["rk4"].build(schedule, uniform(schedule, 24, rho_max=1e4, rho_min=0.05)[::-1])
    x, step = points(data), 1e-4
    field, shifts = data.field(schedule), step * torch.eye(2, dtype=torch.float64)
    slope = [
        (log_likelihood(field, schedule, table, x + d)[0] - log_likelihood(field, schedule, table, x - d)[0])
        / (2 * step)
        for d in shifts
    ]
    t = torch.full((len(x),), table.grid[0], dtype=torch.float64)
    score = -field(x, t).eps / expand(schedule.sigma(t), x)
    torch.testing.assert_close(torch.stack(slope, 1), score, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", ALL[:4], ids=names[:4])
def test_on_cosine_every_field_is_the_same(schedule: Schedule) -> None:
    data, x = mixture(), points(mixture())
    t = Cosine().time_of_rho(torch.logspace(-2, 1.9, 8, dtype=torch.float64))
    got, want = on_cosine(data.field(schedule), schedule)(x, t), data.field(Cosine())(x, t)
    torch.testing.assert_close(got.x0, want.x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.eps, want.eps, rtol=1e-9, atol=1e-9)


def test_a_network_of_float32_sees_float32_and_sums_are_float64() -> None:
    data, schedule, seen = mixture(), Linear(), []

    def field(x: Tensor, t: Tensor) -> Prediction:
        seen.append((x.dtype, t.dtype))
        prediction = data.field(schedule)(x.double(), t.double())
        return Prediction(prediction.x0.to(x.dtype), prediction.eps.to(x.dtype))

    x = points(data)
    for given in (("rk4", 10), SOLVERS["rk4"].build(schedule, uniform(schedule, 10)[::-1])):
        seen.clear()
        got, _ = log_likelihood(field, schedule, given, x.float())
        assert got.dtype == torch.float64
        assert set(seen) == {(torch.float32, torch.float32)}
        torch.testing.assert_close(got, log_likelihood(field, schedule, given, x)[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_it_is_the_same_wherever_it_is_called(mode: Callable[[], Any]) -> None:
    model = small_model()
    labels = torch.zeros(2, dtype=torch.int64)
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    want, _ = log_likelihood(model.field(labels), model.schedule, ("rk4", 2), x)
    with mode():
        got, _ = log_likelihood(model.field(labels), model.schedule, ("rk4", 2), x + 0)
    assert torch.equal(got, want)
    assert not got.requires_grad


# ---- the trace ----


def test_two_rademacher_probes_of_two_dimensions_average_to_the_exact_trace() -> None:
    """z^T J z is tr J + 2 z_1 z_2 J_12, so there are two answers, and the exact one is between them."""
    x = torch.full((16, 2), 0.5, dtype=torch.float64)
    field = CORRELATED.field(Linear())
    exact, _ = log_likelihood(field, Linear(), ("rk4", 5), x[:1])
    got, _ = log_likelihood(field, Linear(), ("rk4", 5), x, "hutchinson", ids=torch.arange(16))
    low, high = got.min(), got.max()
    assert high - low > 0.5
    assert bool(torch.minimum((got - low).abs(), (got - high).abs()).max() < 1e-9)
    torch.testing.assert_close((low + high) / 2, exact[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_probes_average_to_the_exact_trace(probe: str, probes: int) -> None:
    count = 3000
    x = points(mixture(), 1).expand(count, -1)
    field = mixture().field(Linear())
    exact, _ = log_likelihood(field, Linear(), ("rk4", 4), x[:1])
    arguments = {"trace": "hutchinson", "ids": torch.arange(count), "probe": probe}
    got, _ = log_likelihood(field, Linear(), ("rk4", 4), x, probes=probes, **arguments)
    error = got.std().item() / math.sqrt(count)
    assert abs(got.mean().item() - exact.item()) < 4 * error
    one, _ = log_likelihood(field, Linear(), ("rk4", 4), x, **arguments)
    assert one.var().item() / got.var().item() == pytest.approx(probes, rel=0.2)


def test_rademacher_is_exact_for_a_diagonal_jacobian_and_gaussian_is_not() -> None:
    field = gaussian(0.0, 0.0, 0.0, std=0.5).field(VP())
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, _ = log_likelihood(field, VP(), ("heun", 6), x)
    rademacher, _ = log_likelihood(field, VP(), ("heun", 6), x, "hutchinson", ids=IDS)
    drawn, _ = log_likelihood(field, VP(), ("heun", 6), x, "hutchinson", ids=IDS, probe="gaussian")
    torch.testing.assert_close(rademacher, exact, rtol=0, atol=1e-10)
    assert bool(((drawn - exact).abs() > 1e-3).all())


def test_a_sample_depends_on_its_id_and_the_seed_alone() -> None:
    field, x = mixture().field(Linear()), points(mixture())

    def call(rows: Tensor, ids: Tensor = IDS, **options: Any) -> Tensor:
        return log_likelihood(field, Linear(), ("rk4", 3), x[rows], "hutchinson", ids=ids[rows], **options)[0]

    want, order = call(IDS), torch.tensor([5, 2, 7, 0])
    assert torch.equal(call(IDS), want)
    torch.testing.assert_close(call(order), want[order], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(call(order[:1]), want[order[:1]], rtol=1e-13, atol=1e-13)
    many = call(IDS, torch.arange(8) + 100, probe="gaussian", probes=3)
    assert not torch.isclose(call(IDS, seed=1, probe="gaussian"), call(IDS, probe="gaussian")).any()
    assert not torch.isclose(call(IDS, seed=1), want).all()  # of Rademacher probes half are the same
    assert not torch.isclose(many, call(IDS, probe="gaussian", probes=3)).any()


@pytest.mark.parametrize(("options", "products"), [({}, 3), ({"trace": "hutchinson", "probes": 2, "ids": IDS}, 2)])
def test_evaluations_and_products_are_counted(options: dict[str, Any], products: int) -> None:
    counter = EvaluationCounter(gaussian(0.0, 0.0, 0.0, std=1.0).field(Linear()))
    backward = []

    def field(x: Tensor, t: Tensor) -> Prediction:
        prediction = counter(x, t)
        prediction.x0.register_hook(lambda gradient: backward.append(len(gradient)))
        return prediction

    x = torch.zeros(8, 3, dtype=torch.float64)
    _, cost = log_likelihood(field, Linear(), ("heun", 5), x, **options)
    assert counter.evaluations == 8 * cost.evaluations == 8 * 10
    assert sum(backward) == 8 * cost.products == 8 * 10 * products


# ---- what has no density ----


def small_model(classes: int = 3) -> LatentModel:
    torch.manual_seed(0)
    model = LatentModel(LatentModelConfig(dit=DiTConfig(width=16, depth=1, heads=2, patch=1)), (1, 2, 2), classes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _table(solver: str, grid: Grid, schedule: Schedule | None = None) -> Any:
    return SOLVERS[solver].build(schedule or Linear(), grid)


RISING = uniform(Linear(), 4)[::-1]


@pytest.mark.parametrize(
    ("table", "options", "why"),
    [
        (lambda: ("rk5", 4), {}, "did you mean 'rk4'"),
        (lambda: ("ddpm", 4), {}, "deterministic"),
        (lambda: _table("rk4", RISING[::-1]), {}, "falls"),
        (lambda: _table("rk4", RISING, VP()), {}, "its schedule is VP"),
        (lambda: ("rk4", 4), {"trace": "exakt"}, "did you mean 'exact'"),
        (lambda: ("rk4", 4), {"trace": "hutchinson"}, "ids None"),
        (lambda: ("rk4", 4), {"trace": "hutchinson", "ids": torch.arange(3)}, "one int64 id a sample"),
        (lambda: ("rk4", 4), {"trace": "hutchinson", "ids": IDS, "probes": 0}, "probes=0"),
        (lambda: ("rk4", 4), {"trace": "hutchinson", "ids": IDS, "probe": "normal"}, "gaussian"),
    ],
)
def test_solvers_without_a_density_raise(table: Callable[[], Any], options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        log_likelihood(mixture().field(Linear()), Linear(), table(), points(mixture()), **options)


def test_an_unknown_grid_raises() -> None:
    with pytest.raises(UsageError, match="did you mean 'karras'"):
        cosine_table(Linear(), "rk4", 4, grid="karas")


def test_guided_fields_and_fields_without_gradients_raise() -> None:
    model, x, labels = small_model(), torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UsageError, match="guidance 2"):
        log_likelihood(model.field(labels, 2.0), model.schedule, _table("rk4", RISING), x)
    for table in (("rk4", 2), _table("rk4", RISING)):
        with pytest.raises(UsageError, match="cannot be differentiated"):
            log_likelihood(torch.no_grad()(model.field(labels).__call__), model.schedule, table, x)
