"""Encode a tokenizer's data set once: midway encode --tokenizer runs/digits-fsq

With several processes, `torchrun --nproc_per_node 8 -m midway encode ...`, each encodes its share.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from midway.gen.core.config import PER_CALL
from midway.gen.core.errors import UsageError
from midway.gen.core.files import check_path, clear_temporaries
from midway.gen.core.processes import device_and_process, raised_by_all
from midway.gen.core.ranges import BATCH, WIDTH, check_flag_ranges
from midway.gen.core.runs import Run
from midway.gen.core.text import echo
from midway.gen.data.images import ImageData, describe
from midway.gen.data.places import DataPathFlag, images_at, splits_of
from midway.gen.diffusion.load import load_tokenizer
from midway.gen.files.record_work import check_own
from midway.gen.files.records import is_records
from midway.gen.flags.cli import resolve
from midway.gen.flags.sampling_flags import TileFlags
from midway.gen.progress.finished import unfinished
from midway.gen.tokenizer.codes import PLAN as CODES_PLAN
from midway.gen.tokenizer.codes import check_codes, codes_path, encode_codes, open_codes
from midway.gen.tokenizer.encoding import PLAN, Dtype, Encoding, encode
from midway.gen.tokenizer.latents import Latents, cache_path, open_latents
from midway.gen.tokenizer.stored import Views
from midway.tokenizers.tokenizer import ImageTokenizer


@dataclass(frozen=True)
class EncodeTask(DataPathFlag, TileFlags):
    """Encode the training images of a tokenizer's data set into a folder: latents with their mean and std, or codes.

    A call that was interrupted goes on where it stopped when it is repeated.
    """

    tokenizer: Path
    """Run directory of the tokenizer."""
    kind: Literal["latents", "codes"] = "latents"
    """What is stored: latents, for latent models, or codes, for priors."""
    out: Path | None = None
    """The folder to write (default: beside the tokenizer, named by data and weights)."""
    batch_size: int | None = None
    """Images encoded at once (default: by the memory of this machine)."""
    flip: bool = False
    """Encode the left-right mirrored images too, for training with mirror augmentation."""
    crops: Literal[1, 10] = 1
    """10: the corners and the centre of images that are larger than the tokenizer's (--crop), and their mirror images."""
    dtype: Dtype = "float32"
    """Of stored latents; mean and std are those of the stored numbers."""
    overwrite: bool = field(default=False, metadata=PER_CALL)
    """Replace a finished folder."""

    def __post_init__(self) -> None:
        check_flag_ranges(self, batch_size=BATCH, tile=WIDTH)

    @property
    def views(self) -> Views:
        """What is encoded of every image."""
        return Views(5, True) if self.crops == 10 else Views(1, self.flip)

    def path_in(self, folder: Path, data: ImageData, tokenizer: ImageTokenizer) -> Path:
        """Where what is encoded belongs in a run; UsageError for a tokenizer without codes."""
        if self.kind == "latents":
            return cache_path(folder, data, tokenizer, self.views, self.dtype)
        check_codes(tokenizer)
        return codes_path(folder, data, tokenizer, self.views)


def run(task: EncodeTask) -> Path:
    """Write the folder; its path."""
    if task.batch_size is not None and task.batch_size < 1:
        raise UsageError(f"--batch-size {task.batch_size}", "there is nothing to encode", "use 1 or more")
    if task.kind == "codes" and task.dtype != "float32":
        raise UsageError(f"--dtype {task.dtype} with --kind codes", "codes are whole numbers", "drop it")
    device, process = device_and_process()
    source = Run.open(task.tokenizer, "tokenizer")
    tokenizer, data = load_tokenizer(task.tokenizer, device)[0], images_at(source, task.data_path)
    task.apply_tiles(tokenizer)
    train = splits_of(source, data).train
    path = check_path(task.out or task.path_in(source.path, train, tokenizer))
    codes = task.kind == "codes"
    with raised_by_all():
        if process.rank == 0:
            check_own(path, CODES_PLAN if codes else PLAN, task.kind)
            if is_records(path) and not task.overwrite:
                why = "encoding again would replace it"
                raise UsageError(f"{path} exists", why, "pass --overwrite, or another --out")
            clear_temporaries(source.path)
            echo(*unfinished(source), describe(train))
    if codes:
        encode_codes(path, tokenizer, train, task.views, task.batch_size, process, task.overwrite)
    else:
        encode(path, tokenizer, train, Encoding(task.views, task.dtype, task.batch_size), process, task.overwrite)
    if process.rank == 0:
        if codes:
            open_codes(path, train, tokenizer)
        else:
            show(open_latents(path, train, tokenizer), task.dtype)
        echo(f"saved {path}")
    return path


def show(latents: Latents, dtype: Dtype) -> None:
    """Print the statistics of stored latents."""
    echo("mean " + " ".join(f"{v:+.4f}" for v in latents.mean.tolist()))
    echo("std  " + " ".join(f"{v:.4f}" for v in latents.std.tolist()))
    if "rms_error" in latents.records.facts:
        echo(f"{dtype}: relative RMS error {latents.records.facts['rms_error']:.2e}")


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    run(resolve(EncodeTask, {}, arguments))
