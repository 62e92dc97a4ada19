"""Encode a tokenizer's data set once: python scripts/encode.py --tokenizer runs/digits-fsq"""

from dataclasses import dataclass, field
from pathlib import Path

from cli import main, resolve
from midway.gen.core.config import PER_CALL
from midway.gen.core.errors import UsageError
from midway.gen.core.files import check_path, clear_temporaries
from midway.gen.core.processes import best_device
from midway.gen.core.ranges import BATCH, check_flag_ranges
from midway.gen.core.text import echo
from midway.gen.data.images import describe
from midway.gen.data.splits import load_splits
from midway.gen.diffusion.load import load_tokenizer
from midway.gen.tokenizer.latents import cache_path, encode, give_statistics, is_latent_cache, save_latents


@dataclass(frozen=True)
class EncodeTask:
    """Encode the training images of a tokenizer's data set, with per-channel mean and std."""

    tokenizer: Path
    """Run directory of the tokenizer."""
    out: Path | None = None
    """The file to write (default: beside the tokenizer, named by data and weights)."""
    batch_size: int | None = None
    """Images encoded at once (default: by the memory of this machine)."""
    flip: bool = False
    """Encode the left-right mirrored images too, for training with mirror augmentation."""
    overwrite: bool = field(default=False, metadata=PER_CALL)
    """Replace an existing file."""

    def __post_init__(self) -> None:
        check_flag_ranges(self, batch_size=BATCH)


def run(task: EncodeTask) -> Path:
    """Write the cache; its path."""
    if task.batch_size is not None and task.batch_size < 1:
        raise UsageError(f"--batch-size {task.batch_size}", "there is nothing to encode", "use 1 or more")
    tokenizer, data = load_tokenizer(task.tokenizer, best_device())
    train = load_splits(data).train
    path = check_path(task.out or cache_path(task.tokenizer, train, tokenizer, task.flip))
    if path.exists() and not task.overwrite:
        raise UsageError(f"{path} exists", "encoding again would replace it", "pass --overwrite, or another --out")
    if task.out is not None and path.exists() and not is_latent_cache(path):
        raise UsageError(f"{path} is no latent cache", "it would be replaced", "choose another --out, or move it away")
    echo(describe(train))
    clear_temporaries(task.tokenizer)
    latents = encode(tokenizer, train, task.batch_size, task.flip)
    give_statistics(tokenizer, latents.mean, latents.std, train.images)  # an error before anything is written
    save_latents(latents, path)
    echo(f"latents {tuple(latents.raw.shape)}{', and as many of the mirrored images' if task.flip else ''}")
    echo("mean " + " ".join(f"{v:+.4f}" for v in latents.mean.tolist()))
    echo("std  " + " ".join(f"{v:.4f}" for v in latents.std.tolist()))
    echo(f"saved {path}")
    return path


if __name__ == "__main__":
    main(lambda arguments: run(resolve(EncodeTask, {}, arguments)) and None, alone=True)
