"""The choice of guidance: on seeds that are not scored, at a cost that is counted, the same after a kill, and in the report."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pipelines import Pipeline, Script
from resuming import seal
from safetensors.torch import load_file, save_file
from sweeps import measured, sweep_task, watch_samples

from midway.gen.commands import evaluate
from midway.gen.core.errors import UsageError
from midway.gen.core.files import read_tensors
from midway.gen.data.splits import load_splits
from midway.gen.diffusion.model import EVERYWHERE
from midway.gen.evaluation.sources import EvaluatedLatentModel, SolverSource
from midway.gen.features.open import named_extractor
from midway.gen.features.reference import make_reference
from midway.gen.flags.evaluation_flags import EvaluateTask
from midway.gen.report.plots import RING, guidance_figure, guidance_lines
from midway.gen.report.sections import guidance_table
from midway.gen.sweep import guidance
from midway.gen.sweep.guidance import GuidanceChoice, Key, Tried, best_of, parts_of, searched_jobs
from midway.gen.sweep.jobs import GuidanceSearch, Job, SweepConfig
from midway.gen.sweep.run import Sweep
from midway.gen.sweep.store import Seeds

pytestmark = pytest.mark.usefixtures("one_thread")
SCALES, INTERVALS = "1,2,-3", "0:inf,.3:5"
PARTLY = (0.3, 5.0)


def task(pipeline: Pipeline, out: Path, **changes: Any) -> EvaluateTask:
    flags = {"guidance_scales": SCALES, "guidance_intervals": INTERVALS, "nfe": "4,8", "metrics": "", **changes}
    return sweep_task(pipeline, out, **flags)


def chosen_of(sweep: Sweep) -> GuidanceChoice:
    assert isinstance(sweep.choice, GuidanceChoice)
    return sweep.choice


@pytest.fixture(scope="module")
def done(
    pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sweep, Path, list[tuple[str, list[int]]]]:
    """A sweep, its folder, and guidance and seeds of all that was sampled."""
    seen, out = list[tuple[str, list[int]]](), tmp_path_factory.mktemp("guided") / "report"
    with pytest.MonkeyPatch.context() as patch:
        watch_samples(patch, lambda seeds, batch: seen.append(("", seeds.tolist())))
        real = SolverSource.sample

        def sample(self: SolverSource, seeds: torch.Tensor) -> Any:
            found = real(self, seeds)
            seen[-1] = (str(self.identity), seeds.tolist())
            return found

        patch.setattr(SolverSource, "sample", sample)
        sweep = evaluate.run(task(pipeline, out))
    return sweep, out, seen


def test_the_choice_reads_no_seed_that_is_scored(done: Any) -> None:
    """All candidates have the seeds after those that are scored; the chosen ones have the others."""
    sweep, _, seen = done
    choice, first = chosen_of(sweep), 2 * 20
    tried = [name for name, seeds in seen if min(seeds) >= first]
    scored = {name for name, seeds in seen if min(seeds) < first}
    assert all(max(seeds) < first or min(seeds) >= first for _, seeds in seen)
    assert sorted({seed for _, seeds in seen for seed in seeds}) == list(range(first + 8))
    assert len(tried) == len(set(tried)) == len(choice.figures) == 2 * (1 + 2 * 2)
    assert len(scored) == len(choice.chosen) == len(measured(sweep)) and scored < {*tried}


def test_figures_are_distances_of_the_seeds_of_choice(done: Any, pipeline: Pipeline) -> None:
    """All candidates sample otherwise, and the best of all is among what is scored."""
    sweep, _, _ = done
    choice, trained = chosen_of(sweep), pipeline.load()
    config = SweepConfig(
        solvers=("ddim",), nfe=(4, 8), grids=("uniform",), n=20, exact_nfe=0, batch_size=8,
        search=GuidanceSearch((1.0, 2.0, -3.0), (EVERYWHERE, PARTLY)),
        draw=next(job.draw for job in sweep.jobs.values()),
    )  # fmt: skip
    jobs = {guidance.key_of(job): job for job in searched_jobs(EvaluatedLatentModel(trained), config)}
    assert jobs.keys() == choice.figures.keys()
    for key, its in choice.figures.items():
        assert its.nfe == jobs[key].source.sample(torch.arange(3)).nfe
    assert min(choice.figures, key=lambda key: choice.figures[key].rank) in choice.chosen
    assert len({its.figure for its in choice.figures.values()}) == len(choice.figures)
    network, one = (
        named_extractor(str(pipeline.features), trained.data, "the model"),
        ("ddim", 4, "w 2 at 0.3 to 5", "uniform"),
    )
    reference = make_reference(network, network.name, load_splits(trained.data).train)
    source = jobs[one].source
    features = reference.activations(source.images(source.sample(torch.arange(40, 48)))).features
    assert choice.figures[one].figure == pytest.approx(reference.distance_of(features))


def test_what_is_guided_costs_twice_within_its_interval_alone(done: Any, pipeline: Pipeline) -> None:
    sweep, _, _ = done
    schedule, figures = pipeline.load().model.schedule, chosen_of(sweep).figures
    for (_, budget, words, _), its in figures.items():
        job = next(job for job in sweep.jobs.values() if isinstance(job.source, SolverSource))
        assert isinstance(job.source, SolverSource)
        if words == "w 1":
            assert its.nfe == budget
        elif "at" not in words:
            assert its.nfe == 2 * budget
        else:
            times = torch.tensor(_times(pipeline, budget), dtype=torch.float64)
            inside = int(((schedule.rho(times) > PARTLY[0]) & (schedule.rho(times) <= PARTLY[1])).sum())
            assert 0 < inside < budget and its.nfe == budget + inside
    for m in measured(sweep):
        assert any(m.nfe == figures[key].nfe and m.guidance == key[2] for key in chosen_of(sweep).chosen)
    assert chosen_of(sweep).evaluations == 8 * sum(its.nfe for its in figures.values())


def _times(pipeline: Pipeline, nfe: int) -> list[float]:
    config = SweepConfig(solvers=("ddim",), nfe=(nfe,), grids=("uniform",), n=2, exact_nfe=0)
    sampler = EvaluatedLatentModel(pipeline.load()).samplers("ddim", nfe, config)["uniform"]
    return list(sampler.grid[:-1])


def test_the_report_shows_every_candidate_and_marks_what_was_scored(done: Any) -> None:
    sweep, out, _ = done
    choice = chosen_of(sweep)
    rows = [row for row in csv.DictReader((out / "results.csv").open()) if row["kind"] == "solver"]
    assert {row["guidance"] for row in rows} == {key[2] for key in choice.chosen}
    table = guidance_table(choice)
    assert table.heads == ("solver, budget", "w 1", "w 2", "w 2 at 0.3 to 5", "w -3", "w -3 at 0.3 to 5")
    assert sum(entry is not None and entry.best for line in table.lines for entry in line.entries) == len(choice.chosen)
    text = (out / "report.md").read_text()
    assert "Choice of the guidance" in text and "were chosen among 10 candidates" in text
    assert rows[0]["guidance"] in text.split("## ")[0] and "chosen for every row" in text
    assert "(distance_vs_guidance.png)" in text and (out / "distance_vs_guidance.png").stat().st_size > 1000
    page = (out / "report.html").read_text()
    assert page.count("Distance to the data against the scale of guidance") >= 2  # wide and narrow
    assert (
        "Choice of the guidance" in page and "the time grid and the scale w of guidance, chosen on other seeds" in page
    )


def test_the_cost_is_announced(
    done: Any, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the choice as a bound, afterwards as it is."""
    sweep, out, _ = done
    evaluate.run(task(pipeline, out))
    text, count = capsys.readouterr().out, len(measured(sweep))
    assert f"to measure: {count} cells of 2 x 20 images, {count} of them stored already: nothing is left" in text
    evaluate.run(task(pipeline, tmp_path, nfe="4", guidance_scales="1,2", guidance_intervals=None))
    assert "to measure: at most 2 cells of 2 x 20 images, 0 of them stored already: at most " in capsys.readouterr().out


def test_a_killed_choice_goes_on_to_the_same_bytes(
    done: Any, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within the choice, and within a measurement; nothing is sampled twice."""
    sweep, out, seen = done
    real, calls = SolverSource.sample, list[int]()

    def sample(self: SolverSource, seeds: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) in (4, 14):
            raise KeyboardInterrupt
        return real(self, seeds)

    monkeypatch.setattr("midway.gen.sweep.tally.Tally.warm_up", lambda *_: None)
    monkeypatch.setattr(SolverSource, "sample", sample)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(task(pipeline, tmp_path / "report"))
    again = evaluate.run(task(pipeline, tmp_path / "report"))
    assert len(calls) == len(seen) + 2
    assert chosen_of(again) == chosen_of(sweep)
    for path in sorted((out / "cells").glob("*.parts/*")):
        assert read_tensors(path) == read_tensors(tmp_path / "report/cells" / path.relative_to(out / "cells"))
    ours, theirs = (_numbers(folder / "cells") for folder in (out, tmp_path / "report"))
    assert ours == theirs and ours


def _numbers(folder: Path) -> dict[str, Any]:
    found = {path.name: json.loads(path.read_text())["numbers"] for path in sorted(folder.glob("*.json"))}
    return {name: {k: v for k, v in its.items() if "seconds" not in k} for name, its in found.items()}


def test_a_weaker_model_takes_part(pipeline: Pipeline, tmp_path: Path) -> None:
    """Beside the missing class, by its own name; here one that differs in the last digits."""
    weak = tmp_path / "weak"
    shutil.copytree(pipeline.model, weak, ignore=shutil.ignore_patterns("solvers"))
    (file,) = weak.glob("checkpoints/step-*/ema.safetensors")
    save_file({name: value * (1 + 1e-7) for name, value in load_file(file).items()}, file)
    seal(file.parent)
    sweep = evaluate.run(task(pipeline, tmp_path / "report", guide=weak, nfe="4", guidance_scales="1,2"))
    found = chosen_of(sweep).figures
    assert len(found) == 1 + 2 * 2 and sum(" by " in words for _, _, words, _ in found) == 2
    by_class = {words.partition(" by ")[0]: its for (_, _, words, _), its in found.items() if " by " not in words}
    for (_, _, words, _), its in found.items():
        if words.endswith(" by weak"):  # guided by itself it is unguided, at the cost of both
            assert its.nfe == by_class[words.partition(" by ")[0]].nfe
            assert its.figure == pytest.approx(by_class["w 1"].figure, rel=1e-3)


# ---- the plot ----


def plotted() -> GuidanceChoice:
    """Two solvers, two grids, an interval, a weaker model; one candidate diverged."""
    values = {"w 1": 3.0, "w 2": 2.0, "w -3": None, "w 2 at 0.3 to 5": 1.5, "w 2 by weak": 1.0}
    figures = {
        (solver, nfe, words, grid): Tried(None if value is None else value + worse, nfe, 0.1)
        for solver, nfe in (("ddim", 4), ("ddim", 8), ("heun", 8))
        for words, value in values.items()
        for grid, worse in (("uniform", 0.5), ("karras", 8 / nfe))
    }
    return GuidanceChoice(figures, best_of(figures), Seeds(40, 8, 8))


def test_a_line_has_the_best_grid_of_every_scale_that_did_not_diverge() -> None:
    choice = plotted()
    lines = {(line.budget, line.rest): line.keys for line in guidance_lines(choice, "ddim")}
    assert list(lines) == [(nfe, rest) for nfe in (4, 8) for rest in ("", "at 0.3 to 5", "by weak")]
    assert lines[4, ""] == (("ddim", 4, "w 1", "uniform"), ("ddim", 4, "w 2", "uniform"))
    assert lines[8, "by weak"] == (("ddim", 8, "w 1", "uniform"), ("ddim", 8, "w 2 by weak", "uniform"))


@pytest.mark.parametrize("narrow", [False, True])
def test_the_plot_marks_what_was_scored_and_the_least(narrow: bool) -> None:
    choice = plotted()
    panels: list[Any] = guidance_figure(choice, narrow).axes
    assert [axes.get_title("left") for axes in panels] == ["ddim", "heun"]
    assert len({axes.get_ylim() for axes in panels}) == 1
    for axes, solver in zip(panels, ("ddim", "heun"), strict=True):
        drawn: list[Any] = [line for line in axes.lines if len(line.get_xdata())]
        marks = {(x, y) for line in drawn if line.get_markersize() == RING["markersize"] for x, y in line.get_xydata()}
        scored = {key for key in choice.chosen if key[0] == solver}
        assert marks == {(parts_of(key[2])[0], choice.figures[key].figure) for key in scored}
        stars = [line.get_xydata().tolist() for line in drawn if line.get_marker() == "*"]
        assert stars == ([[[2.0, 1.5]]] if solver == "ddim" else [])
        assert len(axes.collections) == sum(len(line.keys) > 1 for line in guidance_lines(choice, solver))
    names = [text.get_text() for text in panels[0].figure.legends[0].get_texts()]
    kinds = ["all noise levels, by the missing class", "noise levels 0.3 to 5", "by weak"]
    assert names == ["budget 4", "budget 8", *kinds, "scored", "least of all"]


@pytest.mark.parametrize(("images", "dim", "known"), [(40, 3, True), (19, 3, False), (40, 513, False)])
def test_the_error_of_a_distance_is_that_of_a_mean(images: int, dim: int, known: bool) -> None:
    """Where the figure is a mean: its standard error over groups."""
    features = torch.arange(images * dim, dtype=torch.float64).view(images, dim)
    spaces = {"": SimpleNamespace(distance_of=lambda rows: rows.mean().item())}
    found, error = guidance._distance(features, SimpleNamespace(spaces=spaces))  # pyright: ignore
    groups = features.mean(1).view(10, -1).mean(1) if known else torch.zeros(2)
    assert found == features.mean().item()
    assert error == pytest.approx(groups.std().item() / 10**0.5)


def test_nothing_to_plot_is_a_text() -> None:
    figures = {("ddim", 4, "w 2", "uniform"): Tried(None, 8)}
    (axes,) = guidance_figure(GuidanceChoice(figures, best_of(figures), Seeds(40, 8, 8))).axes
    assert [text.get_text() for text in axes.texts] == ["no finite distance to plot"]


# ---- the rule ----


def _tried(**rows: tuple[int, float | None, float]) -> dict[Key, Tried]:
    return {("ddim", budget, name, "g"): Tried(figure, nfe) for name, (budget, figure, nfe) in rows.items()}


def test_the_best_at_every_cost_that_nothing_cheaper_reaches() -> None:
    found = _tried(a=(4, 2.0, 4), b=(4, 1.0, 8), c=(4, None, 8), d=(8, 1.5, 8), e=(8, 1.2, 12), f=(8, 0.5, 16))
    assert {key[2] for key in best_of(found)} == {"a", "b", "f"}, "d costs what b does, e more"
    assert {key[2] for key in best_of(_tried(a=(4, 1.0, 4), b=(4, 1.0, 8)))} == {"a"}
    assert {key[2] for key in best_of(_tried(a=(4, None, 4), b=(4, None, 8)))} == {"a"}
    two = {**found, ("euler", 4, "g", "g"): Tried(9.0, 4.0)}
    assert {key[2] for key in best_of(two)} == {"a", "b", "f", "g"}, "each solver by itself"
    choice = GuidanceChoice(found, best_of(found), Seeds(40, 8, 1))
    jobs = [Job("ddim", "g", Any, 4, guidance="b"), Job("ddim", "g", Any, 8, guidance="d"), Job("few", "g", Any, 4)]  # pyright: ignore
    assert choice.of(jobs) == [jobs[0], jobs[2]]


def test_a_learned_solver_takes_part_with_its_own_guidance(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def jobs(model: Any, config: SweepConfig) -> list[Job]:
        if config.guidance != 2:
            raise UsageError(f"learned at 2, not {config.guidance}", "", "")
        return [Job(solver, "best", Any, nfe) for solver in config.solvers for nfe in config.nfe]  # pyright: ignore

    monkeypatch.setattr(guidance, "solver_jobs", jobs)
    model = EvaluatedLatentModel(pipeline.load())
    config = SweepConfig(solvers=("table",), nfe=(4,), n=2, search=GuidanceSearch((1.0, 2.0, 3.0)))
    assert [(job.nfe, job.guidance) for job in searched_jobs(model, config)] == [(4, "w 2")]
    with pytest.raises(UsageError, match="learned at 2, not 3"):
        searched_jobs(model, replace(config, search=GuidanceSearch((1.0, 3.0))))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--guidance-scales 1,x", "write them as --guidance-scales"),
        ("--guidance-scales 1,inf", "a guidance scale is a finite number"),
        ("--guidance-scales ,", "no scale or no interval"),
        ("--guidance-scales 2 --guidance-intervals 5:0.3", "low < high"),
        ("--guidance-scales 2 --guidance-intervals 5", "write them as"),
        ("--guidance-intervals 0:inf", "--guidance-intervals without --guidance-scales"),
        ("--guidance-scales 2 --guidance 2", "drop --guidance"),
        ("--guidance-scales 2 --guidance-interval 0.3 5", "drop --guidance-interval"),
        ("--guidance-scales 2 --repeats {0}", "drop --repeats"),
    ],
)
def test_what_cannot_be_searched(pipeline: Pipeline, script: Script, tmp_path: Path, flags: str, words: str) -> None:
    line = f"evaluate --model {pipeline.model} {flags.format(pipeline.model)} --out {tmp_path}/out"
    failed = script(*line.split())
    assert failed.code == 2 and words in failed.err and failed.err.count("\n") == 3, failed.err
    assert not (tmp_path / "out").exists()
