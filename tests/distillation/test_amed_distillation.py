"""Distilling AMED on an exact problem: teachers, gradients, what it gains, what it costs."""

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from distillation import tiny_model
from oracles import exact_solution, mixture, noise_at, rmse
from pipelines import Pipeline
from tensors import grad
from torch import Tensor

from midway.gen.diffusion.load import load_model
from midway.gen.diffusion.model import LatentModel
from midway.gen.diffusion.samplers import WARM_UP, SamplerConfig, fitting_nfe, gits_for, make_samplers, make_table
from midway.gen.diffusion.sampling import sample_latents
from midway.gen.distillation.amed import DistillConfig, SolverObjective, SolverTarget
from midway.gen.distillation.learning import Lesson, learn
from midway.gen.training.batches import Context
from midway.gen.training.config import TrainConfig
from midway.gen.trainings.solver_tasks import labels_for, make_objective, on_best_grid, tried_on
from midway.gen.trainings.train_solver import SolverTask, card_for, train
from midway.samplers import grids
from midway.samplers.amed import AMEDSolver, nodes
from midway.samplers.distill import (
    NEGLIGIBLE,
    TeacherNodes,
    best_positions,
    check_nested,
    node_errors,
    refined,
    step_errors,
    teacher_nodes,
)
from midway.samplers.gits import FINE_STEPS
from midway.samplers.learned import checkpointed
from midway.samplers.learned_solver import LEARNED, LearnedSolver
from midway.samplers.plugin import BASES, unlearned
from midway.samplers.prediction import Field, Prediction
from midway.samplers.sample import EvaluationCounter, ForwardCounter, trajectory
from midway.samplers.schedule import EDM, VP, Cosine, Schedule
from midway.samplers.solvers import SOLVERS, heun
from midway.samplers.step_parameters import AMEDConfig, Constants, Predictor, StepParameters, StepRule
from midway.samplers.unipc import unipc

CONFIG = AMEDConfig(scale_dir=0.2, scale_time=0.1)
RHO = 20.0


def _start(solver: AMEDSolver, count: int = 8, seed: int = 0) -> Tensor:
    return noise_at(solver.schedule, solver.grid[0], count, seed)


def _solver(
    schedule: Schedule, steps: int, base: str = "none", analytic_first: bool = False, feature_dim: int = 0
) -> AMEDSolver:
    return AMEDSolver(schedule, grids.karras(schedule, steps, rho_max=RHO), base, analytic_first, feature_dim)


def _taught(solver: AMEDSolver, x: Tensor, stride: int = 4, slopes: bool = True) -> TeacherNodes:
    table = heun(solver.schedule, grids.karras(solver.schedule, solver.steps * stride, rho_max=RHO))
    return teacher_nodes(mixture().field(solver.schedule), solver, table, stride, x, slopes)


# ---- teachers ----


@pytest.mark.parametrize("teacher", [name for name, entry in SOLVERS.items() if not entry.stochastic])
def test_teacher_nodes_are_the_teachers_trajectory(teacher: str) -> None:
    """Also for teachers with inner stages; their own evaluations at the nodes are used, and no others made."""
    schedule = Cosine()
    fine = grids.karras(schedule, 6, rho_max=RHO)
    solver, table = _solver(schedule, 2), SOLVERS[teacher].build(schedule, fine)
    x, field = _start(solver), mixture().field(schedule)
    counted = EvaluationCounter(field)
    kept, states = teacher_nodes(counted, solver, table, 3, x), trajectory(field, table, x)
    assert torch.equal(kept.states, torch.stack([states[0], states[3], states[6]]))
    for i in range(2):
        slope = field(states[3 * i], torch.full((len(x),), fine[3 * i], dtype=torch.float64)).eps
        torch.testing.assert_close(kept.eps[i], slope, rtol=0, atol=1e-9)
    assert counted.evaluations == len(x) * table.nfe
    without = teacher_nodes(counted, solver, table, 3, x, slopes=False)
    assert torch.equal(without.states, kept.states)
    assert without.eps.shape == (0, len(x), 2)
    assert counted.evaluations == len(x) * 2 * table.nfe


def test_a_node_that_the_teacher_did_not_evaluate_is_evaluated() -> None:
    """Here the first one, which an analytic first step spares the teacher."""
    schedule = Cosine()
    fine = grids.karras(schedule, 4, rho_max=RHO)
    solver, table = _solver(schedule, 2), heun(schedule, fine, analytic_first=True)
    x, field = _start(solver), mixture().field(schedule)
    counted = EvaluationCounter(field)
    kept = teacher_nodes(counted, solver, table, 2, x)
    assert counted.evaluations == len(x) * (table.nfe + 1) == len(x) * 8
    slope = field(x, torch.full((len(x),), fine[0], dtype=torch.float64)).eps
    torch.testing.assert_close(kept.eps[0], slope, rtol=0, atol=1e-12)


def test_a_teacher_of_other_nodes_or_with_noise_raises_an_error() -> None:
    schedule = Cosine()
    solver = _solver(schedule, 2)
    for fine, stride in ((grids.karras(schedule, 6), 3), (grids.uniform(schedule, 6, RHO), 3), (solver.grid, 2)):
        with pytest.raises(ValueError, match="must be one of the student's"):
            check_nested(heun(schedule, fine), solver.grid, stride)
    noisy = SOLVERS["ddpm"].build(schedule, grids.karras(schedule, 4, rho_max=RHO))
    with pytest.raises(ValueError, match="'ddpm' draws noise"):
        check_nested(noisy, solver.grid, 2)


@pytest.mark.parametrize("schedule", [Cosine(), VP(), EDM()], ids=["cosine", "vp", "edm"])
def test_a_refined_grid_has_its_nodes_and_equal_ratios_between(schedule: Schedule) -> None:
    """Of any grid, here one without a rule."""
    grid = grids.explicit((0.9, 0.41, 0.35, 0.02))
    fine = refined(schedule, grid, 4)
    assert fine[::4] == grid and len(fine) == 13
    rho = schedule.rho(torch.tensor(fine, dtype=torch.float64)).log()
    steps = (rho[:-1] - rho[1:]).view(3, 4)
    torch.testing.assert_close(steps, steps.mean(1, keepdim=True).expand(3, 4), rtol=1e-6, atol=0)
    assert refined(schedule, grid, 1) == grid


def test_an_analytic_first_step_gives_the_predictor_no_features() -> None:
    solver = _solver(Cosine(), 2, analytic_first=True, feature_dim=2)
    x = _start(solver)
    kept = _taught(solver, x)
    assert not kept.features[0].any()
    assert kept.features[1].any()
    torch.testing.assert_close(kept.eps[0], x)  # variance preserving: x / sqrt(alpha^2 + sigma^2) = x


def test_trajectories_are_taken_whole() -> None:
    solver = _solver(Cosine(), 2, feature_dim=2)
    kept, items = _taught(solver, _start(solver)), torch.tensor([5, 2])
    alone = _taught(solver, _start(solver)[items])
    for one, other in zip(vars(kept.take(items)).values(), vars(alone).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# ---- errors and their gradients ----


def _errors_of(mode: str, solver: AMEDSolver, field: Field, rule: StepRule, teacher: TeacherNodes) -> Tensor:
    if mode == "restarted":
        return step_errors(field, solver, rule, teacher)
    return node_errors(nodes(solver, field, rule, teacher.states[0], mode == "detached"), solver, teacher)


def _called(rule: Constants, values: Tensor) -> StepRule:
    return lambda f, s, t: torch.func.functional_call(rule, {"raw": values}, (f, s, t))


MODES = [(base, mode) for base in BASES for mode in ("restarted", "detached", "end_to_end")]


@pytest.mark.parametrize(("base", "mode"), [m for m in MODES if m[1] != "restarted" or BASES[m[0]].order == 1])
def test_the_gradient_of_every_error_is_right(base: str, mode: str) -> None:
    """Against central differences in every step's own three numbers (detached: with all before it held fixed)."""
    solver = _solver(VP(), 2, base)
    x, field = _start(solver, 4), mixture().field(solver.schedule)
    teacher = _taught(solver, x)
    start = torch.tensor([[0.03, -0.02, 0.01], [-0.04, 0.05, 0.02]], dtype=torch.float64)
    rule = Constants(2, CONFIG).double()
    for step in range(2):
        own = start[step].clone().requires_grad_()

        def error(values: Tensor, step: int = step) -> Tensor:
            together = torch.stack([values if i == step else start[i] for i in range(2)])
            return _errors_of(mode, solver, field, _called(rule, together), teacher)[
                step if mode != "end_to_end" else -1
            ]

        assert torch.autograd.gradcheck(error, (own,), eps=1e-6, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("analytic_first", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_checkpointing_changes_neither_a_gradient_nor_the_count(base: str, analytic_first: bool) -> None:
    torch.manual_seed(0)
    solver = _solver(Cosine(), 3, base, analytic_first, feature_dim=2)
    data = mixture()

    def field(x: Tensor, t: Tensor) -> Prediction:
        prediction = data.field(solver.schedule)(x, t)
        return replace(prediction, features=prediction.x0)  # features with a gradient, as a network's

    x, rule = _start(solver), Predictor(2, 3, CONFIG)
    with torch.no_grad():
        rule.heads.weight.normal_(std=0.3)
    teacher, grads, counts = _taught(solver, x), [], []
    for wrap in (lambda f: f, checkpointed):
        counted = EvaluationCounter(wrap(field))
        states = nodes(solver, counted, rule, x)
        rule.zero_grad()
        node_errors(states, solver, teacher)[-1].log().backward()
        grads.append([p.grad for p in rule.parameters()])
        counts.append(counted.evaluations // len(x))
    assert counts == [6 - analytic_first] * 2, "computing again is not counted"
    assert all(g is not None and g.abs().sum() > 0 for g in grads[0])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_a_checkpointed_field_is_the_field() -> None:
    solver = _solver(Cosine(), 2)
    x, field, calls = _start(solver), mixture().field(solver.schedule), []

    def counted(state: Tensor, t: Tensor) -> Prediction:
        calls.append(1)
        return field(state, t)

    t = torch.full((len(x),), 0.5, dtype=torch.float64)
    assert torch.equal(checkpointed(counted)(x, t).eps, field(x, t).eps)
    assert len(calls) == 1
    inner = t.clone().requires_grad_()  # an inner time has a gradient even where the state has none
    (got,) = torch.autograd.grad(checkpointed(counted)(x, inner).x0.sum(), inner)
    again = t.clone().requires_grad_()
    (want,) = torch.autograd.grad(field(x, again).x0.sum(), again)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert len(calls) == 3


def test_errors_are_in_units_of_the_states_variance() -> None:
    """On EDM the state at noise level rho has variance 1 + rho^2; moving it by its own size is an error of about 1."""
    solver = _solver(EDM(), 2)
    x = _start(solver, 4000)
    teacher = TeacherNodes(torch.stack([x, 0.1 * x, x]), torch.zeros(0), torch.zeros(0))
    rho = solver.schedule.rho(torch.tensor(solver.grid, dtype=torch.float64))
    size = (x.square().mean() * torch.stack([0.01 / (1 + rho[1] ** 2), 1 / (1 + rho[2] ** 2)])).tolist()
    zero = torch.zeros_like(x)
    assert node_errors([x, zero, zero], solver, teacher).tolist() == pytest.approx(size)


def test_a_multistep_base_does_not_restart() -> None:
    solver = _solver(Cosine(), 2, "ipndm4")
    teacher = _taught(solver, _start(solver))
    with pytest.raises(ValueError, match="'ipndm4' weigh earlier predictions"):
        step_errors(mixture().field(Cosine()), solver, Constants(2, CONFIG), teacher)


@pytest.mark.parametrize("base", ["none", "dpm2", "dpmpp2m"])
def test_the_warm_start_is_the_best_of_all_candidates(base: str) -> None:
    """By brute force: every combination of two candidates in two steps."""
    solver = _solver(VP(), 2, base)
    x, field = _start(solver, 16), mixture().field(solver.schedule)
    teacher, candidates = _taught(solver, x), torch.tensor([0.2, 0.35, 0.5, 0.65], dtype=torch.float64)

    def of(first: Tensor, second: Tensor) -> StepRule:
        def rule(features: Tensor, step: Tensor, log_rho: Tensor) -> StepParameters:
            one = torch.ones_like(log_rho[:, 0])
            return StepParameters(torch.where(step == 0, first, second) * one, one, one)

        return rule

    for restarted in [False, True] if BASES[base].order == 1 else [False]:
        counted = EvaluationCounter(field)
        best, error = best_positions(counted, solver, teacher, candidates, restarted)
        assert counted.evaluations == len(x) * 2 * (4 if restarted else 5)
        mode = "restarted" if restarted else "detached"
        first = min(candidates, key=lambda r: _errors_of(mode, solver, field, of(r, r), teacher)[0].item())
        second = min(candidates, key=lambda r: _errors_of(mode, solver, field, of(first, r), teacher)[1].item())
        assert best.tolist() == [first.item(), second.item()]
        last = _errors_of(mode, solver, field, of(first, second), teacher)[1].item()
        at = torch.tensor(solver.grid[-1], dtype=torch.float64)
        unit = solver.schedule.alpha(at).square() + solver.schedule.sigma(at).square()
        assert error == pytest.approx(last * unit.item(), rel=1e-9)


# ---- what is gained ----


def _learn(mode: str, solver: AMEDSolver, rule: Constants | Predictor, steps: int, lr: float) -> None:
    """Adam with a cosine rate on 256 trajectories, from the warm start."""
    field, x = mixture().field(solver.schedule), _start(solver, 256, seed=2)
    teacher = _taught(solver, x, stride=6)
    best, _ = best_positions(field, solver, teacher, torch.linspace(0.05, 0.7, 14).double(), mode == "restarted")
    with torch.no_grad():
        rule.raw[:, 0] = torch.logit(best) / 10
    optimizer = torch.optim.Adam(rule.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        errors = _errors_of(mode, solver, field, rule, teacher)
        optimizer.zero_grad()
        ((errors[-1:] if mode == "end_to_end" else errors) + NEGLIGIBLE).log().sum().backward()
        optimizer.step()


def _end_error(solver: AMEDSolver, rule: StepRule) -> float:
    """Distance to the exact solution on unseen noise."""
    x = _start(solver, 256, seed=3)
    exact = exact_solution(mixture(), solver.schedule, x, solver.grid[0], solver.grid[-1])
    with torch.no_grad():
        return rmse(nodes(solver, mixture().field(solver.schedule), rule, x)[-1], exact)


GAINS = [
    ("none", "constants", "restarted", EDM()),
    ("none", "constants", "restarted", Cosine()),
    ("none", "predictor", "restarted", VP()),
    ("none", "constants", "end_to_end", Cosine()),
    ("none", "predictor", "end_to_end", EDM()),
    ("dpm2", "constants", "restarted", Cosine()),
    ("euler", "constants", "end_to_end", EDM()),
    ("ipndm4", "predictor", "end_to_end", Cosine()),
    ("dpmpp2m", "constants", "detached", VP()),
    ("dpmpp3m", "predictor", "detached", Cosine()),
]


@pytest.mark.parametrize(("base", "kind", "mode", "schedule"), GAINS)
def test_five_evaluations_halve_the_endpoint_error(base: str, kind: str, mode: str, schedule: Schedule) -> None:
    """Against its own start, r = 1/2 and c = a = 1, to the exact solution from noise that it was not learned on."""
    torch.manual_seed(0)
    solver = _solver(schedule, 3, base, analytic_first=True, feature_dim=2 if kind == "predictor" else 0)
    rule = Constants(3, CONFIG) if kind == "constants" else Predictor(2, 3, CONFIG)
    before = _end_error(solver, rule)
    _learn(mode, solver, rule, 70, 0.01)
    assert _end_error(solver, rule) < 0.5 * before


# ---- the objective ----


def _objective(
    base: str, nfe: int, guidance: float, config: DistillConfig, constants: bool = False
) -> tuple[SolverObjective, LatentModel]:
    model = tiny_model(0.05)
    return SolverObjective(model, SolverTarget(nfe, "logsnr", guidance, constants, base), config), model


WAYS = [
    *[(base, DistillConfig(trajectories=6)) for base in BASES],
    *[(base, DistillConfig(trajectories=6, mode="per_step")) for base in ("none", "ipndm4", "dpmpp2m")],
    ("euler", DistillConfig(trajectories=6, checkpointing=False)),
]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("nfe", [5, 6])
@pytest.mark.parametrize(("base", "config"), WAYS)
def test_every_evaluation_of_the_training_is_counted(
    base: str, config: DistillConfig, nfe: int, guidance: float
) -> None:
    """One rule: a pass of a sample through the network is 1, of teacher, warm start and student; constants and predictors."""
    config = replace(config, teacher_steps=6)
    objective, model = _objective(base, nfe, guidance, config, constants=guidance == 1)
    labels, steps, odd = torch.arange(6) % 4, 3, nfe % 2
    own = 2 * steps - odd  # the student's evaluations
    with ForwardCounter(model.network) as network:
        take = objective.prepare(labels, {})
        loss, _ = objective.loss(take(torch.arange(6)), Context(0, 0, torch.arange(6)))
        loss.backward()
        objective.after_step(torch.tensor(True))
    whole = config.mode == "end_to_end"
    forms = 2 if whole and base == "ipndm4" and odd else 1  # an analytic slope in the history, and none
    alone = not BASES[base].multistep
    warm_start = forms * (14 * steps + (0 if alone else steps - odd)) + (6 if whole else 0)
    again = own - (1 - odd) if whole and config.checkpointing else 0  # all but that of the noise
    per_sample, passes = objective.teacher.nfe + warm_start + (steps if objective.restarts else own), 6 * guidance
    assert objective.counter.evaluations == objective.evaluations.item() == passes * per_sample
    assert objective.taught == passes * objective.teacher.nfe
    assert network.evaluations == passes * (per_sample + again), "computed again, and not counted"
    assert (grad(objective.rule.raw).abs() > 0).all()


def test_end_to_end_meets_the_end_state_of_one_teacher_at_every_budget() -> None:
    """The teacher is run once for all of them, and counted by each."""
    config, labels, shared = DistillConfig(trajectories=6, teacher_steps=6), torch.arange(6) % 4, {}
    for nfe in (4, 6):
        objective, model = _objective("none", nfe, 1.0, config)
        with ForwardCounter(model.network) as network:
            take = objective.prepare(labels, shared)
        assert network.evaluations == objective.counter.evaluations - (0 if nfe == 4 else objective.taught)
        batch = take(torch.arange(6))
        loss, logs = objective.loss(batch, Context(0, 0, torch.arange(6)))
        field, table = model.field(labels), unipc(model.schedule, grids.logsnr(model.schedule, 6), order=3)
        wanted = trajectory(field, table, batch.nodes.states[0])[-1]
        end = nodes(objective.solver, field, objective.rule, batch.nodes.states[0])[-1]
        time = torch.tensor(objective.grid[-1], dtype=torch.float64)
        unit = model.schedule.alpha(time).square() + model.schedule.sigma(time).square()
        error = (end - wanted).square().mean().item() / unit.item()
        assert list(logs) == [f"rmse_step_{nfe // 2 - 1}"]
        assert loss.item() == pytest.approx(math.log(error + NEGLIGIBLE), rel=1e-3)


@pytest.mark.parametrize(("rho", "expected"), [((80.0, 0.002), 6), ((20.0, 0.05), 6)])
def test_the_teacher_begins_and_ends_where_the_student_does(rho: tuple[float, float], expected: int) -> None:
    model = tiny_model()
    times = grids.explicit(grids.karras(model.schedule, 2, *rho))
    target = SolverTarget(4, "explicit", 1.0, True, times=times)
    objective = SolverObjective(model, target, DistillConfig(teacher_steps=6))
    assert objective.grid == times
    assert (objective.teacher.grid[0], objective.teacher.grid[-1]) == pytest.approx((times[0], times[-1]), rel=1e-9)
    assert objective.teacher.nfe == expected


def test_a_grid_without_a_rule_is_for_end_to_end_alone() -> None:
    model = tiny_model()
    target = SolverTarget(4, "gits", 1.0, True, times=grids.karras(model.schedule, 2))
    with pytest.raises(ValueError, match="use mode end_to_end"):
        SolverObjective(model, target, DistillConfig(mode="per_step"))
    with pytest.raises(ValueError, match="give its times"):
        SolverObjective(model, replace(target, times=None), DistillConfig())
    with pytest.raises(ValueError, match="4 evaluations are 2 steps, the grid has 3"):
        SolverObjective(model, replace(target, times=grids.karras(model.schedule, 3)), DistillConfig())
    with pytest.raises(ValueError, match="unknown teacher_grid 'gits'"):
        DistillConfig(teacher_grid="gits")
    for mode in ("per_step", "end_to_end"):
        with pytest.raises(ValueError, match="'ddpm' draws noise"):
            SolverObjective(model, SolverTarget(4, "karras", 1.0, True), DistillConfig("ddpm", mode=mode))


@pytest.mark.parametrize(
    ("name", "grid"),
    [("amed-plugin-ipndm4-predictor", "karras"), ("amed-plugin-dpmpp3m", "karras"), ("amed-plugin-ipndm3", "gits")],
)
def test_a_plugin_is_learned_saved_and_sampled_like_any_solver(
    name: str, grid: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    """Also on a grid that is fitted for it, which is stored with it, and whose cost is part of its training."""
    shutil.copytree(pipeline.model, tmp_path / "model", ignore=shutil.ignore_patterns("solvers"))
    distill = DistillConfig(trajectories=16, teacher="heun", teacher_steps=6)
    train_config = TrainConfig(steps=3, batch_size=8, lr=5e-2, warmup=0, ema=0, clip=1e6, log_every=3)
    task = SolverTask(tmp_path / "model", solver=name, nfe="5", grid=grid, distill=distill, train=train_config)
    train(task)
    trained = load_model(task.model, torch.device("cpu"))
    solver = make_samplers(trained, name, 5, SamplerConfig())[grid]
    assert isinstance(solver, LearnedSolver)
    card = solver.card
    assert (card.base, card.mode, card.nfe, card.analytic_first) == (LEARNED[name].base, "end_to_end", 5, True)
    assert (card.schedule, card.teacher) == ("cosine", "heun, 6 steps on logsnr")
    samples = sample_latents(trained, solver, torch.arange(4))
    assert samples.nfe == 5
    assert samples.latents.isfinite().all()
    if grid == "gits":
        start = partial(unlearned, trained.model.schedule, base="ipndm3", analytic_first=True)
        times, cost = gits_for(trained, 1.0, 3, start)
        assert solver.grid == times
        plain = 16 * 12 + 16 * (12 + 14 * 3 + 2) + 3 * 8 * 5  # teacher, warm start and its teacher, training
        assert card.training_nfe == cost + plain and cost >= WARM_UP * FINE_STEPS


@pytest.mark.parametrize(("scale", "interval"), [(1.0, (0.0, math.inf)), (2.0, (0.0, math.inf)), (2.0, (0.3, 3.0))])
def test_fitting_a_grid_counts_every_pass_once(scale: float, interval: tuple[float, float], pipeline: Pipeline) -> None:
    """A guided evaluation is two passes; the fine trajectories are shared by all grids, and counted by each."""
    trained = replace(pipeline.load(), hash=f"of this test {scale} {interval}")
    config = SamplerConfig(grids=("gits",), guidance=scale, interval=interval)
    schedule = trained.model.schedule
    rhos = schedule.rho(torch.tensor(grids.karras(schedule, FINE_STEPS)[:-1], dtype=torch.float64)).tolist()
    guided = sum(interval[0] < rho <= interval[1] for rho in rhos) if scale != 1 else 0
    with ForwardCounter(trained.model.network) as counter:
        costs = [fitting_nfe(trained, config, make_table("ddim", "gits", nfe, trained, config)) for nfe in (3, 4)]
    fine = WARM_UP * (FINE_STEPS + guided)
    assert sum(costs) - fine == counter.evaluations
    assert min(costs) > fine, "the choice among several paths runs the solver on them"


# ---- the grid ----


@pytest.mark.parametrize("name", ["amed", "amed-plugin-ipndm3-predictor"])
def test_the_best_grid_is_that_of_the_least_error_after_a_quarter_of_the_steps(name: str, pipeline: Pipeline) -> None:
    cpu = torch.device("cpu")
    trained = load_model(pipeline.model, cpu)
    distill = DistillConfig(trajectories=24, teacher_steps=4, checkpointing=False)
    lesson = TrainConfig(steps=8, batch_size=32, lr=5e-2, warmup=0, ema=0, clip=1.0, seed=3)
    task = SolverTask(pipeline.model, name, "4", "best", distill=distill, train=lesson)
    errors, spent = dict[str, float](), 0
    for grid in ("gits", "vp", "logsnr"):
        one = make_objective(replace(task, grid=grid), 4, trained)
        assert isinstance(one, SolverObjective)
        take = one.prepare(labels_for(task, trained.model, cpu), {})
        learn(one, take, 24, Lesson(2, 24, 5e-2, 1.0, seed=3))
        errors[grid] = one.end_rmse(take, 24)
        state = {key: value.detach() for key, value in one.state_dict().items()}
        sampler = one.sampler(state, card_for(task, 4, one, trained, 1))
        batch, end = take(torch.arange(24)), torch.tensor(one.grid[-1], dtype=torch.float64)
        unit = math.hypot(trained.model.schedule.alpha(end), trained.model.schedule.sigma(end))
        ends = sampler.run(trained.model.field(batch.labels), batch.nodes.states[0], None)
        assert rmse(ends, batch.nodes.states[-1]) == pytest.approx(errors[grid] * unit, rel=1e-4)
        spent += one.counter.evaluations - one.taught
    found, line = on_best_grid(task, 4, make_objective(task, 4, trained), trained, cpu, {})
    chosen = min(errors, key=lambda grid: errors[grid])
    assert isinstance(found, SolverObjective) and found.target.grid == chosen
    assert line.startswith(
        f"grid of {name} at NFE 4: {chosen}; RMSE to the teacher after 2 steps: gits {errors['gits']:.4g}, "
    )
    assert found.counter.evaluations == spent
    fresh = make_objective(replace(task, grid=chosen), 4, trained).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in found.state_dict().items())
    before = replace(task, grid="vp")
    given = make_objective(before, 4, trained)
    assert on_best_grid(before, 4, given, trained, cpu, {}) == (given, "")


def test_per_step_no_fitted_grid_is_tried(pipeline: Pipeline) -> None:
    task = SolverTask(pipeline.model, "amed", "4", "best", distill=DistillConfig(mode="per_step"))
    assert tried_on(task) == ("vp", "logsnr")
