"""Train an image tokenizer: midway train tokenizer digits-fsq --model.levels 8 5 5 5"""

from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from midway.gen.cards.parts import training_rows
from midway.gen.cards.tokenizer import finish, tokenizer_card
from midway.gen.core import checkpoints
from midway.gen.core.config import to_record
from midway.gen.core.errors import DataError, DivergedError, UsageError, raising
from midway.gen.core.randomness import permutation
from midway.gen.core.runs import Run
from midway.gen.data.images import ImageData, describe
from midway.gen.data.pictures import save_grid
from midway.gen.data.splits import Splits, load_splits
from midway.gen.diffusion.load import read_tokenizer
from midway.gen.flags.arguments import config_of, typed_flags
from midway.gen.flags.cli import Page, resolve
from midway.gen.flags.quantizer_flags import OLD, help_flags, taken, with_quantizer
from midway.gen.flags.tasks import TokenizerTask
from midway.gen.metrics.psnr_ssim import psnr
from midway.gen.names.nearest import canonical
from midway.gen.progress.finished import unfinished
from midway.gen.recipes.generic import GENERIC_TOKENIZERS, TOKENIZER_SIZES, describe_tokenizer, shape_of
from midway.gen.recipes.recipes import TOKENIZER_RECIPES
from midway.gen.tokenizer.encoding import latent_statistics
from midway.gen.tokenizer.loss_config import described
from midway.gen.tokenizer.objective import TokenizerObjective, evaluate_tokenizer, reconstruct
from midway.gen.tokenizer.statistics import give_statistics
from midway.gen.training.accelerator import check_unused, make_accelerator
from midway.gen.training.fit import fit
from midway.gen.training.interface import Hooks, Preview
from midway.gen.trainings.dry_run import random_splits, rehearse, resident, without_perceptual
from midway.gen.trainings.running import Parts, built, image_parts, open_run, with_precision
from midway.tokenizers.tokenizer import ImageTokenizer

SHOWN = 32
PAGE = Page(hidden=OLD, extra=help_flags, computed=dict.fromkeys(GENERIC_TOKENIZERS, TOKENIZER_SIZES))


def make_parts(
    task: TokenizerTask, accelerator: Accelerator, splits: Splits | None = None
) -> Parts[TokenizerObjective]:
    """The objective and its data, or the images given; nothing is written."""
    splits = splits or load_splits(task.data)
    torch.manual_seed(task.train.seed)
    objective = make_objective(make_tokenizer(task, splits.train), task)
    return image_parts(objective.to(accelerator.device), splits)


def make_objective(tokenizer: ImageTokenizer, task: TokenizerTask) -> TokenizerObjective:
    """The training objective; UsageError for losses unsupported by these images or this machine."""
    if task.loss.adversary != "none" and tokenizer.passes_through:
        raise UsageError(
            "an adversarial loss needs a learned tokenizer",
            "this tokenizer has no parameters to train",
            "drop --loss.adversary",
        )
    with raising(UsageError, "these losses cannot be used", "change the --loss flags"):
        return TokenizerObjective(tokenizer, task.flip, task.loss)


def train(task: TokenizerTask, splits: Splits | None = None, about: tuple[str, ...] = ()) -> Run | None:
    """Train, evaluate on held-out images, save. The run on the main process, None on the others.

    `splits` are the images, where they are loaded already; `about` are lines for the log.
    """
    check_unused(task.train)
    conv = task.model.network == "conv"
    narrowest = task.model.width * min(task.model.multipliers if conv else (1,))
    task, precision = with_precision(task, "conv" if conv else "transformer", narrowest)
    if task.dry_run:
        return dry_run(task)
    accelerator = make_accelerator(task.train, task.out, idle=task.loss.adversary_start > 0)
    parts = make_parts(task, accelerator, splits)  # before the run: an error here leaves no directory
    tokenizer, splits = parts.model.tokenizer, parts.splits
    about = (describe(splits.train), describe(splits.held_out), *about, *precision)
    with open_run(task, task.out, "tokenizer", to_record(task), accelerator, *about) as run:
        steps = 0
        if any(p.requires_grad for p in tokenizer.parameters()):
            hooks = Hooks(
                preview=lambda step: write_reconstructions(run, tokenizer, splits, step, task.train.weights_name),
                export=lambda folder, averaged: export(folder, tokenizer, averaged),
            )
            result = fit(parts.model, parts.items, task.train, run, accelerator, hooks, task.resume == "auto")
            steps = result.steps
            if result.ema is not None:
                parts.model.load_state_dict(result.ema.shadow)
        elif accelerator.is_main_process:
            run.note({"data_fingerprint": splits.train.fingerprint})
            state = parts.model.state_dict()
            checkpoints.save(run.checkpoints, 0, lambda folder: export(folder, tokenizer, state))
        if not accelerator.is_main_process:
            return None
        if any(isinstance(p, DTensor) for p in tokenizer.parameters()):  # of which each process has a share
            tokenizer = parts.model.tokenizer = read_tokenizer(run.checkpoint / "tokenizer", accelerator.device)
        parts.model.eval()
        quality = evaluate_tokenizer(tokenizer, splits.held_out.images)
        log_quality(run, tokenizer, splits, steps, quality, task.train.weights_name)
        publish(task, run, parts.model, splits, steps, quality)
        run.say(f"saved {run.checkpoint}")
        return run


def dry_run(task: TokenizerTask) -> None:
    """Two steps on random images (dry_run.py)."""
    start = resident()
    task, notes = without_perceptual(task)
    accelerator = make_accelerator(task.train)
    parts = make_parts(task, accelerator, random_splits(task.data, task.dry_run_classes))
    rehearse(parts.model, parts.items, task.train, accelerator, start, notes)


def log_quality(
    run: Run, tokenizer: ImageTokenizer, splits: Splits, step: int, quality: dict[str, float], weights: str
) -> None:
    """Log and print the metrics on the held-out images."""
    run.log({"step": step, "final": True, **{f"held_out_{name}": value for name, value in quality.items()}})
    tokens = len(splits.held_out.images) * tokenizer.tokens
    words = ", ".join(f"{name} {value:.4g}" for name, value in quality.items())
    run.say(f"held-out images ({tokens} tokens, {weights} weights): {words}")


def publish(
    task: TokenizerTask, run: Run, objective: TokenizerObjective, splits: Splits, steps: int, quality: dict[str, float]
) -> None:
    """Write the tokenizer with its latent statistics, and its card; one log line instead if a channel does not vary.

    DataError of images that cannot be read.
    """
    tokenizer, images = objective.tokenizer, splits.train.images
    found = latent_statistics(tokenizer, images, flip=task.flip)
    try:
        give_statistics(tokenizer, *found, images)
    except (DataError, DivergedError) as error:
        run.say(f"no {run.path / 'tokenizer'}: {error}")
        return
    config, perceptual = task.train, objective.perceptual
    losses = described(task.loss) if perceptual is None else described(task.loss, perceptual.protocol)
    weights = {"weights": "none were trained"}
    if steps:
        weights = training_rows(config.weights_name, steps, config, losses, not unfinished(run))
    card = tokenizer_card(tokenizer, task.data, splits, quality, weights, task.flip, task.license)
    run.say(f"card  {finish(run, tokenizer, card) / 'README.md'}")


def export(folder: Path, tokenizer: ImageTokenizer, averaged: dict[str, Tensor]) -> None:
    """The tokenizer with averaged weights, as `from_pretrained` reads it."""
    copy = cast(ImageTokenizer, ImageTokenizer.from_config(tokenizer.config))
    prefix = "tokenizer."
    copy.load_state_dict({k.removeprefix(prefix): v for k, v in averaged.items() if k.startswith(prefix)})
    copy.write(folder / "tokenizer")


def square(data: ImageData) -> tuple[int, int]:
    """Channels and side of square images; UsageError for others."""
    channels, height, width = data.images.shape[1:]
    if height != width:
        raise UsageError(
            f"images are {height}x{width}", "tokenizers take square images", f"pass --resize {min(height, width)}"
        )
    return channels, height


def make_tokenizer(task: TokenizerTask, data: ImageData) -> ImageTokenizer:
    """The tokenizer for these images; UsageError for sizes that do not fit."""
    channels, side = square(data)
    with raising(UsageError, "this tokenizer cannot be built", "change the --model flags"):
        quantizer = task.quantizer_config(channels)
        network = task.model.network_config()
        return built(lambda: ImageTokenizer(in_channels=channels, image_size=side, quantizer=quantizer, **network))


def write_reconstructions(run: Run, tokenizer: ImageTokenizer, splits: Splits, step: int, weights: str) -> Preview:
    """Held-out images over their reconstructions, with the mean of their PSNRs."""
    held_out = splits.held_out.images
    images = held_out[permutation(0, "shown", 0, len(held_out))[:SHOWN]]  # the files' order goes by class
    again = reconstruct(tokenizer, images)
    quality = psnr(images, again).mean().item()
    pairs = torch.stack([images, again], dim=1)  # (N, 2, C, H, W)
    rows = pairs.unflatten(0, (-1, 8)) if len(images) % 8 == 0 else pairs[None]
    ordered = rows.transpose(1, 2).flatten(0, 2)  # eight originals, then their eight reconstructions
    path = run.path / "samples" / f"reconstructions-{weights}-{step:06d}.png"
    words = f"step {step:,}: PSNR {quality:.2f}\u00a0dB of {len(images)} held-out images, {weights} weights"
    save_grid(path, ordered, rows.shape[1], words)
    return Preview(path, "reconstructions", {"preview_psnr": quality})


def read_task(arguments: list[str]) -> TokenizerTask:
    """`RECIPE | --config FILE` and flags, those of the quantizer included."""
    tree, rest = taken(arguments)
    task = resolve(TokenizerTask, TOKENIZER_RECIPES, rest, PAGE)
    return with_quantizer(task, tree, typed_flags(rest))


def read_fitted(arguments: list[str]) -> tuple[TokenizerTask, Splits | None, tuple[str, ...]]:
    """The same; of a recipe for any images with sizes that follow from these, which are loaded, and a line about them."""
    task, (_, words) = read_task(arguments), config_of(arguments)
    name = canonical(words[0], GENERIC_TOKENIZERS) if words else None
    if name is None:
        return task, None, ()
    splits = random_splits(task.data, task.dry_run_classes) if task.dry_run else load_splits(task.data)
    shape, (tree, rest) = shape_of(splits.train), taken(arguments)
    task = resolve(TokenizerTask, {name: lambda: GENERIC_TOKENIZERS[name](shape)}, rest)
    task = with_quantizer(task, tree, typed_flags(rest))
    return task, splits, (describe_tokenizer(name, shape, task),)


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    train(*read_fitted(arguments))
