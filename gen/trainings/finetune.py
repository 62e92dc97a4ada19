"""Train a latent model further on other images: midway finetune lora --model runs/digits-flow --data photos --out runs/photos

The model is not touched: an adapter is a run of its own, which `midway sample` and `midway evaluate` take beside the model with
--adapter. The tokenizer, and how its latents are standardised, stay those of the model.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from midway.gen.cards.latent import adapter_card
from midway.gen.cards.parts import training_rows, write_folder
from midway.gen.core.checkpoints import split_step
from midway.gen.core.config import to_record
from midway.gen.core.errors import UsageError, raising
from midway.gen.core.processes import ProcessInfo
from midway.gen.core.runs import Run
from midway.gen.data.images import describe, empty_classes
from midway.gen.data.splits import Splits, load_splits
from midway.gen.diffusion.adapters import KIND, AdaptedModel, Adapter, give_weights, load_adapted
from midway.gen.diffusion.class_draw import class_draw
from midway.gen.diffusion.load import CPU, TrainedModel, load_model, origin_of, write_model
from midway.gen.diffusion.model import LatentModel
from midway.gen.flags.cli import resolve
from midway.gen.flags.tasks import FinetuneTask, LatentTask
from midway.gen.progress.finished import unfinished
from midway.gen.recipes.finetune_recipes import FINETUNE_RECIPES
from midway.gen.tokenizer.encoding import Encoding, encode
from midway.gen.tokenizer.latents import Latents, cache_path, open_latents
from midway.gen.tokenizer.stored import Views
from midway.gen.training.accelerator import check_unused, make_accelerator
from midway.gen.training.fit import fit
from midway.gen.training.interface import FitResult, Hooks
from midway.gen.trainings import train_latent
from midway.gen.trainings.dry_run import IMAGES, rehearse, resident
from midway.gen.trainings.running import open_run, with_precision
from midway.gen.trainings.train_latent import Parts, items_of, publish, write_preview


def make_parts(task: FinetuneTask, accelerator: Accelerator, splits: Splits | None = None) -> Parts:
    """The model with what trains of it, and the latents of the images, which are encoded if they are not there.

    UsageError for images, targets or a rank that the model cannot have.
    """
    base = load_model(task.model, accelerator.device)
    images = (load_splits(task.data) if splits is None else splits).train
    shape, own = tuple(images.images.shape[1:]), base.tokenizer.image_shape
    if shape != own:
        words, size = ("x".join(map(str, each)) for each in (shape, own))
        fix = f"pass --channels {own[0]} --resize {own[1]}"
        raise UsageError(f"images of {words}", f"the model {task.model} makes images of {size}", fix)
    torch.manual_seed(task.train.seed)
    model = make_model(task, base, images.classes, empty_classes(images))
    latents = encoded(task, base, Splits(images, images), accelerator)
    draw = class_draw(None, images, model.classes, model.empty)
    about = "\n".join([describe(images), *unfinished(task.model)])
    origin = replace(origin_of(base), init=base.hash)
    return Parts(model, latents.items(task.flip), base.tokenizer, task.data, images, about, origin, draw)


def make_model(
    task: FinetuneTask, base: TrainedModel, names: tuple[str, ...], empty: tuple[int, ...] = ()
) -> LatentModel:
    """Of these classes, with the weights of the base. UsageError for targets or a rank that it has not."""
    if task.method == "adapter":
        with raising(UsageError, "this model has no such adapters", "change the --adapter flags"):
            return AdaptedModel(base, task.adapter, names, empty)
    model = LatentModel(base.model.config, base.model.latent_shape, len(names), empty, names)
    give_weights(model, base.model)
    return model


def encoded(task: FinetuneTask, base: TrainedModel, splits: Splits, accelerator: Accelerator) -> Latents:
    """The latents of the training images, standardised as those that the model was trained on."""
    tokenizer, views, images = base.tokenizer, Views(mirrored=task.flip), splits.train
    mean, std = tokenizer.latent_mean.clone(), tokenizer.latent_std.clone()
    path = cache_path(split_step(task.model)[0], images, tokenizer, views)
    process = ProcessInfo(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    encode(path, tokenizer, images, Encoding(views), process)
    tokenizer.set_latent_statistics(mean, std)  # encoding has set those of these images
    return replace(open_latents(path, images, tokenizer, task.flip), mean=mean.cpu(), std=std.cpu())


def train(task: FinetuneTask) -> Run | None:
    """Train and save. The run on the main process, None on the others."""
    check_unused(task.train)
    if task.train.posthoc and task.method == "adapter":
        why = "averages of other widths are made of whole models, and an adapter has one average"
        raise UsageError("--posthoc", why, "drop it, or use --method full")
    task, precision = with_precision(task, "transformer")
    if task.dry_run:
        return dry_run(task)
    accelerator = make_accelerator(task.train, task.out)
    if task.method == "adapter" and getattr(accelerator.state, "fsdp_plugin", None) is not None:
        why = "it shards what trains, and adapters are small beside weights that stay"
        raise UsageError("FSDP with adapters", why, "use DDP (accelerate launch --multi_gpu), or --method full")
    parts = make_parts(task, accelerator)  # before the run, so that an invalid configuration leaves no directory
    model, config = parts.model, {**to_record(task), "origin": to_record(parts.origin)}
    kind = KIND if isinstance(model, AdaptedModel) else "latent_model"

    def export(folder: Path, averaged: dict[str, Tensor]) -> None:
        if isinstance(model, AdaptedModel):
            model.learned(averaged).save(folder / KIND)
        else:
            write_model(folder, model, parts.tokenizer)

    with open_run(task, task.out, kind, config, accelerator, parts.about, facts(parts), *precision) as run:
        hooks = Hooks(lambda step: write_preview(run, parts, step, task.train.weights_name), export)
        result = fit(model, parts.items, task.train, run, accelerator, hooks, task.resume == "auto")
        if not accelerator.is_main_process:
            return None
        if kind == KIND:
            publish_adapter(task, run, parts, result)
        else:
            publish(task, run, parts, result)
        run.say(f"saved {run.checkpoint} after {result.steps} steps in {result.seconds:.0f} s")
        return run


def facts(parts: Parts) -> str:
    """A line of the log about what trains."""
    sizes = [(p.numel(), p.requires_grad) for p in parts.model.parameters()]
    trained, every = sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
    return f"{trained:,} of {every:,} parameters train; the model was trained on {parts.origin.images:,} images"


def publish_adapter(task: FinetuneTask, run: Run, parts: Parts, result: FitResult) -> None:
    """Write the averaged adapter as a folder to share, with a card. DiskError."""
    if not result.steps:
        return
    trained = load_adapted(task.model, run.path, CPU)
    weights = training_rows(trained.weights, result.steps, task.train, (), result.finished)
    adapter = Adapter.load(run.checkpoint / KIND)
    card = adapter_card(adapter, trained.model, parts.data, parts.images, weights, task.license)
    run.say(f"card  {write_folder(run, KIND, adapter.save, card) / 'README.md'}")


def dry_run(task: FinetuneTask) -> None:
    """Two steps on random latents (dry_run.py)."""
    start, accelerator = resident(), make_accelerator(task.train)
    base = load_model(task.model, accelerator.device)
    torch.manual_seed(task.train.seed)
    model = make_model(task, base, tuple(str(label) for label in range(task.dry_run_classes)))
    raw = torch.randn(IMAGES, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    rehearse(model, items_of(raw, task.dry_run_classes), task.train, accelerator, start)


def latent_task(config: dict[str, Any]) -> type:
    """Of the training of a latent model, from the beginning or from another model."""
    return FinetuneTask if "method" in config else LatentTask


def latent_parts(task: LatentTask | FinetuneTask, accelerator: Accelerator, **options: Any) -> Any:
    """The parts of either."""
    make = make_parts if isinstance(task, FinetuneTask) else train_latent.make_parts
    return make(task, accelerator, **options)  # pyright: ignore[reportArgumentType]


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    train(resolve(FinetuneTask, FINETUNE_RECIPES, arguments))
