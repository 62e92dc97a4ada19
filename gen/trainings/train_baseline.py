"""Train a baseline: midway train baseline digits-glow

A VAE or a normalizing flow, scored in bits per dimension of held-out images. With validation, the best weights are stored in
best/ of the run, and other commands load them. Validation uses the held-out images, so the final score of weights chosen on them
is slightly optimistic.
"""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from midway.gen.baselines.base import KIND, Baseline, write_baseline
from midway.gen.baselines.registry import BASELINES, load_trained_baseline
from midway.gen.baselines.vae import VAE, coordinate_kl, interpolate, reconstruct, traverse
from midway.gen.core.config import read_yaml, to_record
from midway.gen.core.errors import DataError, UsageError, nearest, raising
from midway.gen.core.runs import Run
from midway.gen.data.images import describe, empty_classes, to_uint8
from midway.gen.data.pictures import save_grid
from midway.gen.data.splits import Splits, load_splits
from midway.gen.diffusion.sampling import labels_of
from midway.gen.evaluation.likelihood import Bounds, bits_of, bound_name, levels_in_data
from midway.gen.features.reference import Subject, balanced_subject
from midway.gen.flags.arguments import config_of
from midway.gen.flags.baseline_tasks import BASELINE_TASKS, BaselineTask
from midway.gen.flags.cli import Page, resolve
from midway.gen.names.nearest import canonical
from midway.gen.progress.bar import busy
from midway.gen.recipes.baseline_recipes import BASELINE_RECIPES
from midway.gen.training.accelerator import check_unused, make_accelerator
from midway.gen.training.fit import fit
from midway.gen.training.interface import FitResult, Hooks, Preview
from midway.gen.trainings.dry_run import random_splits, rehearse, resident
from midway.gen.trainings.running import Parts, built, image_parts, open_run, with_precision

PREVIEW = 60
MORE = "midway train baseline RECIPE --help lists the flags of that recipe, with those of its model."
PAIRS = 8
COORDINATES = 8
VALUES = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)


def kind_of(task: BaselineTask) -> str:
    """The kind of baseline that a task trains."""
    return next(kind for kind, cls in BASELINE_TASKS.items() if isinstance(task, cls))


def task_type(values: dict[str, object]) -> type[BaselineTask]:
    """The task of a run's configuration; DataError for an unknown kind of baseline."""
    kind = values.get("baseline")
    if not isinstance(kind, str) or kind not in BASELINE_TASKS:
        raise DataError(
            f"unknown baseline {kind!r}",
            "the configuration has no valid `baseline` key",
            nearest(str(kind), BASELINE_TASKS),
        )
    return BASELINE_TASKS[kind]


def read_task(arguments: list[str]) -> BaselineTask:
    """`RECIPE | --config FILE` and flags; the kind of the recipe or file determines the --model flags."""
    file, words = config_of(arguments)
    first = words[0] if words and not words[0].startswith("-") else None
    if file is not None and first is None:
        values = read_yaml(Path(file))
        return resolve(task_type(values if isinstance(values, dict) else {}), BASELINE_RECIPES, arguments)  # pyright: ignore
    recipe = canonical(first, BASELINE_RECIPES) if first else None
    if recipe is not None:
        return resolve(type(BASELINE_RECIPES[recipe]()), BASELINE_RECIPES, arguments)
    if first is not None or {"-h", "--help"} & {*words}:
        return resolve(BaselineTask, BASELINE_RECIPES, arguments, Page(more=MORE))
    raise UsageError(
        "no baseline is given", "the first argument must be a recipe", f"one of: {', '.join(BASELINE_RECIPES)}"
    )


def make_parts(task: BaselineTask, accelerator: Accelerator, splits: Splits | None = None) -> Parts[Baseline]:
    """The model and its images, or those given; nothing is written. Validation gives bits per dimension."""
    splits = splits or load_splits(task.data)
    model = make_model(task, splits).to(accelerator.device)
    subject, bounds = balanced_subject(splits.held_out, task.validation_images), make_bounds(task)
    return image_parts(model, splits, lambda step: bits_of(model, subject, bounds).bits)


def make_model(task: BaselineTask, splits: Splits) -> Baseline:
    """The model for these images; UsageError for sizes and classes that do not fit."""
    data = splits.train
    if task.conditional and len(data.classes) < 2:
        raise UsageError("--conditional", f"{data.name} has no classes", "drop it, or use one folder per class")
    if task.validation_images is not None and task.validation_images < 1:
        raise UsageError(f"--validation-images {task.validation_images}", "validation needs images", "give 1 or more")
    torch.manual_seed(task.train.seed)
    channels, height, width = data.images.shape[1:]
    classes = len(data.classes) if task.conditional else 0
    cls = BASELINES[kind_of(task)]
    with raising(UsageError, "this model cannot be built", "change the --model flags or --data"):
        shape, levels = (channels, height, width), levels_in_data(splits)
        model = built(lambda: cls(task.model, shape, levels, classes))  # pyright: ignore
    model.empty = empty_classes(data) if classes else ()
    if task.train.validate_every and getattr(model.config, "noise", "") == "gaussian":
        raise UsageError(
            f"--validate-every {task.train.validate_every}",
            "a model of Gaussian noise has no bits per dimension for validation",
            "use --validate-every 0 --patience-validations 0, or --model.noise uniform",
        )
    return model


def make_bounds(task: BaselineTask) -> Bounds:
    """The likelihood bound of validation and of the final score."""
    with raising(UsageError, f"--draws {task.draws}", "correct the value"):
        return Bounds(task.draws)


def train(task: BaselineTask) -> Run | None:
    """Train, score held-out images, save. The run on the main process, None on the others."""
    check_unused(task.train, validates=True)
    task, precision = with_precision(task)
    if task.dry_run:
        return dry_run(task)
    accelerator = make_accelerator(task.train, task.out)
    parts = make_parts(task, accelerator)  # before the run: an error here leaves no directory
    model, weights = parts.model, task.train.weights_name
    config = {"baseline": kind_of(task), **to_record(task)}
    with open_run(task, task.out, KIND, config, accelerator, *facts(parts), *precision) as run:
        hooks = Hooks(
            preview=lambda step: write_samples(run, model, weights, step),
            export=lambda folder, _: write_baseline(folder, model),
            validate=parts.validate,
        )
        result = fit(model, parts.items, task.train, run, accelerator, hooks, task.resume == "auto")
        if not accelerator.is_main_process:
            return None
        report(task, run, parts.splits, result, accelerator.device)
        return run


def dry_run(task: BaselineTask) -> None:
    """Two steps on random images (dry_run.py)."""
    start, train = resident(), replace(task.train, validate_every=0, patience_validations=0)
    accelerator = make_accelerator(train)
    parts = make_parts(task, accelerator, random_splits(task.data, task.dry_run_classes))
    rehearse(parts.model, parts.items, train, accelerator, start)


def facts(parts: Parts[Baseline]) -> tuple[str, str]:
    """The first log lines of a run: its data and its model."""
    model = parts.model
    parameters = sum(p.numel() for p in model.parameters())
    classes = f"{model.classes} classes" if model.classes else "no classes"
    return describe(parts.splits.train), f"{parameters:,} parameters, {model.levels} levels, {classes}"


def report(task: BaselineTask, run: Run, splits: Splits, result: FitResult, device: torch.device) -> None:
    """Log bits per dimension of the weights that other commands load; write pictures."""
    trained, bounds, subject = (
        load_trained_baseline(run.path, device),
        make_bounds(task),
        balanced_subject(splits.held_out),
    )
    try:
        with busy("scoring held-out images"):
            score = bits_of(trained.model, subject, bounds)
    except ValueError as error:  # Gaussian noise, or uninitialised ActNorms
        run.say(f"no bits per dimension: {error}")
    else:
        run.log({"step": result.steps, "final": True, "held_out_bits_per_dim": score.bits, "n": score.n})
        selected = "; validation chose the step on held-out images" if result.best is not None else ""
        run.say(
            f"held-out bits per dimension {score} (n = {score.n}, {bound_name(trained.model, bounds.draws)}, "
            f"seed {bounds.seed}; weights {trained.weights}{selected})"
        )
    if result.best is not None:
        write_samples(run, trained.model, "best", result.best[0])
    if isinstance(trained.model, VAE):
        write_latents(run, trained.model, subject)
    run.say(f"saved {run.checkpoint} after {result.steps} steps in {result.seconds:.0f} s")


# ---- pictures ----


def write_samples(run: Run, model: Baseline, weights: str, step: int) -> Preview | None:
    """Samples of fixed seeds; one log line instead if they are not finite."""
    seeds, name = torch.arange(PREVIEW), f"{weights}-{step:06d}"
    labels = labels_of(seeds, model.classes, model.empty) if model.classes else None
    try:
        images = to_uint8(model.sample(seeds, labels)).cpu()
    except ValueError as error:
        run.say(f"no samples {name}: {error}")
        return None
    path = run.path / "samples" / f"samples-{name}.png"
    save_grid(path, images, 10, f"step {step:,}: seeds 0-{PREVIEW - 1}, {weights} weights")
    return Preview(path, "samples")


def write_latents(run: Run, model: VAE, subject: Subject) -> None:
    """Reconstructions, interpolations and traversals of held-out images."""
    labels = subject.labels if model.classes else None
    shown = subject.images[: 4 * PAIRS]
    again = to_uint8(reconstruct(model, shown, None if labels is None else labels[: len(shown)])).cpu()
    pairs = torch.stack([shown, again], dim=1).flatten(0, 1)  # an image, then its reconstruction
    _save(run, "reconstructions", pairs, columns=PAIRS)
    first, second = ends(subject, same=bool(model.classes))
    own = None if labels is None else labels[first]
    _save(
        run, "interpolations", interpolate(model, subject.images[first], subject.images[second], own).flatten(0, 1), 8
    )
    one = subject.images[:1]
    nats = coordinate_kl(model, subject.images[:256], None if labels is None else labels[:256])
    most = nats.argsort(descending=True)[:COORDINATES].tolist()
    traversed = traverse(model, one, most, VALUES, None if labels is None else labels[:1])
    _save(run, "traversals", traversed.flatten(0, 2), len(VALUES))


def ends(subject: Subject, same: bool) -> tuple[Tensor, Tensor]:
    """int64 (n,) twice: pairs of different images, of one class if `same`, as many as there are up to 8."""
    pairs, labels = [], subject.labels
    for i in range(min(PAIRS, len(labels))):
        others = torch.arange(i + 1, len(labels))
        others = others[labels[others] == labels[i]] if same else others
        pairs += [(i, int(others[0]))] if len(others) else []
    first, second = torch.tensor(pairs or [(0, 0)]).unbind(1)
    return first, second


def _save(run: Run, name: str, images: Tensor, columns: int) -> None:
    pixels = images if images.dtype == torch.uint8 else to_uint8(images).cpu()
    save_grid(run.path / "samples" / f"{name}.png", pixels, columns)


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    train(read_task(arguments))
