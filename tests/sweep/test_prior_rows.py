"""Priors over codes in sweeps: beside solvers and alone, the same figures, resumed after a kill, and errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import TINY, Pipeline, Script
from prior_runs import open_prior, prior_run
from sweeps import measured, sweep_task, watch_samples

from midway.gen.commands import evaluate
from midway.gen.core.errors import UsageError
from midway.gen.core.processes import ProcessInfo
from midway.gen.evaluation.other_sources import PriorSource
from midway.gen.evaluation.records import CEILING, PRIOR, from_record
from midway.gen.flags.tasks import TokenizerConfig, TokenizerTask
from midway.gen.priors.decoding import Decoding
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.rules import HeadFlags
from midway.gen.priors.sampling import CodeSampling
from midway.gen.sweep import measure, store
from midway.gen.sweep.jobs import Job, SweepConfig
from midway.gen.sweep.priors import PriorPlan, budgets_for, decodings_of, prior_jobs
from midway.gen.sweep.run import Sweep
from midway.gen.trainings import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
TIMES = ("seconds", "seconds_std", "seconds_blocks", "decode_seconds", "feature_seconds", "timing")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 8 seeds: 3 a block of 20."""
    monkeypatch.setattr(store, "PART", 8)


@pytest.fixture(scope="module")
def causal(pipeline: Pipeline) -> Path:
    return prior_run(pipeline.root / "causal", pipeline.tokenizer)


@pytest.fixture(scope="module")
def masked(pipeline: Pipeline) -> Path:
    return prior_run(pipeline.root / "masked", pipeline.tokenizer, kind="masked")


@pytest.fixture(scope="module")
def other(pipeline: Pipeline) -> Path:
    """A masked prior on another tokenizer of the same images."""
    path = pipeline.root / "other-tokenizer"
    config = TokenizerConfig(width=8, downsample=4, levels=(4, 4))
    train_tokenizer.train(TokenizerTask(path, model=config, train=replace(TINY, steps=5)))
    return prior_run(pipeline.root / "other", path, kind="masked")


def task(pipeline: Pipeline, out: Path, *priors: Path, **changes: Any) -> evaluate.EvaluateTask:
    return sweep_task(
        pipeline, out, **{"priors": priors, "prior_rules": "random,maskgit", "prior_nfe": "1,4", **changes}
    )


def lines(out: Path) -> list[dict[str, Any]]:
    """results.jsonl without times."""
    rows = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(
    pipeline: Pipeline, causal: Path, masked: Path, other: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Sweep]:
    """Beside ddim of a latent model: a causal prior, a masked one, and one on another tokenizer; all guided."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "PART", 8)
        return out, evaluate.run(task(pipeline, out, causal, masked, other, guidance=2.0))


def test_rows_of_priors_are_beside_solvers(whole: tuple[Path, Sweep]) -> None:
    """By rule and NFE as counted at the trunk, guidance twice, with token-evaluations and what training took."""
    rows = [m for m in whole[1].measurements if m.kind == PRIOR]
    assert [(m.solver, m.sampler, m.grid, m.nfe, m.token_evaluations) for m in rows] == [
        ("causal", "causal", "", 8, 8),
        *(
            (f"{name} {rule}", rule, "cosine", 2 * s, 2 * s * 5)
            for name in ("masked", "other")
            for rule in ("random", "maskgit")
            for s in (1, 4)
        ),
    ]
    assert {(m.model, m.training_images, m.model_nfe) for m in rows} == {
        (name, 5 * 64, 5 * 64) for name in ("causal", "masked", "other")
    }
    assert all("rmse" not in m.metrics and "to_exact" not in m.metrics for m in rows)
    (ddim,) = (m for m in whole[1].measurements if m.solver == "ddim")
    assert ddim.token_evaluations == 8 * 4, "patches of the latents, of guided evaluations"
    records = [*map(json.loads, (whole[0] / "results.jsonl").read_text().splitlines())]
    assert [from_record(record).kind for record in records] == [m.kind for m in whole[1].measurements]
    assert [from_record(r).token_evaluations for r in records] == [m.token_evaluations for m in whole[1].measurements]
    assert len({m.record for m in rows}) == len(rows)


def test_the_report_has_them(whole: tuple[Path, Sweep]) -> None:
    text, page = ((whole[0] / name).read_text() for name in ("report.md", "report.html"))
    assert "Of the priors, " in text and "Nearest to the data: with 2 evaluations" in text
    assert "| **priors over codes, each on weights of its own** |" in text
    assert "| causal | causal | 8 | 8 |" in text and "| masked | maskgit, cosine | 2 | 10 |" in text
    assert "Prior masked: " in text and "masked prior 1x16, 4 tokens" in text and "guidance 2" in text
    assert "other: of another tokenizer than the ceiling row; its own ceiling, " in text
    assert "causal: of another tokenizer" not in text
    assert "another law than the model's at every NFE" in text and "Priors over codes" in page


def test_a_prior_has_the_figures_that_it_has_alone(
    whole: tuple[Path, Sweep], pipeline: Pipeline, masked: Path, tmp_path: Path
) -> None:
    """As --model its rules are --solvers, its budgets --nfe and its decay --grids; its ceiling is that of its own codes."""
    changes = {"model": masked, "solvers": "maskgit,random", "nfe": "1,4", "grids": "cosine", "guidance": 2.0}
    alone = evaluate.run(sweep_task(pipeline, tmp_path, **changes))
    beside = {(m.solver, m.nfe): m for m in whole[1].measurements}
    found = measured(alone)
    assert [(m.solver, m.nfe) for m in found] == [(f"masked {r}", k) for r in ("maskgit", "random") for k in (2, 8)]
    assert all(m.metrics == beside[m.solver, m.nfe].metrics for m in found)
    ceilings = [next(m for m in s.measurements if m.solver == CEILING) for s in (alone, whole[1])]
    assert ceilings[0].distance == pytest.approx(ceilings[1].distance, rel=1e-5), "FSQ decodes codes either way"
    report = (tmp_path / "report.md").read_text()
    assert "Of the priors, masked " in report and "The solver" not in report and "Every panel starts" not in report


@pytest.mark.slow
def test_a_sweep_that_was_killed_in_a_prior_gives_the_same_table(
    whole: tuple[Path, Sweep], pipeline: Pipeline, causal: Path, masked: Path, other: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The second of two processes made its parts of the first such cell; one process goes on, and makes only what is missing."""
    real, drawn = measure._sample, list[int]()

    class Killed(BaseException):
        """Nothing in the program catches it."""

    def second(source: Any, cell: Any, context: Any, fine: Any) -> None:
        theirs = isinstance(source, PriorSource)
        real(source, cell, replace(context, process=ProcessInfo(1, 2)) if theirs else context, fine)
        if theirs:
            raise Killed

    again = task(pipeline, tmp_path, causal, masked, other, guidance=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_sample", second)
        with pytest.raises(Killed):
            evaluate.run(again)
    sample = PriorSource.sample
    monkeypatch.setattr(PriorSource, "sample", lambda s, seeds: [drawn.append(int(seeds[0])), sample(s, seeds)][1])
    evaluate.run(again)
    assert drawn[:5] == [0, 0, 16, 16, 28], "the first of each size is not timed, and sampled twice"
    assert lines(tmp_path) == lines(whole[0])
    watch_samples(monkeypatch, lambda seeds, batch: drawn.append(-1))
    drawn.clear()
    evaluate.run(replace(again, batch_size=3))
    assert drawn == [] and lines(tmp_path) == lines(whole[0]), "all of it is stored, and the batch is no part of it"


def test_batches_and_processes_do_not_show(masked: Path) -> None:
    trained = open_prior(masked)
    one, few = (PriorSource(trained, CodeSampling(Decoding("halton", 2), size)) for size in (256, 3))
    seeds = torch.arange(20)
    batches = [one.sample(seeds), few.sample(seeds), one.sample(seeds[7:])]
    assert torch.equal(batches[0].values, batches[1].values) and torch.equal(batches[0].values[7:], batches[2].values)
    assert torch.equal(one.images(batches[0])[7:], few.images(batches[2])) and batches[0].finite.all()


def test_samples_without_a_finite_law_are_counted(
    pipeline: Pipeline, masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row diverged, and the others are whole."""
    from midway.gen.priors import load

    real = load.TrainedPrior

    def broken(*args: Any, **parts: Any) -> TrainedPrior:
        parts["prior"].label.weight[3] = torch.nan
        return real(*args, **parts)

    monkeypatch.setattr(load, "TrainedPrior", broken)
    sweep = evaluate.run(task(pipeline, tmp_path, masked, prior_rules="random", prior_nfe="2", exact_nfe=0))
    (row,) = (m for m in sweep.measurements if m.kind == PRIOR)
    assert row.nonfinite == 4 and row.distance == float("inf")
    assert "diverged" in (tmp_path / "report.md").read_text()


def test_budgets_and_rules(causal: Path, masked: Path) -> None:
    """Doubling up to the tokens, which are the last; at most 64. Causal priors have one, and more than the tokens is an error."""
    assert [budgets_for(n) for n in (1, 4, 6, 64)] == [(1,), (1, 2, 4), (1, 2, 4, 6), (1, 2, 4, 8, 16, 32, 64)]
    assert budgets_for(100) == budgets_for(256) == (1, 2, 4, 8, 16, 32, 64)
    plan = PriorPlan(("random", "halton"), None, "", {}, ("--prior-rules", "--prior-nfe", "--prior-decay"))
    found = decodings_of(open_prior(masked), plan, 1.0)
    assert [(how.rule, how.steps) for how in found] == [(r, s) for r in ("random", "halton") for s in (1, 2, 4)]
    assert decodings_of(open_prior(causal), replace(plan, budgets=(1, 2)), 1.0) == [Decoding("causal", 4)]
    some = decodings_of(open_prior(masked), replace(plan, budgets=(2, 9), skip=True), 1.0)
    assert [(how.rule, how.steps) for how in some] == [("random", 2), ("halton", 2)]
    jobs = prior_jobs("x", open_prior(masked), plan, SweepConfig(n=2, batch_size=2), None)
    assert [job.nfe for job in jobs] == [1, 2, 4, 1, 2, 4] and jobs[0].named == "x random on cosine at NFE 1"


def test_every_flag(pipeline: Pipeline, masked: Path, causal: Path, succeed: Script, tmp_path: Path) -> None:
    begin = f"--features {pipeline.features} --n 20 --blocks 1 --metrics= --exact-nfe 0"
    draws = "--temperature .8 --top-k 500 --top-p .9 --guidance 1.5 --guidance-ramp 1 --choice-noise 2"
    more = f"--priors {masked} --prior-rules maskgit --prior-nfe 2,9 --prior-decay arccos --skip-unreachable {draws}"
    done = succeed(
        f"evaluate --model {pipeline.model} {begin} --solvers ddim --nfe 4 --grids uniform {more} --out {tmp_path}/x"
    )
    assert "Priors over codes" in done.out or "masked" in done.out
    (row,) = (row for row in lines(tmp_path / "x") if row["kind"] == "prior")
    assert (row["solver"], row["grid"], row["nfe"]) == ("masked maskgit", "arccos", 4)
    report = (tmp_path / "x/report.md").read_text()
    assert "temperature 0.8, guidance 1.5, ramp 1, top-k 500, top-p 0.9, choice noise 2 of maskgit" in report
    succeed(f"evaluate --model {causal} {begin} --out {tmp_path}/y --temperature 0 --save-images {tmp_path}/images")
    assert "at temperature 0 every token is the most probable one" in (tmp_path / "y/report.md").read_text()
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["causal-nfe4.zip"]
    done = succeed(
        f"evaluate --model {masked} {begin} --nfe 1 --grids linear --precision bf16 --tile 8 --tile-margin 0 --out {tmp_path}/z"
    )
    rules = [row["sampler"] for row in lines(tmp_path / "z") if row["kind"] == "prior"]
    assert rules == ["random", "halton", "certain", "maskgit"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model MASKED --solvers ddim", "use one of random, halton, certain, maskgit"),
        ("--model CAUSAL --solvers halton", "this model is a causal prior"),
        ("--model CAUSAL --nfe 2", "a causal prior takes one evaluation a token"),
        ("--model MASKED --nfe 5", "give 1 to 4"),
        ("--model MASKED --grids cosine,linear", "name one of cosine, arccos, linear"),
        ("--model MASKED --grids karras", "choose one of cosine, arccos, linear"),
        ("--model MASKED --eta 1", "it is for models that are solved"),
        ("--model MASKED --repeats CAUSAL", "it is for models that are solved"),
        ("--model LATENT --solvers halton", "it is a rule by which codes are drawn"),
        ("--model LATENT --temperature .5", "it is for priors over codes"),
        ("--model LATENT --prior-nfe 2", "--prior-nfe without --priors"),
        ("--model LATENT --priors MASKED --prior-rules ddim", "use one of random, halton, certain, maskgit"),
        ("--model LATENT --priors MASKED --prior-nfe 5", "give 1 to 4"),
        ("--model LATENT --priors MASKED MASKED", "names masked twice"),
        ("--model MASKED --priors COPY", "two of these priors are the same"),
        ("--model LATENT --solvers ddim --nfe 4 --grids uniform --priors DDIM", "a run is named ddim, as another row"),
        ("--model LATENT --priors LATENT", "kind"),
    ],
)
def test_what_cannot_be_measured(
    pipeline: Pipeline, causal: Path, masked: Path, script: Script, tmp_path: Path, flags: str, words: str
) -> None:
    """Three lines, and nothing is written."""
    names = {"MASKED": masked, "CAUSAL": causal, "LATENT": pipeline.model}
    names |= {"COPY": tmp_path / "copy", "DDIM": tmp_path / "ddim"}
    for word, path in names.items():
        if word in flags.split() and word in ("COPY", "DDIM"):
            shutil.copytree(masked if word == "COPY" else causal, path)
    line = " ".join(str(names.get(word, word)) for word in flags.split())
    done = script(*f"evaluate {line} --features {pipeline.features} --out {tmp_path}/out".split())
    assert done.code in (2, 3) and words in done.err and done.err.count("\n") == 3, done.err
    assert not (tmp_path / "out").exists()


def test_a_continuous_prior_is_a_row_by_a_sampler_of_its_head(pipeline: Pipeline, masked: Path, tmp_path: Path) -> None:
    """Beside a prior over codes, which has no head; its ceiling is that of its latents, and alone the flag is an error."""
    run = prior_run(pipeline.root / "continuous", pipeline.tokenizer, kind="continuous")
    named = {"head_solver": "euler", "head_nfe": 3, "head_grid": "uniform"}
    done = evaluate.run(task(pipeline, tmp_path / "both", run, masked, prior_rules="random", **named))
    rows = [m for m in done.measurements if m.kind == PRIOR]
    assert {(m.solver, m.nfe, m.sampler) for m in rows} == {
        (f"{run.name} random", 1, "random, head euler at NFE 3 a token"),
        (f"{run.name} random", 4, "random, head euler at NFE 3 a token"),
        (f"{masked.name} random", 1, "random"),
        (f"{masked.name} random", 4, "random"),
    }
    assert all(m.token_evaluations == 5 * m.nfe for m in rows)
    assert {m.solver: m.head_nfe for m in rows} == {f"{run.name} random": 3.0, f"{masked.name} random": 0.0}
    found = jobs_of(run, 2, **named)
    assert [job.nfe for job in found] == [1, 4]
    raw = found[0].source.sample(torch.arange(5))
    assert raw.values.shape[:2] == (5, 4) and (raw.values != raw.values.round()).any()
    assert found[0].source.images(raw).dtype == torch.uint8
    with pytest.raises(UsageError, match="drop it"):
        evaluate.run(task(pipeline, tmp_path / "none", masked, **named))


def jobs_of(run: Path, blocks: int, **head: Any) -> list[Job]:
    plan = PriorPlan(("random",), (1, 4), "", {}, ("", "", ""), head=HeadFlags(*head.values()))
    return prior_jobs("it", open_prior(run), plan, SweepConfig(n=20, blocks=blocks), None)
