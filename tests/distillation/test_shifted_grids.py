"""The grid `shift` of a model whose noise levels were shifted in training has the model's own factor, wherever it is made."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.distillation.amed import DistillConfig, SolverObjective, SolverTarget
from midway.gen.distillation.noise import NoiseConfig, NoiseObjective
from midway.gen.distillation.table import TableConfig, TableObjective, TableTarget
from midway.gen.networks.dit_config import DiTConfig
from midway.samplers.grids import GRIDS, NAMED, RHO_MAX, RHO_MIN, Grid, named, shift, uniform
from midway.samplers.schedule import SCHEDULES, Linear
from midway.samplers.solvers import make_solver

FACTOR = 0.5


def model(time_shift: Any = FACTOR, **config: Any) -> LatentModel:
    torch.manual_seed(0)
    dit = DiTConfig(width=8, depth=1, heads=2)
    return LatentModel(LatentModelConfig(time_shift=time_shift, dit=dit, **config), (4, 4, 4), 3)


def grid_of(made: LatentModel, solver: str, name: str = "shift", nfe: int = 4) -> Grid:
    """Of the sampler that commands make."""
    trained: Any = SimpleNamespace(model=made, run=SimpleNamespace(place="a run"))
    return make_samplers(trained, solver, nfe, SamplerConfig(grids=(name,)))[name].grid


def test_its_steps_are_equal_before_the_shift() -> None:
    """On rectified flows: t = s tau / (1 + (s - 1) tau) of SD3's eq. 23, for equal steps of tau."""
    t = torch.tensor(named("shift", Linear(), 5, trained=FACTOR), dtype=torch.float64)
    tau = t / (FACTOR - (FACTOR - 1) * t)
    torch.testing.assert_close(tau.diff(), tau.diff().mean().expand(5), rtol=1e-9, atol=0)
    rho = Linear().rho(t)
    torch.testing.assert_close(rho[[0, -1]], torch.tensor([RHO_MAX, RHO_MIN], dtype=torch.float64))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_a_shift_the_factor_is_3_and_no_other_grid_has_one(schedule: str) -> None:
    process = SCHEDULES[schedule]()
    assert named("shift", process, 4) == shift(process, 4) == shift(process, 4, factor=3.0)
    for name in NAMED.keys() - {"shift"}:
        assert named(name, process, 4, trained=FACTOR) == NAMED[name](process, 4)


@pytest.mark.parametrize(("given", "expected"), [(1.0, 3.0), (FACTOR, FACTOR), ("auto", 0.125)])
def test_commands_sample_a_model_on_its_own_shift(given: Any, expected: float) -> None:
    made = model(given)
    own = shift(made.schedule, 4, factor=expected)
    assert grid_of(made, "euler") == own
    assert make_solver("euler", made.schedule, 4, "shift", made.shift).grid == own
    assert grid_of(made, "euler", "uniform") == uniform(made.schedule, 4)


def test_jumps_too() -> None:
    made = model(objective="meanflow")
    own = shift(made.schedule, 4, factor=FACTOR)
    assert grid_of(made, "jump") == make_solver("jump", made.schedule, 4, "shift", FACTOR).grid == own


def test_between_other_noise_levels() -> None:
    trained: Any = SimpleNamespace(model=model())
    config = SamplerConfig(grids=("shift",), rho_max=20.0, rho_min=0.01)
    found = make_samplers(trained, "euler", 3, config)["shift"].grid
    assert found == shift(Linear(), 3, 20.0, 0.01, FACTOR) != shift(Linear(), 3, 20.0, 0.01)


@pytest.mark.parametrize("mode", ["end_to_end", "per_step"])
def test_learned_solvers_and_their_teachers_too(mode: Any) -> None:
    made = model(schedule="cosine")
    process = made.schedule
    amed = SolverObjective(
        made, SolverTarget(4, "shift", 1.0, True), DistillConfig(mode=mode, teacher_steps=4, teacher_grid="shift")
    )
    assert amed.grid == shift(process, 2, factor=FACTOR)
    assert amed.teacher.grid == pytest.approx(shift(process, 4, factor=FACTOR), rel=1e-6)


def test_learned_tables_and_noise_and_their_teachers_too() -> None:
    made = model(schedule="cosine")
    process = made.schedule
    table = TableObjective(made, TableTarget(4, "shift"), TableConfig(teacher_steps=6, teacher_grid="shift"))
    assert table.grid == pytest.approx(shift(process, len(table.grid) - 1, factor=FACTOR), rel=1e-5)
    assert table.teacher.grid == shift(process, 6, factor=FACTOR)
    assert TableObjective(made, TableTarget(4), TableConfig()).candidates == tuple(GRIDS)
    noisy = NoiseObjective(made, 4, "shift", 1.0, NoiseConfig(teacher="dpmpp3m", teacher_steps=4, analytic_first=False))
    assert noisy.grid == shift(process, 2, factor=FACTOR)
    assert noisy.teacher.grid == shift(process, 4, factor=FACTOR)


@pytest.mark.parametrize("factor", [FACTOR, 2.0])
def test_the_grid_has_the_noise_levels_that_training_draws(factor: float) -> None:
    """Uniform times of training are, shifted, those between the ends of a fine grid: quantile by quantile."""
    made = model(factor, time="uniform")
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    drawn = made.time_of(u).double()
    times = torch.tensor(shift(Linear(), 20, factor=factor), dtype=torch.float64).flip(0)[1:-1]
    torch.testing.assert_close(drawn, times, rtol=0.02, atol=1e-3)
    assert (drawn - torch.tensor(shift(Linear(), 20)).flip(0)[1:-1]).abs().max() > 0.05
