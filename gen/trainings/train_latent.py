"""Train a latent model: midway train latent digits-dit --tokenizer runs/digits-fsq"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from midway.gen.cards.latent import finish_model, model_card
from midway.gen.cards.parts import training_rows
from midway.gen.core.checkpoints import split_step
from midway.gen.core.config import to_record
from midway.gen.core.errors import UsageError, nearest, raising
from midway.gen.core.processes import ProcessInfo
from midway.gen.core.runs import Run
from midway.gen.core.text import echo
from midway.gen.data.images import ImageData, describe, empty_classes
from midway.gen.data.levels import levels_of, values_of
from midway.gen.data.pictures import save_grid
from midway.gen.data.places import images_at, splits_of
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.class_draw import ClassDraw, class_draw
from midway.gen.diffusion.load import CPU, Origin, TrainedModel, check_apart, load_model, load_tokenizer, write_model
from midway.gen.diffusion.model import LatentModel
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.diffusion.sampling import decode, sample_latents
from midway.gen.evaluation.online import log_online, online_distances
from midway.gen.features.open import named_extractor
from midway.gen.features.reference import FeatureReference, make_reference
from midway.gen.flags.arguments import config_of
from midway.gen.flags.cli import Page, resolve
from midway.gen.flags.tasks import LatentTask, TrainingTask
from midway.gen.names.nearest import canonical
from midway.gen.objectives.jump_config import own_solver
from midway.gen.progress.finished import unfinished
from midway.gen.recipes.generic import GENERIC_LATENTS, GENERIC_TOKENIZERS, LATENT_SIZES, describe_latent
from midway.gen.recipes.recipes import LATENT_RECIPES, TOKENIZER_RECIPES
from midway.gen.tokenizer.encoding import Encoding, encode
from midway.gen.tokenizer.latents import cache_path, open_latents
from midway.gen.tokenizer.statistics import give_statistics
from midway.gen.tokenizer.stored import Views
from midway.gen.training.accelerator import check_unused, make_accelerator
from midway.gen.training.batches import LatentBatch
from midway.gen.training.config import OnlineConfig
from midway.gen.training.fit import fit
from midway.gen.training.interface import FitResult, Hooks, Items, Preview
from midway.gen.trainings.aligning import aligned_items, prepared, random_maps
from midway.gen.trainings.beginning import begin, begin_pairs, planned
from midway.gen.trainings.dry_run import IMAGES, random_splits, rehearse, resident
from midway.gen.trainings.running import built, open_run, with_precision
from midway.gen.trainings.train_tokenizer import make_tokenizer
from midway.samplers.grids import karras, uniform
from midway.samplers.jumps import JUMPS
from midway.samplers.solvers import heun
from midway.tokenizers.tokenizer import ImageTokenizer

PREVIEW = 60
PAGE = Page(computed=dict.fromkeys(GENERIC_LATENTS, LATENT_SIZES))
PREVIEW_STEPS = 10
PREVIEW_JUMPS = 4


@dataclass(frozen=True)
class Parts:
    """What is trained, on what."""

    model: LatentModel
    items: Items
    tokenizer: ImageTokenizer
    data: DataConfig
    images: ImageData
    about: str
    """The images in words."""
    origin: Origin
    """What it was made from, and what that took."""
    draw: ClassDraw | None
    """How seeds draw classes: as often as the images have them."""


def make_parts(task: LatentTask, accelerator: Accelerator) -> Parts:
    """The model and its latents, which are encoded if they are not there.

    UsageError for sizes that do not fit; DataError for a latent channel that does not vary.
    """
    source = Run.open(task.tokenizer, "tokenizer")
    tokenizer, data = load_tokenizer(task.tokenizer, accelerator.device)[0], images_at(source, task.data_path)
    task.apply_tiles(tokenizer)
    images = splits_of(source, data).train
    torch.manual_seed(task.train.seed)
    with raising(UsageError, "this model cannot be built", "change the --model flags"):
        model = built(lambda: make_model(task, tokenizer, images))
    teacher = prepared(task, model, data, images)
    views = Views(mirrored=task.flip)
    path = task.latents or cache_path(source.path, images, tokenizer, views)
    if task.latents is None:
        process = ProcessInfo(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
        encode(path, tokenizer, images, Encoding(views), process)
    latents = open_latents(path, images, tokenizer, task.flip)  # of pairs, for their mean and std
    give_statistics(tokenizer, latents.mean, latents.std, images.images)
    set_bins(task, model, tokenizer, images)
    draw = class_draw(None, images, model.classes, model.empty)
    origin, items = begin(task, model, tokenizer, accelerator.device), latents.items(task.flip)
    if task.reflow.source is not None:
        pairs, origin = begin_pairs(task, model, tokenizer, accelerator, draw, origin)
        items = pairs.items(images.fingerprint)
    if teacher is not None:
        items, passes = aligned_items(task, model, teacher, latents, images, source.path, accelerator)
        origin += passes
    about = "\n".join([describe(images), *unfinished(source, task.init, task.teacher, task.reflow.source)])
    return Parts(model, items, tokenizer, data, images, about, origin, draw)


def make_model(task: LatentTask, tokenizer: ImageTokenizer, train: ImageData) -> LatentModel:
    """An untrained model of these classes. ValueError for a configuration that does not fit the latents."""
    return LatentModel(task.model, tokenizer.latent_shape, len(train.classes), empty_classes(train), train.classes)


def train(task: LatentTask, *lines: str) -> Run | None:
    """Train and save, with `lines` in the log. The run on the main process, None on the others."""
    check_unused(task.train, measures=True)
    width = task.model.dit.width if task.model.network == "dit" else 0  # bfloat16 was not measured for others
    task, precision = with_precision(task, "transformer", width)
    task = planned(task)
    solver, grid = own_solver(task.model.objective, task.model.jump)
    early = replace(task.early, solver=task.early.solver or solver, grid=task.early.grid or grid)
    task = replace(task, early=early)
    if task.dry_run:
        return dry_run(task)
    accelerator = make_accelerator(task.train, task.out)
    reference = make_online_reference(task, accelerator.device)
    parts = make_parts(task, accelerator)  # before the run, so that an invalid configuration leaves no directory
    if reference is not None:
        check_apart("this model", parts.origin.aligned, reference.features)
    model, tokenizer = parts.model, parts.tokenizer
    config = {**to_record(task), "data": to_record(parts.data), "origin": to_record(parts.origin)}
    parameters, shape = sum(p.numel() for p in model.network.parameters()), (parts.items.size, *model.latent_shape)
    about = f"{parameters:,} parameters, latents {shape}, schedule {task.model.schedule}"
    with open_run(task, task.out, "latent_model", config, accelerator, parts.about, about, *lines, *precision) as run:
        hooks = Hooks(
            preview=lambda step: write_preview(run, parts, step, task.train.weights_name),
            export=lambda folder, _: write_model(folder, model, tokenizer),
            measure=None if reference is None else lambda step: write_online(run, parts, step, reference, task.early),
        )
        result = fit(model, parts.items, task.train, run, accelerator, hooks, task.resume == "auto")
        if not accelerator.is_main_process:
            return None
        publish(task, run, parts, result)
        run.say(f"saved {run.checkpoint} after {result.steps} steps in {result.seconds:.0f} s")
        return run


def publish(task: TrainingTask, run: Run, parts: Parts, result: FitResult) -> None:
    """Write the averaged model as a folder to share, with its tokenizer; the card states how far it is trained. DiskError."""
    if not result.steps:
        return
    trained = load_model(run.path, CPU)
    weights = training_rows(trained.weights, result.steps, task.train, (), result.finished)
    if parts.origin.aligned:
        weights = {**weights, "hidden tokens aligned with": ", ".join(parts.origin.aligned)}
    figures = {name: value for name, value in result.last.items() if name == "loss"}
    card = model_card(trained.model, trained.tokenizer, parts.data, parts.images, weights, figures, task.license)
    run.say(f"card  {finish_model(run, trained.model, trained.tokenizer, card) / 'README.md'}")


def dry_run(task: LatentTask) -> None:
    """Two steps on random latents (dry_run.py), of the tokenizer of the run or, if there is none, of the recipe of its name."""
    start, train = resident(), replace(task.train, measure_every=0)
    tokenizer = planned_tokenizer(task.tokenizer)
    accelerator = make_accelerator(train)
    torch.manual_seed(train.seed)
    names = tuple(str(label) for label in range(task.dry_run_classes))
    with raising(UsageError, "this model cannot be built", "change the --model flags"):
        model = built(lambda: LatentModel(task.model, tokenizer.latent_shape, len(names), (), names))
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(IMAGES, *tokenizer.latent_shape, generator=generator)
    maps = random_maps(task, model, IMAGES, generator)
    rehearse(model, items_of(raw, len(names), maps), train, accelerator, start)


def items_of(raw: Tensor, classes: int, maps: Tensor | None = None) -> Items:
    """Latents (N, C, h, w), with classes in turn, and what hidden tokens are aligned with."""
    labels = torch.arange(len(raw)) % classes

    def read(items: Tensor) -> LatentBatch:
        return LatentBatch(raw[items], labels[items], features=None if maps is None else maps[items])

    return Items(read, len(raw))


def planned_tokenizer(path: Path) -> ImageTokenizer:
    """The tokenizer of a run, or an untrained one of the recipe that has the name of the run's folder; UsageError for neither."""
    if split_step(path)[0].exists():
        return load_tokenizer(path)[0]
    sized = TOKENIZER_RECIPES.keys() - GENERIC_TOKENIZERS.keys()
    if path.name not in sized:
        what, why = (
            f"there is no tokenizer at {path}",
            f"no recipe is called '{path.name}', or its sizes follow from images",
        )
        raise UsageError(what, why, f"train it, or name one: {nearest(path.name, sized)}")
    task = TOKENIZER_RECIPES[path.name]()
    return make_tokenizer(task, random_splits(task.data, 1).train)


def make_online_reference(task: LatentTask, device: torch.device) -> FeatureReference | None:
    """The feature network of online evaluation, before anything is trained; errors as named_extractor."""
    if not task.train.measure_every:
        return None
    source = Run.open(task.tokenizer, "tokenizer")
    tokenizer, data = load_tokenizer(task.tokenizer)[0], images_at(source, task.data_path)
    network = named_extractor(task.early.features, data, "the tokenizer")
    network.check_count(task.early.n)
    train = splits_of(source, data).train
    network.check(train.images, "the tokenizer makes")
    latent_model = make_model(task, tokenizer, train)
    for nfe in task.early.nfe:  # an unreachable budget raises here
        trained = TrainedModel(latent_model, tokenizer, data, "", Run(task.out, "latent_model"))
        make_samplers(trained, task.early.solver, nfe, SamplerConfig(grids=(task.early.grid,)))
    reference = make_reference(network.to(device), network.name, train)
    echo(*reference.warnings)
    return reference


def write_online(
    run: Run, parts: Parts, step: int, reference: FeatureReference, config: OnlineConfig
) -> dict[str, float]:
    """Online evaluation of the averaged weights, which are in the model; the distances by name."""
    trained = TrainedModel(parts.model, parts.tokenizer, parts.data, f"step-{step}", run)
    found, by = online_distances(trained, reference, config, parts.draw), {"solver": config.solver, "grid": config.grid}
    return log_online(run, step, found, reference, config.n, by)


def set_bins(task: LatentTask, model: LatentModel, tokenizer: ImageTokenizer, images: ImageData) -> None:
    """Give a dequantising model the levels of its pixels; UsageError where latents are no pixels."""
    if not task.model.dequantise:
        return
    if not tokenizer.passes_through:
        raise UsageError(
            "--model.dequantise",
            "these latents are no pixels: the tokenizer is learned",
            "drop it, or use the tokenizer of the recipe digits-pixels",
        )
    levels = levels_of(values_of(images.images))
    model.set_bins(levels, tokenizer.latent_std)


def write_preview(run: Run, parts: Parts, step: int, weights: str) -> Preview:
    """Fixed seeds, Heun's method at 20 evaluations, of a model that jumps its own at 4; the file's name contains the weights."""
    trained = TrainedModel(parts.model, parts.tokenizer, parts.data, "", run)
    config, schedule = parts.model.config, parts.model.schedule
    own = own_solver(config.objective, config.jump)[0]
    table = (
        JUMPS[own](schedule, uniform(schedule, 4))
        if config.is_jump
        else heun(schedule, karras(schedule, PREVIEW_STEPS))
    )
    by = own if config.is_jump else "Heun"
    images = decode(trained, sample_latents(trained, table, torch.arange(PREVIEW)).latents)
    path = run.path / "samples" / f"{weights}-{step:06d}-nfe{table.nfe}.png"
    save_grid(path, images, 10, f"step {step:,}: {by}, NFE {table.nfe}, seeds 0-{PREVIEW - 1}, {weights} weights")
    return Preview(path, "samples")


def read_fitted(arguments: list[str]) -> tuple[LatentTask, *tuple[str, ...]]:
    """`RECIPE | --config FILE` and flags; of a recipe for any images with sizes from the latents, and a line about them."""
    task, (_, words) = resolve(LatentTask, LATENT_RECIPES, arguments, PAGE), config_of(arguments)
    name = canonical(words[0], GENERIC_LATENTS) if words else None
    if name is None:
        return (task,)
    tokenizer = planned_tokenizer(task.tokenizer) if task.dry_run else load_tokenizer(task.tokenizer)[0]
    latent = tokenizer.latent_shape
    task = resolve(LatentTask, {name: lambda: GENERIC_LATENTS[name](latent)}, arguments)
    return task, describe_latent(name, latent, task)


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    train(*read_fitted(arguments))
