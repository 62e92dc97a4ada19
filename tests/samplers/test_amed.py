"""AMED: ranges and start of what is learned, the artefact, the objective's books (test_amed_distillation.py has the learning)."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation import tiny_model, train_steps
from oracles import mixture, noise_at
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from midway.gen.core.errors import DivergedError
from midway.gen.distillation.amed import DistillConfig, SolverObjective, SolverTarget, TrajectoryBatch
from midway.samplers import grids
from midway.samplers.amed import AMEDSolver, nodes
from midway.samplers.card import SolverCard
from midway.samplers.distill import TeacherNodes
from midway.samplers.learned_solver import EARLIER, LEARNED, LearnedSolver
from midway.samplers.prediction import Prediction
from midway.samplers.sample import sample
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule, Shifted
from midway.samplers.solvers import dpm2
from midway.samplers.step_parameters import MARGIN, AMEDConfig, Constants, MeanDirection, Predictor
from midway.samplers.table import fingerprint

SCHEDULES = [Linear(), Cosine(), VP(), EDM()]
names = [type(s).__name__ for s in SCHEDULES]
CARD = SolverCard("amed-predictor", "karras", "cosine", "0123456789ab", 6, False, 1.0, 100, "heun, 24 steps")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_unlearned_rules_start_at_dpm_solver_2(schedule: Schedule) -> None:
    grid = grids.karras(schedule, 3, rho_max=20.0)
    assert Constants(3, AMEDConfig()).values() == (MeanDirection(0.5, 1.0, 1.0),) * 3
    x, field = noise_at(schedule, grid[0]), mixture().field(schedule)
    torch.manual_seed(0)
    for rule, dim in ((Constants(3, AMEDConfig()), 0), (Predictor(2, 3, AMEDConfig()), 2)):
        got = nodes(AMEDSolver(schedule, grid, feature_dim=dim), field, rule, x)[-1]
        torch.testing.assert_close(got, sample(field, dpm2(schedule, grid), x), rtol=1e-10, atol=1e-10)


def test_each_number_is_learned_on_its_own_in_the_range_of_the_config() -> None:
    rule = Constants(6, AMEDConfig(scale_dir=0.3, scale_time=0.2))
    with torch.no_grad():
        rule.raw.copy_(50 * torch.cat([torch.eye(3), -torch.eye(3)]))
    ends = {"r": (1 - MARGIN, MARGIN), "c": (1.3, 0.7), "a": (1.2, 0.8)}
    for i, step in enumerate(rule.values()):
        moved = "rca"[i % 3]
        expected = {"r": 0.5, "c": 1.0, "a": 1.0} | {moved: ends[moved][i // 3]}
        assert (step.r, step.c, step.a) == pytest.approx(tuple(expected.values()))
    still = Constants(1, AMEDConfig(scale_time=0.0))
    torch.nn.init.constant_(still.raw, 50.0)
    assert still.values()[0].a == 1
    with pytest.raises(ValueError, match="scale_dir must be in"):
        AMEDConfig(scale_dir=1.5)


def test_the_predictor_has_about_nine_thousand_parameters() -> None:
    assert 8000 < sum(p.numel() for p in Predictor(64, 3, AMEDConfig()).parameters()) < 10000


def _objective_of(**changes: Any) -> SolverObjective:
    """The objective at NFE 4 of a tiny model, with these fields of target or configuration changed."""
    target, config = SolverTarget(4, "uniform", 1.0, True), DistillConfig(teacher_steps=4, trajectories=6)
    mine = {k: v for k, v in changes.items() if hasattr(target, k)}
    rest = {k: v for k, v in changes.items() if k not in mine}
    return SolverObjective(tiny_model(), replace(target, **mine), replace(config, **rest))


def _prepared(guidance: float, constants: bool, mode: str) -> tuple[SolverObjective, TeacherNodes]:
    """An objective after its teacher run and warm start, as midway train solver prepares it, and all trajectories."""
    objective, labels = _objective_of(guidance=guidance, constants=constants, mode=mode), torch.arange(6) % 4
    teacher = objective.run_teacher(labels)
    objective.warm_start(teacher, labels)
    return objective, teacher


def _steps(objective: SolverObjective, teacher: TeacherNodes, first: int, last: int) -> None:
    def batch_of(items: Tensor) -> TrajectoryBatch:
        return TrajectoryBatch(teacher.take(items), items % 4)

    train_steps(objective, batch_of, torch.optim.Adam(objective.parameters(), 1e-2), first, last)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("mode", ["end_to_end", "per_step"])
@pytest.mark.parametrize("constants", [True, False], ids=["constants", "predictor"])
def test_a_resumed_distillation_has_spent_what_an_uninterrupted_one_has(
    constants: bool, mode: str, guidance: float
) -> None:
    """Teacher run and warm start, done again by the resumed process, are not counted twice; a skipped step is counted."""
    whole, data = _prepared(guidance, constants, mode)
    prepared = whole.counter.evaluations
    _steps(whole, data, 0, 5)
    evaluations = 4 if mode == "end_to_end" else 2  # of the whole student, or one for each of its two steps
    a_step = 3 * evaluations * (2 if guidance != 1 else 1)  # three trajectories, guidance
    assert whole.counter.evaluations == whole.evaluations.item() == prepared + 5 * a_step
    broken, _ = _prepared(guidance, constants, mode)
    _steps(broken, data, 0, 2)
    resumed, data = _prepared(guidance, constants, mode)
    resumed.load_state_dict(broken.state_dict())
    assert resumed.counter.evaluations == prepared + 2 * a_step
    _steps(resumed, data, 2, 5)
    assert resumed.counter.evaluations == whole.counter.evaluations
    assert resumed.evaluations.dtype == torch.int64
    assert not [name for name in whole.rule.state_dict() if "evaluations" in name], "no part of the artefact"


def _learned(name: str, steps: int = 3) -> LearnedSolver:
    """An artefact on the cosine schedule with numbers unlike those that it starts from."""
    torch.manual_seed(0)
    grid, config, kind = grids.karras(Cosine(), steps), AMEDConfig(0.2, 0.05), LEARNED[name]
    rule = Constants(steps, config) if kind.constants else Predictor(2, steps, config)
    with torch.no_grad():
        for values in rule.parameters():
            values.add_(0.05 * torch.randn(values.shape))
    return LearnedSolver(replace(CARD, name=name, base=kind.base), grid, rule, Cosine())


@pytest.mark.parametrize("name", LEARNED)
def test_learned_solvers_survive_the_disk(name: str, tmp_path: Path) -> None:
    schedule, solver = Cosine(), _learned(name)
    path = tmp_path / "solver.safetensors"
    solver.save(path)
    loaded = LearnedSolver.load(path, Cosine())
    x, field = noise_at(schedule, solver.grid[0]).float(), mixture().field(schedule)
    assert (loaded.card, loaded.grid) == (solver.card, solver.grid)
    assert torch.equal(loaded.run(field, x), solver.run(field, x))
    assert [p.name for p in tmp_path.iterdir()] == ["solver.safetensors"]


def test_every_learned_solver_is_a_solver_of_its_own() -> None:
    """The base and the form in the name are those that sample."""
    schedule, ends = Cosine(), []
    for name in LEARNED:
        solver = _learned(name)
        x = noise_at(schedule, solver.grid[0])
        ends.append(solver.run(mixture().field(schedule), x))
        table = solver.table
        assert (table is not None) == (not name.endswith("-predictor"))
        if table is not None:
            assert (table.solver, table.nfe) == (name, 6)
            assert torch.equal(ends[-1], sample(mixture().field(schedule), table, x))
    ends = [end for end, name in zip(ends, LEARNED, strict=True) if name not in EARLIER]
    for i, one in enumerate(ends):
        assert all((one - other).abs().max() > 1e-4 for other in ends[:i])


def test_an_artefact_of_before_the_plugins_is_amed_solver(tmp_path: Path) -> None:
    path, solver = tmp_path / "solver.safetensors", _learned("amed")
    solver.save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    card = {k: v for k, v in json.loads(header["card"]).items() if k not in ("base", "mode")}
    save_file(load_file(path), path, metadata={**header, "card": json.dumps(card)})
    assert LearnedSolver.load(path, Cosine()).card == replace(solver.card, base="none", mode="per_step")


@pytest.mark.parametrize("base", ["none", "ipndm4"])
def test_an_artefact_of_before_constants_had_the_short_name_is_what_it_was(base: str, tmp_path: Path) -> None:
    """`amed` then was a predictor, and cards had no analytic_history: the same samples, with the hash that was stored."""
    path, short = tmp_path / "solver.safetensors", "amed" if base == "none" else f"amed-plugin-{base}"
    now = _learned(f"{short}-predictor")
    solver = replace(now, card=replace(now.card, name=short))
    solver.save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    card = {k: v for k, v in json.loads(header["card"]).items() if k != "analytic_history"}
    state = {k: v for k, v in load_file(path).items() if k != "grid"}
    digest = hashlib.sha256(json.dumps([card, solver.grid]).encode() + save(state)).hexdigest()[:12]
    save_file(load_file(path), path, metadata={**header, "card": json.dumps(card), "hash": digest})
    loaded = LearnedSolver.load(path, Cosine())
    x, field = noise_at(Cosine(), solver.grid[0]), mixture().field(Cosine())
    assert torch.equal(loaded.run(field, x), now.run(field, x)) and loaded.card.analytic_history
    for suffix in ("", "-constants"):
        assert _learned(short + suffix).table is not None
    with pytest.raises(ValueError, match="go together"):
        replace(now, card=replace(now.card, name=f"{short}-constants"))


# ---- errors ----


def test_a_solver_for_another_schedule_raises_an_error() -> None:
    for name in ("amed-predictor", "amed-plugin-ipndm4"):
        solver = _learned(name)
        for other in (Linear(), VP(), Shifted(Cosine(), 2.0)):
            with pytest.raises(ValueError, match=r"was learned on schedule cosine, this one is"):
                replace(solver, schedule=other)
    card = replace(CARD, name="amed", schedule="vp", nfe=2)
    odd = LearnedSolver(card, (0.9, 0.1), Constants(1, AMEDConfig()), VP())
    with pytest.raises(ValueError, match=r"learned on schedule vp, this one is VP\(beta_min=0.1, beta_max=19.0\)"):
        replace(odd, schedule=VP(beta_max=19.0))
    shifted = Shifted(Linear(), 3.0)
    assert replace(odd, card=replace(card, schedule=fingerprint(shifted)), schedule=shifted).table is not None


def test_a_predictor_of_another_model_raises_an_error() -> None:
    schedule, solver = Cosine(), _learned("amed-predictor")
    x, field = noise_at(schedule, solver.grid[0]), mixture().field(schedule)

    def other(state: Tensor, t: Tensor) -> Prediction:
        return replace(field(state, t), features=torch.zeros(len(state), 5))

    with pytest.raises(ValueError, match="gives 5 features, and the predictor was learned for 2"):
        solver.run(other, x)
    with pytest.raises(ValueError, match="this field gives none: learn constants"):
        solver.run(lambda state, t: replace(field(state, t), features=None), x)


def test_numbers_that_are_not_finite_or_do_not_fit_the_grid_raise_an_error() -> None:
    solver = _learned("amed")
    with pytest.raises(ValueError, match="numbers for 3 steps, the grid has 2"):
        replace(solver, grid=solver.grid[:-1])
    with torch.no_grad():
        solver.rule.raw[1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        replace(solver)


def test_another_file_raises_an_error(tmp_path: Path) -> None:
    dpm2(Cosine(), grids.karras(Cosine(), 3)).save(tmp_path / "table.safetensors")
    with pytest.raises(ValueError, match="not a learned solver"):
        LearnedSolver.load(tmp_path / "table.safetensors", Cosine())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nfe": 5, "analytic_first": False}, "5 network evaluations cannot be reached at 2 a step"),
        ({"nfe": 4, "analytic_first": True}, "4 network evaluations cannot be reached"),
        ({"base": "heun"}, "unknown base 'heun'"),
        ({"teacher": "ddpm"}, "draws noise"),
        ({"teacher_steps": 0}, "must be 1 or more"),
    ],
)
def test_an_objective_that_cannot_be_raises_an_error(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _objective_of(**changes)


def test_a_teacher_that_diverges_raises_an_error() -> None:
    objective = _objective_of()
    model = objective._model[0]
    assert isinstance(model, torch.nn.Module)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(DivergedError, match=r"unipc3, 4 steps.* are not finite"):
        objective.run_teacher(torch.arange(3))
