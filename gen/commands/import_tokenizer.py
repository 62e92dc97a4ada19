"""Make a tokenizer run of an autoencoder of diffusers:

midway import-tokenizer --source stabilityai/sd-vae-ft-mse --out runs/sd-vae --data digits --channels 3 --resize 32
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from midway.gen.cards.tokenizer import finish, tokenizer_card
from midway.gen.core import checkpoints
from midway.gen.core.config import PER_CALL, RECORDED_AS, absolute_if_there, to_record
from midway.gen.core.environment import without_machine
from midway.gen.core.errors import DataError, UsageError, raising
from midway.gen.core.processes import best_device
from midway.gen.core.runs import Run
from midway.gen.data.images import describe
from midway.gen.data.splits import DataConfig, Splits, load_splits
from midway.gen.flags.cli import Flat, resolve
from midway.gen.tokenizer.encoding import latent_statistics
from midway.gen.tokenizer.objective import evaluate_tokenizer
from midway.gen.tokenizer.statistics import give_statistics
from midway.gen.trainings.train_tokenizer import log_quality, square, write_reconstructions
from midway.tokenizers.diffusers_import import import_tokenizer, read_model
from midway.tokenizers.tokenizer import ImageTokenizer


@dataclass(frozen=True)
class ImportTask:
    """Make a tokenizer run of an AutoencoderKL, AutoencoderTiny or VQModel of diffusers, with its weights, for these images."""

    source: str = field(metadata={RECORDED_AS: absolute_if_there})
    """Directory with config.json and safetensors, or a Hub id, which needs a network."""
    out: Path
    """Run directory to create."""
    subfolder: str | None = None
    """Where in the source the autoencoder is; `vae` in pipelines."""
    data: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    batch_size: int = 64
    """Images encoded at once."""
    license: str = "other"
    """Licence of the imported weights for the card, such as mit."""
    overwrite: bool = field(default=False, metadata=PER_CALL)
    """Delete a run that is already at --out."""

    @property
    def place(self) -> str:
        """The source with its subfolder, for messages."""
        return f"{self.source}/{self.subfolder}" if self.subfolder else self.source


def run(task: ImportTask) -> Run:
    """Import, measure latents and quality, save; the run."""
    if task.batch_size < 1:
        raise UsageError(f"--batch-size {task.batch_size}", "there is nothing to encode", "use 1 or more")
    splits = load_splits(task.data)
    tokenizer = load(task, splits)  # before the run, so that an invalid source leaves no directory
    published = words(tokenizer) if bool(tokenizer.latents_measured) else "none"
    images = splits.train.images
    give_statistics(tokenizer, *latent_statistics(tokenizer, images, task.batch_size), images)
    with Run.creating(task.out, "tokenizer", to_record(task), task.overwrite) as made:
        made.say(describe(splits.train))
        made.say(describe(splits.held_out))
        quality = evaluate_tokenizer(tokenizer, splits.held_out.images, task.batch_size)
        checkpoints.save(made.checkpoints, 0, lambda folder: tokenizer.write(folder / "tokenizer"))
        write_reconstructions(made, tokenizer, splits, 0, "imported")
        made.note({"data_fingerprint": splits.train.fingerprint})
        weights = {"weights": "imported", "source": without_machine(task.place)}
        finish(made, tokenizer, tokenizer_card(tokenizer, task.data, splits, quality, weights, license=task.license))
        made.say(f"latents of the training images: {words(tokenizer)}; published: {published}")
        log_quality(made, tokenizer, splits, 0, quality, "imported")
        made.say(f"saved {made.checkpoint}")
        return made


def load(task: ImportTask, splits: Splits) -> ImageTokenizer:
    """The tokenizer for these images; DataError if it cannot be read, UsageError if it does not fit them."""
    channels, side = square(splits.train)
    fix = "give the directory of a diffusers model as --source, or a Hub id while there is a network"
    with raising(DataError, f"{task.place} cannot be imported", fix):
        model = read_model(task.source, task.subfolder)
    with raising(UsageError, f"{task.place} cannot be used on these images", "change --resize, or --source"):
        tokenizer = import_tokenizer(model, side)
    takes = tokenizer.image_shape[0]
    if takes != channels:
        raise UsageError(f"images have {channels} channel(s)", f"this takes {takes}", f"pass --channels {takes}")
    return tokenizer.to(best_device())  # pyright: ignore[reportArgumentType, reportReturnType]


def words(tokenizer: ImageTokenizer) -> str:
    """Mean and std of the latents on a line."""
    mean, std = (
        " ".join(f"{value:.4g}" for value in part.tolist()) for part in (tokenizer.latent_mean, tokenizer.latent_std)
    )
    return f"mean {mean}, std {std}"


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    run(resolve(ImportTask, {}, arguments))
