"""Few-step models beside the solvers of another model: the same figures as alone, resumed after a kill, and errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measurements import changed, measurement
from pipelines import TINY, TINY_DIT, Pipeline, Script
from sweeps import measured, sweep_task, watch_samples

from midway.gen.commands import evaluate
from midway.gen.core.errors import UsageError
from midway.gen.core.processes import ProcessInfo
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.load import load_model
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.evaluation.comparing import differences, nearest_to_data
from midway.gen.evaluation.records import FEW_STEP, SOLVER, Measurement, from_record
from midway.gen.evaluation.sources import EvaluatedLatentModel, SolverSource
from midway.gen.flags.evaluation_inputs import budgets_of
from midway.gen.flags.tasks import LatentTask
from midway.gen.objectives.jump_config import JumpConfig
from midway.gen.sweep import measure, store
from midway.gen.sweep.comparisons import few_step_jobs
from midway.gen.sweep.jobs import SweepConfig, solver_jobs
from midway.gen.sweep.repeats import left_out, merge_trainings
from midway.gen.sweep.run import Sweep
from midway.gen.trainings import train_latent

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
TIMES = ("seconds", "seconds_std", "seconds_blocks", "decode_seconds", "feature_seconds", "timing")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 8 seeds: 3 a block of 20."""
    monkeypatch.setattr(store, "PART", 8)


def task(pipeline: Pipeline, few_step: Path, out: Path, **changes: Any) -> evaluate.EvaluateTask:
    return sweep_task(pipeline, out, **{"few_step": (few_step,), "few_step_nfe": "1,2,2", "guidance": 2.0, **changes})


def lines(out: Path) -> list[dict[str, Any]]:
    """results.jsonl without times."""
    rows = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(pipeline: Pipeline, unconditional: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep]:
    """Of a conditional model, guided, and an unconditional one for few steps, which is not."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "PART", 8)
        return out, evaluate.run(task(pipeline, unconditional, out))


def test_a_few_step_model_has_the_figures_that_it_has_alone(
    whole: tuple[Path, Sweep], pipeline: Pipeline, unconditional: Path, tmp_path: Path
) -> None:
    """Those of euler on it as --model, bit for bit; and without --model, of a reference that --data names."""
    rows = [m for m in whole[1].measurements if m.kind == FEW_STEP]
    assert [(m.solver, m.nfe, m.grid, m.sampler) for m in rows] == [
        ("unconditional", 1, "uniform", "euler"),
        ("unconditional", 2, "uniform", "euler"),
    ]
    alone = {"solvers": "euler", "nfe": "1,2", "exact_nfe": 0}
    (first, *rest) = [
        measured(evaluate.run(sweep_task(pipeline, tmp_path / name, **{**alone, **changes})))
        for name, changes in {
            "model": {"model": unconditional},
            "data": {"model": None, "few_step": (unconditional,), "few_step_nfe": "1,2", "data": DataConfig()},
        }.items()
    ]
    for others in (first, *rest):
        assert [m.distances for m in rows] == [m.distances for m in others]
        assert [m.metrics for m in rows] == [m.metrics for m in others], "none of them is of an exact solution"
    assert [(m.solver, m.kind) for m in rest[0]] == 2 * [("unconditional", FEW_STEP)]
    report = (tmp_path / "data" / "report.md").read_text()
    assert "Nearest to the data: with 1 and 2 evaluations the few-step model unconditional, " in report
    assert "The solver" not in report and "euler on uniform" in report


def test_rows_have_what_the_training_of_their_models_took(whole: tuple[Path, Sweep]) -> None:
    """Steps times batch; a flow model passes every image through one network once. Guidance counts twice, of the model alone."""
    found = {(m.solver, m.nfe): m for m in whole[1].measurements}
    assert {key: (m.model, m.training_images, m.model_nfe) for key, m in found.items() if key[1]} == {
        ("exact", 16): ("model", 25 * 64, 25 * 64),
        ("ddim", 8): ("model", 25 * 64, 25 * 64),
        ("unconditional", 1): ("unconditional", 2 * 64, 2 * 64),
        ("unconditional", 2): ("unconditional", 2 * 64, 2 * 64),
    }
    records = [*map(json.loads, (whole[0] / "results.jsonl").read_text().splitlines())]
    assert [from_record(record).kind for record in records] == [m.kind for m in whole[1].measurements]
    assert [record["kind"] for record in records] == ["limit"] * 3 + ["solver"] + 2 * ["few-step"]


def test_a_sweep_that_was_killed_in_a_few_step_model_gives_the_same_table(
    whole: tuple[Path, Sweep], pipeline: Pipeline, unconditional: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two processes made its parts of the first such cell; one process goes on, and makes only what is missing."""
    real, drawn = measure._sample, list[int]()

    class Killed(BaseException):
        """Nothing in the program catches it."""

    def second(source: Any, cell: Any, context: Any, fine: Any) -> None:
        theirs = source.trained.run.path == unconditional if hasattr(source, "trained") else False
        real(source, cell, replace(context, process=ProcessInfo(1, 2)) if theirs else context, fine)
        if theirs:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_sample", second)
        with pytest.raises(Killed):
            evaluate.run(task(pipeline, unconditional, tmp_path))
    watch_samples(monkeypatch, lambda seeds, batch: drawn.append(int(seeds[0])))
    evaluate.run(task(pipeline, unconditional, tmp_path))
    assert drawn == [0, 16, 28, 0, 8, 16, 20, 28, 36]
    assert lines(tmp_path) == lines(whole[0])


def test_learned_solvers_are_left_out_where_they_were_not_learned(pipeline: Pipeline) -> None:
    """With --skip-unreachable; one that was learned for no budget at all is an error."""
    model = EvaluatedLatentModel(pipeline.load())
    config = SweepConfig(solvers=("amed", "heun"), nfe=(1, 4), grids=("uniform",), n=2, skip=True)
    assert [(job.solver, job.nfe) for job in solver_jobs(model, config)] == [("amed", 4), ("heun", 4)]
    for nfe, skip in (((1, 4), False), ((1,), True)):
        with pytest.raises(UsageError, match="amed at NFE 1 has not been learned"):
            solver_jobs(model, replace(config, nfe=nfe, skip=skip))


def test_solvers_meet_few_step_models_at_their_budgets(pipeline: Pipeline, tmp_path: Path) -> None:
    both = sweep_task(pipeline, tmp_path, few_step=(tmp_path,), nfe=None)
    assert budgets_of(both, None) == (1, 2, 4, 6, 8, 10, 20)
    assert budgets_of(replace(both, few_step=()), None) == (4, 6, 8, 10, 20)
    assert budgets_of(replace(both, nfe="3"), None) == (3,)


def test_names_of_few_step_models_are_those_of_no_other_row(
    pipeline: Pipeline, unconditional: Path, script: Script, tmp_path: Path
) -> None:
    """Exit codes and words; nothing is written. Nor do other images compare, nor what is no latent model."""
    named, other = (shutil.copytree(unconditional, tmp_path / name) for name in ("ddim", "other"))
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("split_seed: 0", "split_seed: 1"))
    begin = (
        f"evaluate --model {pipeline.model} --features {pipeline.features} --out {tmp_path}/out --solvers ddim --nfe 4"
    )
    for few_step, code, words in (
        (f"{unconditional} {unconditional}", 2, "--few-step names unconditional twice"),
        (f"{pipeline.model}", 2, "its weights are those of --model"),
        (f"{pipeline.tokenizer}", 3, "kind"),
        (f"{named}", 2, "a run is named ddim, as another row"),
        (f"{other}", 3, "other was trained on other images than the reference"),
        (f"{unconditional} --few-step-nfe 1,x", 2, "--few-step-nfe cannot be '1,x'"),
    ):
        done = script(*f"{begin} --few-step {few_step}".split())
        assert done.code == code and words in done.err and done.err.count("\n") == 3, done.err
    assert not (tmp_path / "out").exists()


# ---- means over trainings ----


def row(name: str, kind: str, distances: tuple[float, ...], **more: Any) -> Measurement:
    mean = sum(distances) / len(distances)
    return changed(measurement(name, nfe=1, distance=mean, distance_blocks=distances), kind=kind, **more)


def test_few_step_models_are_not_repeated_and_not_tested_against_means_over_trainings() -> None:
    few = row("few", FEW_STEP, (1.0, 1.1))
    sweeps = [[row("euler", SOLVER, (d, d + 0.1)), few] for d in (2.0, 3.0)]
    merged = merge_trainings([sweeps[0], sweeps[1][:1]])
    assert merged[1] == few and merged[0].trainings == 2 and left_out([sweeps[0], sweeps[1][:1]]) == []
    assert list(differences(merged, "distance")) == [("few", 1)], "blocks and trainings are no pairs"
    assert nearest_to_data(merged) == {1: ("few", 1)}


# ---- models that jump ----


@pytest.fixture(scope="module")
def jumper(pipeline: Pipeline) -> Path:
    """A model of jumps on the pipeline's tokenizer, with the scale of guidance as an input."""
    path = pipeline.root / "jumper"
    jump = JumpConfig(guidance=2.0)
    config = LatentModelConfig(objective="shortcut", jump=jump, dit=replace(TINY_DIT, time_scale=1.0))
    train_latent.train(LatentTask(path, pipeline.tokenizer, model=config, train=replace(TINY, steps=3)))
    return path


def test_a_jump_model_has_the_same_figures_alone_and_beside_solvers(
    pipeline: Pipeline, jumper: Path, succeed: Script, script: Script, tmp_path: Path
) -> None:
    """By default `jump` at 1, 2, 4 and 8 on grid uniform; its exact solution is many jumps of its own."""
    begin = f"--features {pipeline.features} --n 20 --blocks 2 --batch-size 8 --choice-seeds 8"
    succeed(f"evaluate --model {jumper} {begin} --exact-nfe 8 --out {tmp_path}/alone")
    beside = f"--few-step {jumper} --solvers ddim --nfe 4 --grids uniform --exact-nfe 0 --out {tmp_path}/beside"
    succeed(f"evaluate --model {pipeline.model} {begin} {beside}")
    alone, rows = lines(tmp_path / "alone"), [row for row in lines(tmp_path / "beside") if row["kind"] == "few-step"]
    solvers = [row for row in alone if row["kind"] == "solver"]
    assert [(row["solver"], row["grid"], row["nfe"]) for row in solvers] == [
        ("jump", "uniform", n) for n in (1, 2, 4, 8)
    ]
    assert [(row["solver"], row["sampler"]) for row in rows] == 4 * [("jumper", "jump")]
    same = ("nfe", "grid", "distance", "distance_blocks", "kid", "sliced", "model", "training_images", "model_nfe")
    assert [[row[name] for name in same] for row in rows] == [[row[name] for name in same] for row in solvers]
    (exact,) = (row for row in alone if row["solver"] == "exact")
    assert exact["nfe"] == 8 and exact["distance_blocks"] == solvers[-1]["distance_blocks"], "of as many jumps"
    assert solvers[-1]["to_exact"] == pytest.approx(0, abs=1e-9) and solvers[0]["to_exact"] > 1e-4
    assert solvers[-1]["rmse"] == 0
    report = (tmp_path / "alone" / "report.md").read_text()
    assert "The exact solution is jump on uniform with 8 evaluations" in report and "objective shortcut" in report
    for model, solver, words in (
        (jumper, "euler", "use one of jump, consistency"),
        (pipeline.model, "jump", "it jumps by average velocities"),
    ):
        done = script(*f"evaluate --model {model} {begin} --out {tmp_path}/none --solvers {solver}".split())
        assert done.code == 2 and words in done.err and done.err.count("\n") == 3, done.err


def test_guidance_is_of_few_step_models_that_were_trained_with_it(
    jumper: Path, unconditional: Path, pipeline: Pipeline
) -> None:
    """One evaluation a jump, and named; flow models are not guided; in forecasts neither counts twice."""
    config = SweepConfig(n=2, guidance=1.5, batch_size=2)
    trained, found = (
        {path: load_model(path, torch.device("cpu")) for path in (jumper, unconditional, pipeline.model)},
        [],
    )
    for one in trained.values():
        (job,) = few_step_jobs("few", one, (2,), config, None)
        assert isinstance(job.source, SolverSource)
        scale, nfe = job.source.sampling.guidance.scale, job.source.sample(torch.arange(2)).nfe
        found.append((job.sampler, scale, nfe, job.model.guided))
    unguided = ("euler", 1.0, 2.0, "")
    assert found == [("jump", 1.5, 2.0, "guidance 1.5 paid in training"), unguided, unguided]
    (plain,) = few_step_jobs("few", trained[jumper], (2,), replace(config, guidance=1.0), None)
    assert plain.model.guided == "", "trained with it, and sampled without"
