"""What a training begins with: the weights of another model, a teacher's velocities, and what both cost before."""

from dataclasses import fields, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.core.processes import ProcessInfo
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.diffusion.field import Velocity
from midway.gen.diffusion.load import NOTHING, Origin, TrainedModel, load_model, origin_of
from midway.gen.diffusion.model import LatentModel
from midway.gen.diffusion.pairs import Pairs, PairSource, draw_pairs
from midway.gen.flags.tasks import LatentTask
from midway.gen.objectives.jump_config import OF, JumpConfig, without_effect
from midway.gen.trainings.aligning import planned_alignment
from midway.samplers.prediction import expand
from midway.tokenizers.tokenizer import ImageTokenizer

NEW = "network.more."
"""Weights that a model that jumps has beside those of a flow model; they start as 0."""


def planned(task: LatentTask) -> LatentTask:
    """The task with what follows from others of its flags: alpha's steps, and the time scale of the weights of --init.

    UsageError for flags that have no effect.
    """
    model, jump = task.model, task.model.jump
    if task.teacher is not None and not model.is_jump:
        raise UsageError(
            "--teacher with objective flow",
            "its velocities are for models that jump",
            "add --model.objective alphaflow, say, or drop it",
        )
    if task.teacher is None and jump.teacher_guidance != 1:
        raise UsageError("--model.jump.teacher-guidance without --teacher", "there is nobody to guide", "add --teacher")
    if task.teacher is not None and jump.guidance != 1:
        raise UsageError(
            "--teacher and --model.jump.guidance",
            "guidance is learned from one of them",
            "use --model.jump.teacher-guidance, or drop --teacher",
        )
    for name in without_effect(model.objective, jump):
        flag = f"--model.jump.{name.replace('_', '-')}"
        of, plain = " and ".join(OF[name]), getattr(JumpConfig(), name)
        raise UsageError(
            f"{flag} with objective {model.objective}", f"it is of {of}", f"drop it, which is {flag} {plain}"
        )
    if model.objective == "alphaflow" and jump.alpha_steps == 0:
        model = replace(model, jump=replace(jump, alpha_steps=task.train.steps))
    if task.init is not None and not task.dry_run:
        scale = load_model(task.init, torch.device("cpu")).model.config.size.time_scale
        model = replace(model, **{model.network: replace(model.size, time_scale=scale)})
    return planned_alignment(replace(task, model=model))


def begin(task: LatentTask, model: LatentModel, tokenizer: ImageTokenizer, device: torch.device) -> Origin:
    """Give `model` the weights of --init and the teacher of --teacher; what both are, and what their trainings took.

    UsageError for models of another process, network, classes or latents.
    """
    origin = NOTHING
    if task.init is not None:
        source = load_model(task.init, torch.device("cpu"))
        _check_same(f"--init {task.init}", source, model, tokenizer, weights=True)
        state = source.model.state_dict()
        model.load_state_dict(
            model.state_dict() | {name: value for name, value in state.items() if name in _names(model)}
        )
        origin += replace(origin_of(source), init=source.hash)
    if task.teacher is not None:
        teacher = load_model(task.teacher, device)
        _check_same(f"--teacher {task.teacher}", teacher, model, tokenizer)
        if teacher.model.config.is_jump:
            raise UsageError(
                f"--teacher {task.teacher}", "it jumps, and a teacher gives velocities at one time", "give a flow model"
            )
        model.teacher = velocity_of(teacher, task.model.jump.teacher_guidance)
        spent = NOTHING if teacher.hash == origin.init else origin_of(teacher)  # paid for once
        origin += replace(spent, teacher=teacher.hash)
    return origin


def begin_pairs(
    task: LatentTask,
    model: LatentModel,
    tokenizer: ImageTokenizer,
    accelerator: Accelerator,
    draw: ClassDraw | None,
    origin: Origin,
) -> tuple[Pairs, Origin]:
    """The pairs of --reflow, drawn if they are not there, and `origin` with what the source and they took.

    UsageError for a source of other latents or classes, or that jumps; errors as `draw_pairs`.
    """
    assert task.reflow.source is not None
    source = load_model(task.reflow.source, accelerator.device)
    _check_latents(f"--reflow.source {task.reflow.source}", source, model, tokenizer)
    if source.model.config.is_jump:
        why = "it jumps, and pairs are those of an ODE that is solved"
        raise UsageError(f"--reflow.source {task.reflow.source}", why, "give a flow model")
    from_where = PairSource(source, task.reflow, draw)
    process = ProcessInfo(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    pairs = draw_pairs(from_where, process)
    spent = NOTHING if source.hash in (origin.init, origin.teacher) else origin_of(source)  # paid for once
    total = replace(spent, evaluations=spent.evaluations + pairs.evaluations, pairs=from_where.hash)
    return pairs, origin + total


def velocity_of(trained: TrainedModel, guidance: float = 1.0) -> Velocity:
    """The velocity of a model's field at the guidance scale: (z_t (B, *), t (B,), labels (B,)) -> (B, *).

    UsageError for guidance that the model cannot have.
    """
    model = trained.model

    def velocity(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        null = model.null_labels(labels)
        plain = model.conditional_field(z, t, labels)
        d_alpha, d_sigma = (expand(rate, z) for rate in model.schedule.rates(t))
        found = d_alpha * plain.x0 + d_sigma * plain.eps
        if guidance == 1:
            return found
        weak = model.conditional_field(z, t, null)
        return torch.lerp(d_alpha * weak.x0 + d_sigma * weak.eps, found, guidance)

    if guidance != 1:
        from midway.gen.diffusion.model import Guidance
        from midway.gen.diffusion.sampler_checks import check_guidance

        check_guidance(Guidance(guidance), None, trained)
    return velocity


def _names(model: LatentModel) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def _check_same(
    flag: str, source: TrainedModel, model: LatentModel, tokenizer: ImageTokenizer, weights: bool = False
) -> None:
    """UsageError unless a model is of the same process, latents and classes; for its weights of the same network and target."""
    theirs, ours = source.model.config, model.config
    pairs: dict[str, tuple[Any, Any]] = {"schedule": (theirs.schedule, ours.schedule)}
    if weights:
        pairs["network"] = (theirs.network, ours.network)
        group, sizes = ours.network, [field.name for field in fields(ours.size) if field.name != "dropout"]
        both = getattr(theirs, group), ours.size
        pairs |= {f"{group}.{name}": (getattr(both[0], name), getattr(both[1], name)) for name in sizes}
        pairs["target"] = (theirs.target, ours.target)
    for name, (its, own) in pairs.items():
        if its != own:
            raise UsageError(
                f"{flag} is of another {name}", f"{its}, this model has {own}", f"give {_typed(name, its)}"
            )
    _check_latents(flag, source, model, tokenizer)


def _typed(name: str, value: object) -> str:
    """The flag of a setting as it is typed."""
    group, _, own = f"--model.{name}".replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"{group}.{own}" if value else f"{group}.no-{own}"
    return f"{group}.{own} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _check_latents(flag: str, source: TrainedModel, model: LatentModel, tokenizer: ImageTokenizer) -> None:
    """UsageError unless a model is of the same latents and classes."""
    shapes = {
        "latents": (source.model.latent_shape, model.latent_shape),
        "classes": (source.model.classes, model.classes),
    }
    for name, (its, own) in shapes.items():
        if its != own:
            fix = "give the --tokenizer of that run"
            raise UsageError(f"{flag} is of another {name}", f"{its}, this model has {own}", fix)
    if not _same_latents(source.tokenizer, tokenizer):
        raise UsageError(
            f"{flag} is of other latents",
            "their tokenizer, or the mean and std that they are standardised by, is another",
            "give --tokenizer and --flip as in that run",
        )


def _same_latents(theirs: ImageTokenizer, ours: ImageTokenizer) -> bool:
    """Whether two tokenizers have equal weights and statistics of latents, wherever they are."""
    a, b = theirs.state_dict(), ours.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value.cpu(), b[name].cpu()) for name, value in a.items())
