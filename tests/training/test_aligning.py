"""Latent models aligned with a feature network: what runs record, who may measure them, and what is left when they sample."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import TINY, TINY_DIT, Outcome, Pipeline, Script
from resuming import assert_same_run
from safetensors.torch import load_file

from midway.gen.commands import posthoc_ema
from midway.gen.core.checkpoints import directories
from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.runs import OWN
from midway.gen.diffusion.load import CPU, TRAINED_ONLY, Origin, check_apart, load_model, origin_of, recorded_origin
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.diffusion.pairs import ReflowConfig
from midway.gen.features.classifier import load_features
from midway.gen.flags.tasks import LatentTask
from midway.gen.objectives.alignment import AlignConfig
from midway.gen.training.config import OnlineConfig
from midway.gen.trainings import train_features, train_latent
from midway.gen.trainings.beginning import planned

pytestmark = pytest.mark.usefixtures("on_the_cpu", "one_thread")
TRAIN = replace(TINY, steps=4, batch_size=32, posthoc=(0.1,), posthoc_every=2)


def task_of(pipeline: Pipeline, out: Path, **options: Any) -> LatentTask:
    """Aligned with the pipeline's classifier; options are the task's, `align` of its settings."""
    align = AlignConfig(**{"teacher": str(pipeline.features), **options.pop("align", {})})
    model = LatentModelConfig(schedule="cosine", dit=TINY_DIT)
    return LatentTask(out, pipeline.tokenizer, **{"model": model, "train": TRAIN, "align": align, **options})


def trained(task: LatentTask) -> Path:
    run = train_latent.train(task)
    assert run is not None
    return run.path


@pytest.fixture(scope="module")
def aligned(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(task_of(pipeline, tmp_path_factory.mktemp("aligned") / "run"))


@pytest.fixture(scope="module")
def teacher(pipeline: Pipeline) -> str:
    """The name of the network."""
    (newest,) = directories(pipeline.features / "checkpoints")[:1]
    best = directories(pipeline.features / "best")
    return load_features((best[0] if best else newest) / "features.safetensors").name


def test_a_run_records_its_teacher_and_what_that_took(aligned: Path, pipeline: Pipeline, teacher: str) -> None:
    run = load_model(aligned, CPU).run
    assert recorded_origin(run) == Origin(evaluations=1438, aligned=(teacher,))
    assert origin_of(load_model(aligned, CPU)).aligned == (teacher,)
    assert f"| hidden tokens aligned with | {teacher} |" in (aligned / "model/README.md").read_text()
    (maps,) = pipeline.tokenizer.glob("maps-*-2x2-views1")
    assert OWN.fullmatch(maps.name), "part of the run that it is in"
    assert '"alignment": ' in (aligned / "metrics.jsonl").read_text()


def test_the_projector_is_trained_kept_for_resuming_and_absent_when_sampling(aligned: Path, pipeline: Pipeline) -> None:
    checkpoint = directories(aligned / "checkpoints")[0]
    for file in ("model", "ema", "optimizer"):
        assert any(name.startswith(TRAINED_ONLY) for name in load_file(checkpoint / f"{file}.safetensors")), file
    model = load_model(aligned, CPU).model
    assert model.alignment is None and model.state_dict().keys() == pipeline.load().model.state_dict().keys()
    shared = load_file(aligned / "model/diffusion_pytorch_model.safetensors")
    assert shared.keys() == model.state_dict().keys()
    averaged = load_file(checkpoint / "ema.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())


def test_weights_start_as_without_alignment_and_its_draws_are_those_of_none(pipeline: Pipeline, tmp_path: Path) -> None:
    """At weight 0 the network learns the same, bit for bit."""
    nothing = {"align": {"weight": 0.0}, "train": replace(TRAIN, clip=1e9)}
    with_it = trained(task_of(pipeline, tmp_path / "with", **nothing))
    without = trained(replace(task_of(pipeline, tmp_path / "without", **nothing), align=AlignConfig()))
    ours, plain = (load_file(directories(run / "checkpoints")[0] / "model.safetensors") for run in (with_it, without))
    assert plain and all(torch.equal(value, ours[name]) for name, value in plain.items())
    assert (with_it / "model/config.json").read_text() == (without / "model/config.json").read_text()


def test_nobody_measures_a_model_by_its_teacher(
    aligned: Path, pipeline: Pipeline, teacher: str, script: Script, tmp_path: Path
) -> None:
    def measured(*flags: object) -> Outcome:
        budget = ("--solvers", "euler", "--nfe", 2, "--grids", "uniform", "--n", 20, "--blocks", 1, "--exact-nfe", 0)
        return script("evaluate", *budget, "--out", tmp_path / "report", *flags)

    refused = [
        measured("--model", aligned, "--features", pipeline.features),
        measured("--model", aligned, "--features", f"pixels,{pipeline.features}"),
        measured("--model", pipeline.model, "--few-step", aligned, "--features", pipeline.features),
    ]
    for outcome in refused:
        assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 3
        assert f"cannot be measured by {teacher}" in outcome.err
    assert not (tmp_path / "report").exists()
    assert measured("--model", aligned, "--features", "pixels").code == 0
    assert f"hidden tokens aligned with {teacher}" in (tmp_path / "report/report.md").read_text()


def test_nor_in_training_nor_what_descends_from_it(
    aligned: Path, pipeline: Pipeline, teacher: str, tmp_path: Path
) -> None:
    online = {
        "train": replace(TRAIN, measure_every=2),
        "early": OnlineConfig((2,), 20, features=str(pipeline.features)),
    }
    with pytest.raises(UsageError, match=f"this model cannot be measured by {teacher}"):
        train_latent.train(task_of(pipeline, tmp_path / "online", **online))
    assert not (tmp_path / "online").exists()
    begun = trained(replace(task_of(pipeline, tmp_path / "begun", init=aligned), align=AlignConfig()))
    averaged = posthoc_ema.make(posthoc_ema.PosthocTask(aligned, 0.1, tmp_path / "averaged")).path
    for run in (begun, averaged):
        found = load_model(run, CPU)
        assert found.model.alignment is None and recorded_origin(found.run).aligned == (teacher,)
    with pytest.raises(UsageError):
        check_apart("run", ("effnet-lite0@579344248a93+bicubic-32",), "effnet-lite0-full@579344248a93+bicubic-32")
    check_apart("run", ("cnn-digits@000000000000",), teacher)


def test_a_run_resumes_with_its_teacher_alone(pipeline: Pipeline, aligned: Path, tmp_path: Path) -> None:
    """Also from another place; a network of other weights is another run."""
    stopped = task_of(pipeline, tmp_path / "run", train=replace(TRAIN, max_steps=2))
    trained(stopped)
    other = train_features.train(
        train_features.FeaturesTask(tmp_path / "other", width=8, dim=8, train=replace(TINY, steps=2))
    )
    assert other is not None
    again = replace(stopped, train=TRAIN, resume="auto")
    with pytest.raises(UsageError, match=r"another origin\.aligned"):
        train_latent.train(replace(again, align=AlignConfig(teacher=str(other.path))))
    (tmp_path / "moved").symlink_to(pipeline.features)
    assert_same_run(trained(replace(again, align=AlignConfig(teacher=str(tmp_path / "moved")))), aligned)


def test_the_end_is_a_share_of_the_steps(pipeline: Pipeline, tmp_path: Path) -> None:
    task = task_of(pipeline, tmp_path, align={"until": 0.3}, train=replace(TRAIN, steps=40))
    assert planned(task).align.steps == 12 and planned(planned(task)) == planned(task)
    assert planned(replace(task, align=replace(task.align, until=1.0))).align.steps == 0, (
        "so that more steps may follow"
    )


def test_flags_that_do_not_go_together_raise(pipeline: Pipeline, tmp_path: Path) -> None:
    task = task_of(pipeline, tmp_path / "run")
    wrong = {
        "--align without a teacher": replace(task, align=AlignConfig(weight=1)),
        "--align.teacher with --reflow.source": replace(task, reflow=ReflowConfig(source=pipeline.model)),
        "pixels-32 has no feature map": replace(task, align=AlignConfig("pixels")),
        "--align.teacher pixel": replace(task, align=AlignConfig("pixel")),
        "hidden tokens cannot be aligned": replace(task, align=replace(task.align, block=3)),
    }
    for what, one in wrong.items():
        with pytest.raises(UsageError) as caught:
            train_latent.train(one)
        assert caught.value.what == what and not (tmp_path / "run").exists()
    others = train_features.FeaturesTask(
        tmp_path / "others",
        replace(train_features.FeaturesTask(tmp_path).data, held_out=0.5),
        8,
        8,
        train=replace(TINY, steps=1),
    )
    train_features.train(others)
    with pytest.raises(DataError, match="trained on other images"):
        train_latent.train(replace(task, align=AlignConfig(str(tmp_path / "others"))))


def test_a_dry_run_has_the_projector(pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []
    for align in (AlignConfig(), AlignConfig(str(pipeline.features))):
        train_latent.train(replace(task_of(pipeline, tmp_path / "run"), align=align, dry_run=True))
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters"))
        sizes.append(int(line.split()[1].replace(",", "")))
    assert sizes[1] - sizes[0] == 32 * 64 + 64 + 64 * 64 + 64 + 64 * 32 + 32
