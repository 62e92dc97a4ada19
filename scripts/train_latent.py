"""Train a latent model: python scripts/train_latent.py digits-dit --tokenizer runs/digits-fsq"""

import torch

from cli import main, resolve
from midway.gen.artefacts import TrainedModel, load_tokenizer, write_model
from midway.gen.config import to_dict
from midway.gen.context import LatentBatch
from midway.gen.data import ImageData
from midway.gen.errors import DataError, UsageError
from midway.gen.latent_model import LatentModel
from midway.gen.latents import Latents, cache_path, encode, load_latents, save_latents
from midway.gen.pictures import save_grid
from midway.gen.runs import Run
from midway.gen.sampling import decode, sample_latents
from midway.gen.splits import DataConfig, load_splits
from midway.gen.training import fit, make_accelerator
from midway.samplers.grids import karras
from midway.samplers.solvers import heun
from midway.tokenizers.tokenizer import ImageTokenizer
from recipes import LATENT_RECIPES, LatentTask

PREVIEW = 60
PREVIEW_STEPS = 10


def train(task: LatentTask) -> Run | None:
    """Train and save. The run on the main process, None on the others."""
    accelerator = make_accelerator(task.train)
    tokenizer, data = load_tokenizer(task.tokenizer, accelerator.device)
    images = load_splits(data).train
    torch.manual_seed(task.train.seed)
    model = make_model(task, tokenizer, images)  # before the run: what cannot be built leaves no directory
    if accelerator.is_main_process:
        make_cache(task, images, tokenizer)
    accelerator.wait_for_everyone()
    latents = load_latents(task.latents or cache_path(task.tokenizer, images, tokenizer), images, tokenizer)
    set_statistics(tokenizer, latents)
    run = Run(task.out, "latent_model")
    if accelerator.is_main_process:
        run = Run.create(task.out, "latent_model", {**to_dict(task), "data": to_dict(data)}, task.overwrite)
        parameters = sum(p.numel() for p in model.parameters())
        run.say(f"{parameters:,} parameters, latents {tuple(latents.raw.shape)}, schedule {task.model.schedule}")
    x0, labels = latents.standardised.to(accelerator.device), latents.labels.to(accelerator.device)
    result = fit(
        model,
        lambda items: LatentBatch(x0[items.to(accelerator.device)], labels[items.to(accelerator.device)]),
        len(x0),
        task.train,
        run,
        accelerator,
        preview=lambda step: write_preview(run, model, tokenizer, data, step),
    )
    if not accelerator.is_main_process:
        return None
    shadow = None if result.ema is None else result.ema.shadow
    run.save_checkpoint(result.steps, lambda folder: write_model(folder, model, shadow, tokenizer))
    run.say(f"saved {run.checkpoint} after {result.steps} steps in {result.seconds:.0f} s")
    return run


def make_cache(task: LatentTask, images: ImageData, tokenizer: ImageTokenizer) -> Latents | None:
    """Encode the images unless a cache is there or was named."""
    path = cache_path(task.tokenizer, images, tokenizer)
    if task.latents is not None or path.exists():
        return None
    latents = encode(tokenizer, images)
    save_latents(latents, path)
    return latents


def set_statistics(tokenizer: ImageTokenizer, latents: Latents) -> None:
    """Give the tokenizer its latents' mean and std; DataError for a channel that does not vary."""
    try:
        tokenizer.set_latent_statistics(latents.mean.to(tokenizer.device), latents.std.to(tokenizer.device))
    except ValueError as error:
        raise DataError("these latents cannot be standardised", str(error), "train the tokenizer longer") from None


def make_model(task: LatentTask, tokenizer: ImageTokenizer, images: ImageData) -> LatentModel:
    """The model for these latents; UsageError for sizes that do not fit."""
    try:
        return LatentModel(task.model, tokenizer.latent_shape, len(images.classes))
    except ValueError as error:
        raise UsageError("this model cannot be built", str(error), "change the --model flags") from None


def write_preview(run: Run, model: LatentModel, tokenizer: ImageTokenizer, data: DataConfig, step: int) -> None:
    """Averaged weights, fixed seeds, Heun's method at 20 evaluations."""
    trained = TrainedModel(model, tokenizer, data, "", run)
    table = heun(model.schedule, karras(model.schedule, PREVIEW_STEPS))
    images = decode(trained, sample_latents(trained, table, torch.arange(PREVIEW)).latents)
    save_grid(run.path / "samples" / f"ema-{step:06d}-nfe20.png", images, columns=10)


if __name__ == "__main__":
    main(lambda arguments: train(resolve(LatentTask, LATENT_RECIPES, arguments)) and None)
