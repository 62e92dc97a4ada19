"""Average velocities: the oracles, and the samplers that jump by them."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from average_velocity import MAKERS, Data, ExactJumps, Gaussian, gaussian, rotated, states
from tensors import normal
from torch import Tensor

from midway.samplers.adaptive import AdaptiveSampler
from midway.samplers.gits import gits_grid
from midway.samplers.graph import Graphs
from midway.samplers.guidance import Together, autoguidance
from midway.samplers.interop import Parametrisation, read_table, table_from_numbers
from midway.samplers.jumps import JUMPS, consistency, jump
from midway.samplers.learned import LearnedTable, rollout
from midway.samplers.mixture import Mixture
from midway.samplers.parallel import sample_parallel
from midway.samplers.prediction import Prediction
from midway.samplers.sample import sample, trajectory
from midway.samplers.schedule import Cosine, Linear, Schedule, schedule_of
from midway.samplers.solvers import ddim, euler, heun
from midway.samplers.table import Table
from midway.samplers.table_facts import normal_form, variance_ratios
from midway.samplers.table_walk import TableWalk

PROBLEMS = {f"{make.__name__} {type(s).__name__}": make(s) for make in MAKERS for s in (Linear(), Cosine())}
EXACT = 1e-12


def residual(data: Data, dz: Callable[[Tensor], Tensor], dt: float, dr: float) -> float:
    """Greatest error of u = v - (t - r) du/dt, for these tangents of du/dt: dz of v, dt and dr."""
    z, t, r = states(data)
    v = data.velocity(z, t)
    tangents = dz(v), torch.full_like(t, dt), torch.full_like(r, dr)
    u, slope = torch.func.jvp(data.average, (z, t, r), tangents)  # pyright: ignore[reportAssignmentType]
    return (u - (v - (t - r)[:, None] * slope)).abs().max().item()


# ---- the oracles ----


@pytest.mark.parametrize("name", PROBLEMS)
def test_average_velocities_keep_their_identities(name: str) -> None:
    """The derivative along the trajectory, two half-jumps for one, the velocity where both times are one."""
    data = PROBLEMS[name]
    z, t, r = states(data)
    assert residual(data, lambda v: v, 1, 0) < EXACT
    middle = (t + r) / 2
    torch.testing.assert_close(
        data.transport(data.transport(z, t, middle), middle, r), data.transport(z, t, r), rtol=0, atol=EXACT
    )
    torch.testing.assert_close(data.average(z, t, t), data.velocity(z, t), rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if "Linear" in name])
@pytest.mark.parametrize(("factor", "dt", "dr"), [(1, 1, 1), (0, 1, 0), (-1, 1, 0), (1, 0, 0), (1, -1, 0)])
def test_wrong_tangents_show(name: str, factor: int, dt: float, dr: float) -> None:
    assert residual(PROBLEMS[name], lambda v: factor * v, dt, dr) > 0.3


def test_the_velocity_of_a_mixture_is_that_of_its_posterior_mean() -> None:
    """Of the product as one mixture of all pairs of components in the plane, by another file's formulas."""
    data = rotated(Linear())
    pairs = list(itertools.product(range(2), repeat=3))
    means = torch.stack([torch.stack([data.means[d, k] for d, k in enumerate(ks)]) for ks in pairs])
    stds = torch.stack([torch.stack([data.stds[d, k] for d, k in enumerate(ks)]) for ks in pairs])
    weights = torch.stack([torch.stack([data.weights[k] for k in ks]).prod() for ks in pairs])
    whole = Mixture(weights, means @ data.rotation.T, stds.square(), data.rotation.expand(8, 3, 3))
    z, t, _ = states(data)
    found = whole.field(Linear())(z, t)
    torch.testing.assert_close(found.eps - found.x0, data.velocity(z, t), rtol=0, atol=EXACT)


# ---- sampling ----


def grid_of(steps: int, end: float = 0.0) -> tuple[float, ...]:
    """From pure noise to `end`, in uneven steps."""
    return tuple(1 - (1 - end) * (i / steps) ** 1.7 for i in range(steps + 1))


@pytest.mark.parametrize("name", PROBLEMS)
def test_exact_jumps_end_exactly_in_any_number(name: str) -> None:
    """One evaluation a jump, counted at the network; every node is on the trajectory, and the noise becomes the data."""
    data = PROBLEMS[name]
    x = noise_of(data)
    start = torch.ones(len(x), dtype=torch.float64)
    for steps in (1, 2, 3, 8):
        counter, table = _Counter(data.average), jump(data.schedule, grid_of(steps))
        states = trajectory(ExactJumps(data, counter), table, x)
        assert counter.evaluations == steps * len(x) == table.nfe * len(x)
        for t, state in zip(table.grid, states, strict=True):
            torch.testing.assert_close(state, data.transport(x, start, t * start), rtol=0, atol=EXACT)
        if isinstance(data, Gaussian):
            torch.testing.assert_close(states[-1], data.mean + data.std * x, rtol=0, atol=EXACT)


def noise_of(data: Data, count: int = 16) -> Tensor:
    """Standard normal (B, D)."""
    return normal(count, data.sample(1, 0).shape[1], seed=7, dtype=torch.float64)


class _Counter:
    """Counts the samples that go through a network."""

    def __init__(self, network: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.network, self.evaluations = network, 0

    def __call__(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        self.evaluations += len(x)
        return self.network(x, t, r)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=["linear", "cosine"])
@pytest.mark.parametrize(("steps", "end"), [(1, 0.0), (2, 0.0), (3, 0.1), (8, 0.1)])
def test_consistency_sampling_keeps_the_data_of_gaussians(schedule: Schedule, steps: int, end: float) -> None:
    """Each state is a sum of the start and the draws: its mean and its covariance are those of the data at its time."""
    data, table = gaussian(schedule), consistency(schedule, grid_of(steps, end))
    draws = sum(row.noise != 0 for row in table.rows)
    assert (table.nfe, draws) == (steps, steps - 1)
    units = torch.eye(1 + draws).double()[:, :, None].expand(-1, -1, 3)  # one run for each source of noise
    runs = torch.cat([units, torch.zeros(1, 1 + draws, 3).double()])  # and one without any

    def states() -> list[Tensor]:
        left = iter(runs[:, 1:].unbind(1))
        return list(table.states(ExactJumps(data), runs[:, 0], lambda x: next(left)))

    for time, state in zip(table.grid, states(), strict=True):
        t = torch.tensor([time], dtype=torch.float64)
        mean, shares = state[-1], state[:-1] - state[-1]
        torch.testing.assert_close(mean, schedule.alpha(t) * data.mean, rtol=0, atol=EXACT)
        torch.testing.assert_close(shares.square().sum(0).sqrt(), data.spread(t)[0], rtol=0, atol=EXACT)


# ---- tables ----

GRID = (0.9, 0.6, 0.5, 0.125)
TABLES = {f"{name} {type(s).__name__}": make(s, GRID) for name, make in JUMPS.items() for s in (Linear(), Cosine())}


@pytest.mark.parametrize("name", TABLES)
def test_every_number_of_a_table_of_jumps_is_checked(name: str) -> None:
    """Changed by 1%, it is no table; nor is one that jumps to a time at which no state lives, or not in every row."""
    table = TABLES[name]
    for i, row in enumerate(table.rows):
        assert row.time is not None and row.to is not None
        changes = [replace(row, time=0.99 * row.time), replace(row, arrival=0.99 * row.arrival)]
        changes += [replace(row, to=row.to * factor) for factor in (0.99, 1.01, 20)] + [replace(row, to=None)]
        changes += [replace(row, noise=1.01 * row.noise)] if row.noise else []
        for field in ("states", "predictions"):
            weights = getattr(row, field)
            for j, weight in enumerate(weights):
                if weight:
                    changes.append(replace(row, **{field: (*weights[:j], 1.01 * weight, *weights[j + 1 :])}))
        for changed in changes:
            with pytest.raises(ValueError, match=rf"row \d of table '{table.solver}'|state \d of table"):
                replace(table, rows=(*table.rows[:i], changed, *table.rows[i + 1 :]))


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_jumps_are_stored_and_told_apart(name: str, tmp_path: Path) -> None:
    table = TABLES[name]
    table.save(tmp_path / "table")
    loaded = Table.load(tmp_path / "table", schedule_of(table.schedule))
    assert (loaded, loaded.hash, loaded.ends) == (table, table.hash, table.ends)
    assert "jump to 0.12500" in repr(table)
    other = TABLES[name.replace("jump", "consistency") if "jump" in name else name.replace("consistency", "jump")]
    assert table.hash != other.hash and not normal_form(table).equals(normal_form(other))


def test_tables_without_jumps_have_the_hashes_that_they_had() -> None:
    """Learned solvers, stored samples and records name tables by them. These need sums, products and quotients alone."""
    grid = (0.75, 0.5, 0.25)
    found = [make(Linear(), grid) for make in (euler, heun, ddim)]
    assert [table.hash for table in found] == ["b0c1cff5701f", "d831e345d76d", "ddd59f2286eb"]
    assert not any(table.ends for table in found)


def test_on_a_straight_schedule_a_jump_is_a_step_of_eulers_method() -> None:
    """With another evaluation. On other schedules it is one of the velocity in t too."""
    for schedule in (Linear(), Cosine()):
        plain, jumps = euler(schedule, GRID), jump(schedule, GRID)
        assert [replace(row, to=None) for row in jumps.rows] == list(plain.rows)
        assert jumps.ends == GRID[1:] and jumps.hash != plain.hash
        assert normal_form(plain).times == normal_form(jumps).times and not normal_form(plain).equals(
            normal_form(jumps)
        )


@pytest.mark.parametrize("make", JUMPS.values(), ids=JUMPS)
@pytest.mark.parametrize("grid", [(0.1, 0.9), (0.5, 0.9, 0.1), (0.5,), (1.5, 0.5), (0.9, -0.1)])
def test_jumps_need_a_grid_that_falls(make: Callable[..., Table], grid: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"falls|rises"):
        make(Linear(), grid)


# ---- jumps where there are none, and none where there are ----

DATA = gaussian(Linear())
FIELD = ExactJumps(DATA)
X = noise_of(DATA, 2)
PLAIN = euler(Linear(), GRID)
ONE_TIME = {
    "a solver": lambda: sample(FIELD, PLAIN, X),
    "a call": lambda: FIELD(X, torch.full((2,), 0.5)),
    "a captured graph": lambda: Graphs().sample(lambda: FIELD, PLAIN, X),
    "parallel sampling": lambda: sample_parallel(lambda n: FIELD, PLAIN, Linear(), X),
    "adaptive steps": lambda: AdaptiveSampler(Linear(), (0.9, 0.1)).run(FIELD, X),
    "a fitted grid": lambda: gits_grid(FIELD, Linear(), X, (0.9, 0.7, 0.5, 0.1), 2),
    "a learned table": lambda: rollout(FIELD, LearnedTable(Linear(), GRID), X),
    "classifier-free guidance": lambda: sample(Together(2.0, lambda y: FIELD, torch.zeros(2), torch.ones(2)), PLAIN, X),
    "autoguidance": lambda: sample(autoguidance(FIELD, ExactJumps(DATA), 2.0), PLAIN, X),
}


@pytest.mark.parametrize("who", ONE_TIME)
def test_what_evaluates_at_one_time_names_jumps(who: str) -> None:
    with pytest.raises(
        ValueError, match=r"average velocities of jumps.*sample with `jump` or `consistency`.*`velocity`"
    ):
        ONE_TIME[who]()


def test_the_velocity_of_a_field_of_jumps_is_any_solvers_field() -> None:
    x = sample(FIELD.velocity, heun(Linear(), tuple(0.9 - 0.01 * i for i in range(90))), X)
    exact = DATA.transport(X, torch.full((2,), 0.9).double(), torch.full((2,), 0.01).double())
    torch.testing.assert_close(x, exact, rtol=0, atol=1e-3)


JUMP = jump(Linear(), GRID)
PIPELINE = Parametrisation(Linear(), "velocity", 1000.0)
NO_JUMPS = {
    "a field at one time": lambda folder: sample(FIELD.velocity, JUMP, X),
    "a function": lambda folder: sample(lambda x, t: Prediction(x, x), JUMP, X),
    "a captured graph": lambda folder: Graphs().sample(lambda: FIELD.velocity, JUMP, X),
    "parallel sampling": lambda folder: sample_parallel(lambda n: FIELD, JUMP, Linear(), X),
    "a pipeline": lambda folder: TableWalk(JUMP, PIPELINE),
    "a scheduler's config": lambda folder: table_from_numbers(asdict(JUMP)),
    "a scheduler's file": lambda folder: (JUMP.save(folder / "table"), read_table(folder / "table", Linear())),
    "facts": lambda folder: variance_ratios(JUMP, Linear(), 1.0),
    "guidance": lambda folder: sample(autoguidance(FIELD, ExactJumps(DATA), 2.0), JUMP, X),
}


@pytest.mark.parametrize("who", NO_JUMPS)
def test_what_cannot_jump_names_what_can(who: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"table 'jump' jumps .*(at one time|one time: ).*euler"):
        NO_JUMPS[who](tmp_path)


def test_a_field_of_another_schedule_cannot_jump() -> None:
    with pytest.raises(ValueError, match=r"made for Linear.*field is of Cosine"):
        sample(ExactJumps(gaussian(Cosine())), JUMP, X)


def test_jumps_are_sampled_without_a_graph_on_the_cpu() -> None:
    assert torch.equal(Graphs().sample(lambda: FIELD, JUMP, X), sample(FIELD, JUMP, X))
