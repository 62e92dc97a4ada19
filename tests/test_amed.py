"""AMED: the dynamic solver against its table, distillation on an exact problem, its cost, artefacts."""

import math
from dataclasses import replace

import pytest
import torch
from oracles import mixture
from torch import Tensor

from midway.gen.backbone import DiTConfig
from midway.gen.context import Context
from midway.gen.latent_model import LatentModel, LatentModelConfig
from midway.gen.solver_training import DistillConfig, SolverObjective, SolverTarget, TrajectoryBatch
from midway.samplers import grids
from midway.samplers.amed import AMEDConfig, Constants, Directions, Predictor, nodes
from midway.samplers.distill import NEGLIGIBLE, step_errors, teacher_nodes
from midway.samplers.learned_solver import LearnedSolver, SolverCard
from midway.samplers.sample import EvaluationCounter, sample, trajectory
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule
from midway.samplers.solvers import SOLVERS, MeanDirection, amed, dpm2, heun

SCHEDULES = [Linear(), Cosine(), VP(), EDM()]
names = [type(s).__name__ for s in SCHEDULES]
CARD = SolverCard("amed", "karras", "Cosine", "0123456789ab", 6, False, 1.0, 100, "heun+3")


def _noise(schedule: Schedule, t: float, count: int = 8, seed: int = 0) -> Tensor:
    time = torch.tensor(t, dtype=torch.float64)
    scale = torch.hypot(schedule.alpha(time), schedule.sigma(time))
    return scale * torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _constants(steps: int, config: AMEDConfig) -> Constants:
    rule = Constants(steps, config)
    with torch.no_grad():
        rule.raw.copy_(0.1 * torch.randn(steps, 3, generator=torch.Generator().manual_seed(1)))
    return rule


@pytest.mark.parametrize("analytic_first", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_constants_and_their_table_are_the_same_solver(schedule: Schedule, analytic_first: bool) -> None:
    grid = grids.karras(schedule, 4, rho_max=20.0)
    rule = _constants(4, AMEDConfig(scale_dir=0.2, scale_time=0.1))
    table = amed(schedule, grid, rule.values(), analytic_first)
    x, field = _noise(schedule, grid[0]), mixture().field(schedule)
    dynamic = EvaluationCounter(field)
    states = nodes(dynamic, schedule, grid, rule, x, analytic_first)
    assert dynamic.evaluations == len(x) * table.nfe == len(x) * (8 - analytic_first)
    for got, want in zip(states, trajectory(field, table, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_unlearned_rules_start_at_dpm_solver_2(schedule: Schedule) -> None:
    grid = grids.karras(schedule, 3, rho_max=20.0)
    assert Constants(3, AMEDConfig()).values() == (MeanDirection(0.5, 1.0, 1.0),) * 3
    x, field = _noise(schedule, grid[0]), mixture().field(schedule)
    got = nodes(field, schedule, grid, Constants(3, AMEDConfig()), x)[-1]
    torch.testing.assert_close(got, sample(field, dpm2(schedule, grid), x), rtol=1e-4, atol=1e-5)


def test_ranges_are_what_the_config_says() -> None:
    config = AMEDConfig(scale_dir=0.3, scale_time=0.0)
    rule = Constants(2, config)
    with torch.no_grad():
        rule.raw.copy_(torch.tensor([[50.0, 50.0, 50.0], [-50.0, -50.0, -50.0]]))
    high, low = rule.values()
    assert (high.r, low.r) == pytest.approx((1, 0), abs=1e-6)
    assert (high.c, low.c) == pytest.approx((1.3, 0.7))
    assert (high.a, low.a) == (1, 1)
    with pytest.raises(ValueError, match="scale_dir must be in"):
        AMEDConfig(scale_dir=1.5)


def test_the_predictor_has_about_nine_thousand_parameters() -> None:
    assert 8000 < sum(p.numel() for p in Predictor(64, 3, AMEDConfig()).parameters()) < 10000


def _distil(rule: Constants | Predictor, schedule: Schedule, grid: grids.Grid, steps: int, lr: float) -> Tensor:
    field = mixture().field(schedule)
    extra = 3
    teacher_table = heun(schedule, grids.karras(schedule, (len(grid) - 1) * (extra + 1), rho_max=20.0))
    noise = _noise(schedule, grid[0], 256, seed=2).float()
    teacher = teacher_nodes(field, schedule, teacher_table, extra + 1, noise, False, 2)
    optimizer = torch.optim.Adam(rule.parameters(), lr)
    first = step_errors(field, schedule, grid, rule, teacher).detach()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        errors = step_errors(field, schedule, grid, rule, teacher)
        optimizer.zero_grad()
        (errors + NEGLIGIBLE).log().sum().backward()
        optimizer.step()
    return step_errors(field, schedule, grid, rule, teacher).detach() / first


@pytest.mark.parametrize("schedule", [Cosine(), EDM()], ids=["Cosine", "EDM"])
@pytest.mark.parametrize("kind", ["constants", "predictor"])
def test_distillation_halves_the_endpoint_error_on_unseen_noise(kind: str, schedule: Schedule) -> None:
    """Learned on 256 trajectories, tested on others, against DPM-Solver-2 on the same grid."""
    torch.manual_seed(0)
    grid = grids.karras(schedule, 3, rho_max=20.0)
    rule = Constants(3, AMEDConfig()) if kind == "constants" else Predictor(2, 3, AMEDConfig())
    ratios = _distil(rule, schedule, grid, 150, 0.01)
    assert (ratios[1:] < 0.1).all()  # the first step, at high noise, is nearly exact from the start
    x, field = _noise(schedule, grid[0], 512, seed=3).float(), mixture().field(schedule)
    fine = sample(field, heun(schedule, grids.karras(schedule, 100, rho_max=20.0)), x)
    with torch.no_grad():
        learned = nodes(field, schedule, grid, rule, x, feature_dim=2)[-1]
    plain = sample(field, dpm2(schedule, grid), x)
    error, base = ((s - fine).square().mean().sqrt() for s in (learned, plain))
    assert error < 0.5 * base


def test_the_gradient_of_the_distillation_loss_is_right() -> None:
    """Against central differences in r, c and a of every step."""
    schedule = Cosine()
    grid = grids.karras(schedule, 2, rho_max=5.0)
    field = mixture().field(schedule)
    teacher_table = heun(schedule, grids.karras(schedule, 4, rho_max=5.0))
    teacher = teacher_nodes(field, schedule, teacher_table, 2, _noise(schedule, grid[0]), False, 2)
    raw = torch.tensor([[0.03, -0.02, 0.01], [-0.04, 0.05, 0.02]], dtype=torch.float64, requires_grad=True)

    def loss(values: Tensor) -> Tensor:
        rule = Constants(2, AMEDConfig(0.2, 0.2)).double()
        return step_errors(
            field, schedule, grid, lambda f, s, t: torch.func.functional_call(rule, {"raw": values}, (f, s, t)), teacher
        ).sum()

    assert torch.autograd.gradcheck(loss, (raw,), eps=1e-4, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("teacher", list(SOLVERS))
def test_teacher_nodes_are_the_teachers_trajectory(teacher: str) -> None:
    schedule = Cosine()
    fine = grids.uniform(schedule, 6)
    table = SOLVERS[teacher].build(schedule, fine)
    x, field = _noise(schedule, fine[0]), mixture().field(schedule)
    kept = teacher_nodes(field, schedule, table, 3, x, False, 2)
    states = trajectory(field, table, x)
    assert torch.equal(kept.states, torch.stack([states[0], states[3], states[6]]))
    slope = field(states[3], torch.full((len(x),), fine[3], dtype=torch.float64)).eps
    torch.testing.assert_close(kept.eps[1], slope, rtol=0, atol=1e-9)


def test_an_analytic_first_step_gives_the_predictor_no_features() -> None:
    schedule = Cosine()
    fine = grids.uniform(schedule, 4)
    x = _noise(schedule, fine[0])
    kept = teacher_nodes(mixture().field(schedule), schedule, heun(schedule, fine), 2, x, True, 2)
    assert not kept.features[0].any()
    assert kept.features[1].any()
    torch.testing.assert_close(kept.eps[0], x)  # variance preserving: x / sqrt(alpha^2 + sigma^2) = x


def _objective(guidance: float, constants: bool) -> tuple[SolverObjective, TrajectoryBatch]:
    """An objective after its teacher run and warm start, as scripts/train_solver.py prepares it, and all trajectories."""
    torch.manual_seed(0)
    model = LatentModel(LatentModelConfig(dit=DiTConfig(width=16, depth=1, heads=2)), (2, 2, 2), 4)
    target = SolverTarget(4, "uniform", guidance, constants)
    objective = SolverObjective(
        model.eval().requires_grad_(False), target, DistillConfig(teacher_steps=4, trajectories=6)
    )
    labels = torch.arange(6) % 4
    teacher = objective.run_teacher(labels)
    objective.warm_start(teacher, labels)
    return objective, TrajectoryBatch(teacher, labels)


def _steps(objective: SolverObjective, all_of_it: TrajectoryBatch, first: int, last: int) -> None:
    """Steps first .. last - 1 of training, of which number 1 is skipped as fit() would skip it."""
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    for step in range(first, last):
        items = torch.arange(step, step + 3) % 6
        batch = TrajectoryBatch(all_of_it.nodes.take(items), all_of_it.labels[items])
        loss, _ = objective.loss(batch, Context(0, step, items))
        optimizer.zero_grad()
        loss.backward()
        if step != 1:
            optimizer.step()
        objective.after_step(torch.tensor(step != 1, device="meta"))  # a value that cannot be waited for


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("constants", [True, False], ids=["constants", "predictor"])
def test_a_resumed_distillation_has_spent_what_an_uninterrupted_one_has(constants: bool, guidance: float) -> None:
    """Teacher run and warm start, done again by the resumed process, are not counted twice; a skipped step is counted."""
    whole, data = _objective(guidance, constants)
    prepared = whole.counter.evaluations
    _steps(whole, data, 0, 5)
    a_step = 3 * 2 * (2 if guidance != 1 else 1)  # three trajectories, two steps of the student, guidance
    assert whole.counter.evaluations == whole.evaluations.item() == prepared + 5 * a_step
    broken, _ = _objective(guidance, constants)
    _steps(broken, data, 0, 2)
    resumed, data = _objective(guidance, constants)
    resumed.load_state_dict(broken.state_dict())
    assert resumed.counter.evaluations == prepared + 2 * a_step
    _steps(resumed, data, 2, 5)
    assert resumed.counter.evaluations == whole.counter.evaluations
    assert resumed.evaluations.dtype == torch.int64
    assert not [name for name in whole.rule.state_dict() if "evaluations" in name], "no part of the artefact"


@pytest.mark.parametrize("kind", ["constants", "predictor"])
def test_learned_solvers_survive_the_disk(kind: str, tmp_path) -> None:
    torch.manual_seed(0)
    schedule = Cosine()
    grid = grids.karras(schedule, 3)
    config = AMEDConfig(0.2, 0.05)
    rule = _constants(3, config) if kind == "constants" else Predictor(2, 3, config)
    solver = LearnedSolver(replace(CARD, name="amed-constants" if kind == "constants" else "amed"), grid, rule)
    path = tmp_path / "solver.safetensors"
    solver.save(path)
    loaded = LearnedSolver.load(path)
    x, field = _noise(schedule, grid[0]).float(), mixture().field(schedule)
    assert loaded.card == solver.card
    assert loaded.grid == grid
    assert torch.equal(loaded.sample(field, schedule, x), solver.sample(field, schedule, x))
    assert [p.name for p in tmp_path.iterdir()] == ["solver.safetensors"]
    dpm2(schedule, grid).save(tmp_path / "table.safetensors")
    with pytest.raises(ValueError, match="not a learned solver"):
        LearnedSolver.load(tmp_path / "table.safetensors")


def test_directions_may_differ_between_samples() -> None:
    """A batch with per-sample numbers equals its samples run alone."""
    schedule = Cosine()
    grid = grids.karras(schedule, 2, rho_max=5.0)
    x, field = _noise(schedule, grid[0], 4), mixture().field(schedule)
    r = torch.tensor([0.2, 0.4, 0.6, 0.8])

    def rule(features: Tensor, step: Tensor, log_rho: Tensor) -> Directions:
        own = r if len(step) == 4 else r[int(features[0, 0])][None]
        return Directions(own, 1 + 0.1 * own, 1 - 0.1 * own)

    together = nodes(field, schedule, grid, rule, x)[-1]
    for i in range(4):
        one = (MeanDirection(r[i].item(), 1 + 0.1 * r[i].item(), 1 - 0.1 * r[i].item()),) * 2
        alone = sample(field, amed(schedule, grid, one), x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert math.isfinite(together.sum().item())
