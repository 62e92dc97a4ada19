"""What a latent model begins with: the weights of another, a teacher's velocities, and what all of them took."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pipelines import TINY, TINY_DIT, Pipeline
from tensors import normal
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.diffusion.load import CPU, TrainedModel, load_model, origin_of
from midway.gen.diffusion.loss import alpha_of, differences, evaluations_of
from midway.gen.diffusion.model import Guidance, LatentModel, LatentModelConfig
from midway.gen.flags.tasks import LatentTask
from midway.gen.objectives.jump_config import JUMPS, JumpConfig
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.trainings import train_latent
from midway.gen.trainings.beginning import planned, velocity_of
from midway.samplers.jumps import jump
from midway.samplers.prediction import JumpField, expand
from midway.samplers.sample import ForwardCounter, sample
from midway.samplers.solvers import euler

pytestmark = pytest.mark.usefixtures("on_the_cpu", "one_thread")
TRAIN = replace(TINY, steps=3, batch_size=32, lr=3e-2, warmup=0)
LABELS = torch.tensor([0, 3, 10, 7])


def task_of(pipeline: Pipeline, out: Path, objective: str = "flow", **options: Any) -> LatentTask:
    """A tiny model on the pipeline's tokenizer; `jump`: of its objective; other options are the task's."""
    jump = JumpConfig(**options.pop("jump", {}))
    model = LatentModelConfig(objective=objective, jump=jump, dit=replace(TINY_DIT, **options.pop("dit", {})))  # pyright: ignore
    return LatentTask(out, pipeline.tokenizer, model=model, train=TRAIN, **options)


@pytest.fixture(scope="module")
def flow(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A flow model on the linear schedule."""
    run = train_latent.train(task_of(pipeline, tmp_path_factory.mktemp("flow") / "run"))
    assert run is not None
    return load_model(run.path, CPU)


def begun(task: LatentTask) -> LatentModel:
    """The model before its first step."""
    return train_latent.make_parts(planned(task), Accelerator(cpu=True)).model


def states(flow: TrainedModel) -> tuple[Tensor, Tensor]:
    """x (B, C, H, W) and t (B,)."""
    return normal(4, *flow.model.latent_shape), torch.tensor([0.2, 0.5, 0.7, 0.9])


@torch.no_grad()
def test_a_model_that_jumps_begins_as_the_flow_model_of_its_weights(
    pipeline: Pipeline, flow: TrainedModel, tmp_path: Path
) -> None:
    """Its velocity, its jumps Euler's steps, up to how a processor rounds their sums; the clock is that of the weights."""
    task = task_of(pipeline, tmp_path / "run", "imf", init=flow.run.path, dit={"time_scale": 1.0})
    made = begun(task)
    assert made.config.dit.time_scale == flow.model.config.dit.time_scale == 1000
    average, (x, t) = made.field(LABELS), states(flow)
    assert isinstance(average, JumpField)
    grid = (0.98, 0.4, 0.1)
    expected = sample(flow.model.field(LABELS), euler(made.schedule, grid), x)
    torch.testing.assert_close(sample(average, jump(made.schedule, grid), x), expected)
    torch.testing.assert_close(average.velocity(x, t).x0, flow.model.field(LABELS)(x, t).x0)
    assert not torch.equal(average.velocity(x, t).x0, begun(replace(task, init=None)).field(LABELS).velocity(x, t).x0)  # pyright: ignore


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_velocity_of_a_teacher_is_that_of_its_field(
    scale: float, pipeline: Pipeline, flow: TrainedModel, tmp_path: Path
) -> None:
    """At its guidance scale, which does nothing to samples without a class; it is no part of what is saved."""
    jump = {"teacher_guidance": scale}
    made = begun(task_of(pipeline, tmp_path / "run", "meanflow", teacher=flow.run.path, jump=jump))
    x, t = states(flow)
    assert made.teacher is not None
    found = made.teacher(x, t, LABELS)
    model, classes = flow.model, flow.model.classes > LABELS
    whole = model.field(torch.where(classes, LABELS, 0), Guidance(scale))(x, t)
    plain = model.field(LABELS)(x, t)
    x0, eps = (torch.where(expand(classes, x), a, b) for a, b in ((whole.x0, plain.x0), (whole.eps, plain.eps)))
    torch.testing.assert_close(found, eps - x0, rtol=1e-4, atol=1e-5)
    assert all(name.startswith("network.") for name in made.state_dict())


PAID: dict[str, tuple[dict[str, Any], float | None]] = {
    "plain": ({}, None),
    "guided in training": ({"guidance": 3.0}, None),
    "taught": ({}, 1.0),
    "taught by a guided one": ({"teacher_guidance": 2.0}, 2.0),
}


@pytest.mark.parametrize("objective", JUMPS)
@pytest.mark.parametrize("how", PAID)
def test_passes_through_networks_are_those_that_a_step_makes(
    how: str, objective: str, pipeline: Pipeline, flow: TrainedModel, tmp_path: Path
) -> None:
    """Counted at the networks of the model and of its teacher."""
    jump, scale = PAID[how]
    config = task_of(pipeline, tmp_path / "run", objective, jump=jump).model
    made = LatentModel(config, flow.model.latent_shape, 10)
    made.teacher = None if scale is None else velocity_of(flow, scale)
    batch = LatentBatch(normal(64, *made.latent_shape), torch.arange(64) % 10)
    with ForwardCounter(made.network, flow.model.network) as counter:
        made.loss(batch, Context(0, 5, torch.arange(64)))
    assert counter.evaluations == 64 * evaluations_of(config, taught=scale is not None)


def test_alpha_flow_in_half_precision_passes_once_more_while_its_target_is_a_difference(
    pipeline: Pipeline, flow: TrainedModel, tmp_path: Path
) -> None:
    config = task_of(pipeline, tmp_path / "run", "alphaflow", jump={"alpha_steps": 20}).model
    made = LatentModel(config, flow.model.latent_shape, 10)
    batch = LatentBatch(normal(64, *made.latent_shape), torch.arange(64) % 10)
    with ForwardCounter(made.network) as counter, torch.autocast("cpu", torch.bfloat16):
        for step in range(20):
            made.loss(batch, Context(0, step, torch.arange(64)))
    share = differences(config, 20)
    assert share == 15 / 20  # alpha is below .005 from 0.5 + log(199) / 25 = 0.71 on
    assert counter.evaluations == 20 * 64 * evaluations_of(config, taught=False, half=share)
    assert differences(replace(config, objective="imf"), 20) == 0


SETTINGS = {"finest": 5, "alpha_steps": 9, "alpha_end": 0.1, "ends": "data", "guidance": 2.0}
OWNERS = {"finest": {"shortcut"}, "alpha_steps": {"alphaflow"}, "alpha_end": {"alphaflow"}}


@pytest.mark.parametrize("objective", ["flow", *JUMPS])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_an_objective_has_not_is_an_error(
    name: str, objective: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    if (name, objective) == ("ends", "shortcut"):
        return  # an error of another kind
    task = task_of(pipeline, tmp_path / "run", objective, jump={name: SETTINGS[name]})
    if objective in OWNERS.get(name, JUMPS):
        assert getattr(planned(task).model.jump, name) == SETTINGS[name]
        return
    flag = f"--model.jump.{name.replace('_', '-')}"
    with pytest.raises(UsageError, match=rf"{flag} with objective {objective}\n.*it is of .*\n.*drop it"):
        planned(task)


def test_alpha_falls_over_all_of_the_training_or_over_its_own_steps(pipeline: Pipeline, tmp_path: Path) -> None:
    """Also of a run that is stopped before."""
    for steps, expected in ((0, [1.0, 0.5, 0.0]), (10, [1.0, 0.0, 0.0])):
        task = task_of(pipeline, tmp_path / "run", "alphaflow", jump={"alpha_steps": steps})
        task = planned(replace(task, train=replace(TRAIN, steps=20, max_steps=3)))
        assert [alpha_of(task.model, step) for step in (0, 10, 20)] == pytest.approx(expected, abs=1e-5)


def test_costs_add_up_from_the_models_that_a_model_was_made_from(
    pipeline: Pipeline, flow: TrainedModel, tmp_path: Path
) -> None:
    """Images and passes of the weights' training, of its teacher's, and its own; a model that is both is paid for once."""
    images = TRAIN.steps * TRAIN.batch_size
    took = origin_of(flow)
    assert (took.images, took.evaluations) == (images, images)
    for name, options, before in (
        ("init", {"init": flow.run.path}, images),
        ("both", {"init": flow.run.path, "teacher": flow.run.path}, images),
        ("neither", {}, 0),
    ):
        run = train_latent.train(task_of(pipeline, tmp_path / name, "shortcut", **options))
        assert run is not None
        made = load_model(run.path, CPU)
        took, taught = origin_of(made), "teacher" in options
        assert took.images == before + images
        assert took.evaluations == before + images * evaluations_of(made.model.config, taught)
        assert run.config["origin"]["init"] == (flow.hash if "init" in options else "")
        assert run.config["origin"]["teacher"] == (flow.hash if taught else "")
    again = train_latent.train(task_of(pipeline, tmp_path / "again", "imf", init=tmp_path / "init"))
    assert again is not None and origin_of(load_model(again.path, CPU)).images == 3 * images


def test_a_run_goes_on_with_its_own_teacher_alone(pipeline: Pipeline, flow: TrainedModel, tmp_path: Path) -> None:
    """And not over another number of steps, over which its alpha would fall; weights of --init were taken already."""
    task = task_of(pipeline, tmp_path / "run", "alphaflow", init=flow.run.path, teacher=flow.run.path)
    train_latent.train(replace(task, train=replace(TRAIN, max_steps=1)))
    for words, other in (
        (r"another .*origin\.teacher", replace(task, teacher=None)),
        (r"another .*origin\.init", replace(task, init=None)),
        (r"another model\.jump\.alpha_steps", replace(task, train=replace(TRAIN, steps=6))),
    ):
        with pytest.raises(UsageError, match=words):
            train_latent.train(replace(other, resume="auto"))
    assert train_latent.train(replace(task, resume="auto")) is not None


def test_what_does_not_fit_raises_an_error(pipeline: Pipeline, flow: TrainedModel, tmp_path: Path) -> None:
    """No run is left behind."""
    out, path = tmp_path / "run", flow.run.path
    jumps = train_latent.train(task_of(pipeline, tmp_path / "jumps", "shortcut"))
    assert jumps is not None
    cases: dict[str, LatentTask] = {
        "another dit.width": task_of(pipeline, out, "imf", init=path, dit={"width": 16}),
        "give --model.dit.qk-norm": task_of(pipeline, out, "imf", init=path, dit={"qk_norm": False}),
        "give --model.network dit": replace(task_of(pipeline, out, init=path), model=LatentModelConfig(network="unet")),
        "tokenizer and --flip": task_of(pipeline, out, "imf", init=path, flip=True),
        "another schedule": task_of(pipeline, out, "imf", teacher=pipeline.model),
        "it jumps, and a teacher gives velocities at one time": task_of(pipeline, out, "imf", teacher=jumps.path),
        "are for models that jump": task_of(pipeline, out, teacher=path),
        "nobody to guide": task_of(pipeline, out, "imf", jump={"teacher_guidance": 2.0}),
        "learned from one of them": task_of(pipeline, out, "imf", teacher=path, jump={"guidance": 2.0}),
    }
    for words, task in cases.items():
        with pytest.raises(UsageError, match=words):
            train_latent.train(task)
        assert not out.exists()
