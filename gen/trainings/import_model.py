"""Make a latent model run of published weights, on the latents of an imported tokenizer:

midway import-model --weights DiT-XL-2-256x256.pt --layout dit --tokenizer runs/sd-vae --out runs/dit-xl2
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from midway.gen.cards.latent import finish_model, model_card
from midway.gen.core import checkpoints
from midway.gen.core.config import PER_CALL, RECORDED_AS, absolute_if_there, to_record
from midway.gen.core.errors import UsageError, raising
from midway.gen.core.files import file_hash
from midway.gen.core.runs import Run
from midway.gen.data.images import ImageData, describe
from midway.gen.data.places import images_at, splits_of
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.load import NOTHING, load_tokenizer, write_model
from midway.gen.diffusion.model import LatentModel
from midway.gen.flags.cli import resolve
from midway.gen.foreign.convert import Imported, import_model
from midway.gen.foreign.files import read_statistics, read_weights, settings_of, weights_file
from midway.gen.foreign.layouts import LAYOUTS, LayoutName
from midway.gen.training.config import TrainConfig
from midway.tokenizers.tokenizer import ImageTokenizer


@dataclass(frozen=True)
class ModelImportTask:
    """Make a latent model run of published weights, on the latents of an imported tokenizer."""

    weights: Path = field(metadata={RECORDED_AS: absolute_if_there})
    """File of weights: safetensors, or a pickle of torch of which only tensors are read; of diffusers also its folder."""
    layout: LayoutName
    """Whose names and shapes the tensors have: dit (facebookresearch/DiT), sit (willisma/SiT), lightningdit, or diffusers."""
    tokenizer: Path = field(metadata={RECORDED_AS: absolute_if_there})
    """Run of the tokenizer whose latents the model was trained on."""
    out: Path
    """Run directory to create."""
    heads: int | None = None
    """Attention heads, for a width that no published model of the layout has."""
    latent_scale: float | None = None
    """Factor of the latents in the model's training; by default that published with the layout, 0.18215."""
    latent_statistics: Path | None = None
    """File with `mean` and `std` of the latents by channel, in place of a factor: latents_stats.pt of LightningDiT."""
    license: str = "other"
    """Licence of the imported weights for the card, such as cc-by-nc-4.0."""
    overwrite: bool = field(default=False, metadata=PER_CALL)
    """Delete a run that is already at --out."""


def run(task: ModelImportTask) -> Run:
    """Read, convert, save; the run."""
    file = weights_file(task.weights)
    source = Run.open(task.tokenizer, "tokenizer")
    tokenizer, data = load_tokenizer(task.tokenizer)[0], images_at(source)
    images = splits_of(source, data).train
    found = import_model(
        read_weights(file), task.layout, task.heads, settings_of(file, task.layout), images.classes
    )  # before the run, so that an invalid file leaves no directory
    check_latents(found.model, tokenizer)
    standardise(task, tokenizer)
    digest = file_hash(file)
    facts = {"layout": task.layout, "file": file.name, "sha256": digest}
    train = to_record(TrainConfig(steps=0, ema=0.0))
    model = found.model
    config = {**to_record(task), "model": to_record(model.config), "train": train, "data": to_record(data)}
    with Run.creating(
        task.out, "latent_model", {**config, "origin": to_record(NOTHING), "imported": facts}, task.overwrite
    ) as made:
        made.say(describe(images))

        def write(folder: Path) -> None:
            write_model(folder, model, tokenizer)
            save_file(model.state_dict(), folder / "model.safetensors")

        checkpoints.save(made.checkpoints, 0, write)
        made.note({"data_fingerprint": images.fingerprint})
        finish_model(made, model, tokenizer, imported_card(task, found, tokenizer, images, data, facts))
        for line in (
            words_of(found, facts),
            f"latents standardised by {statistics_of(tokenizer)}",
            f"saved {made.checkpoint}",
        ):
            made.say(line)
        return made


def check_latents(model: LatentModel, tokenizer: ImageTokenizer) -> None:
    """UsageError unless the tokenizer makes latents of the model's shape."""
    needed, made = model.latent_shape, tokenizer.latent_shape
    if needed == made:
        return
    fix = f"import the tokenizer with --resize {needed[1] * tokenizer.downsample}"
    if needed[0] != made[0]:
        fix = f"give the tokenizer whose latents have {needed[0]} channels"
    raise UsageError(f"the model is of latents {needed}", f"this tokenizer makes {made}", fix)


def standardise(task: ModelImportTask, tokenizer: ImageTokenizer) -> None:
    """Give the tokenizer the mean and std by which the model's latents were made; UsageError where they are not known."""
    scale = task.latent_scale or LAYOUTS[task.layout].scale
    if task.latent_statistics is not None:
        mean, std = read_statistics(task.latent_statistics)
    elif scale is not None:
        mean, std = torch.zeros_like(tokenizer.latent_mean), torch.full_like(tokenizer.latent_std, 1 / scale)
    else:
        raise UsageError(
            f"--layout {task.layout} without --latent-statistics",
            "its models are trained on latents with mean 0 and std 1 by channel, whose numbers are a file of their own",
            "pass --latent-statistics latents_stats.pt, or the one --latent-scale of all channels",
        )
    with raising(UsageError, f"--latent-statistics {task.latent_statistics}", "give the file of this tokenizer"):
        tokenizer.set_latent_statistics(mean, std)


def imported_card(
    task: ModelImportTask,
    found: Imported,
    tokenizer: ImageTokenizer,
    images: ImageData,
    data: DataConfig,
    facts: dict[str, str],
) -> str:
    """The card of an imported model."""
    weights = {"weights": "imported", "made by": LAYOUTS[task.layout].source, **facts}
    return model_card(found.model, tokenizer, data, images, weights, {}, task.license)


def words_of(found: Imported, facts: dict[str, str]) -> str:
    """What was imported, on a line."""
    count = sum(p.numel() for p in found.model.parameters())
    left = f", without {found.dropped:,} of learned variances" if found.dropped else ""
    size = f"{found.model.config.size.about}, {count:,} parameters{left}"
    return f"{facts['file']} (sha256 {facts['sha256'][:12]}), layout {facts['layout']}: {size}"


def statistics_of(tokenizer: ImageTokenizer) -> str:
    """Mean and std of the latents on a line."""
    mean, std = (
        " ".join(f"{value:.4g}" for value in part.tolist()) for part in (tokenizer.latent_mean, tokenizer.latent_std)
    )
    return f"mean {mean}, std {std}"


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    run(resolve(ModelImportTask, {}, arguments))
