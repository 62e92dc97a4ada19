"""The loader of fit() beside threads that only decode, beside torchvision's ImageFolder with DataLoader, and in training.

All sides of a table run in one process, one after another in every turn, so that whatever else the machine does touches all of
them. Times are medians over the turns; a ratio is the median over the turns of the peer's time by ours.

decoding alone     as many threads as the loader has decode the same files, and nothing else
ImageFolder        torchvision's, with the same decoder, in a shuffled DataLoader with as many worker processes, which persist
                   from turn to turn
the loader         Loader of gen/training/loading.py on a read that decodes the files of a folder into a batch

Pillow decodes without the interpreter lock, which Python and the copy to numpy need: one row each gives the time that holds it.

Every turn begins with no batch read ahead, on all sides. The training rows train a small tokenizer by fit(): on batches that the
loader reads from image files or from records on the disk, and on images in memory. The first steps are not timed.

    python benchmarks/loading.py --cifar cifar10-train.zip --out benchmarks/results/loading.json
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from midway.gen.core.config import to_dict
from midway.gen.core.runs import Run
from midway.gen.data.images import load_images
from midway.gen.files.decoding import Decoded, decode
from midway.gen.files.file_set import FileSet, open_files
from midway.gen.files.record_writer import RecordFormat, seal, write_shard
from midway.gen.files.records import open_records
from midway.gen.tokenizer.objective import TokenizerObjective
from midway.gen.training.batches import Context, ImageBatch
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.gen.training.interface import Items
from midway.gen.training.loading import Loader
from midway.tokenizers.tokenizer import ImageTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Measured, conclude, judged, printed

BARE_TARGET, PEER_TARGET, TRAINING_TARGET = 0.9, 1.0, 0.95
UNTIMED_TURNS, UNTIMED_STEPS = 1, 3
Work = Callable[[], float]
"""Does the work of a turn; seconds."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured: images of `side` and `small` pixels, the batch, turns, and the steps of a training."""

    images: int = 256
    side: int = 256
    small: int = 32
    batch: int = 32
    turns: int = 11
    steps: int = 12
    training_batch: int = 128
    training_turns: int = 15
    width: int = 32

    @property
    def timed_steps(self) -> int:
        """Of each training."""
        return self.steps - UNTIMED_STEPS


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def take_turns(sides: dict[str, Work], turns: int) -> dict[str, list[float]]:
    """Seconds of every side in each of `turns` turns, after UNTIMED_TURNS."""
    found = [{name: work() for name, work in sides.items()} for _ in range(UNTIMED_TURNS + turns)]
    return {name: [turn[name] for turn in found[UNTIMED_TURNS:]] for name in sides}


def row(
    name: str, ours: Sequence[float], peer_name: str, peer: Sequence[float], images: int, least: float | None
) -> Measured:
    """Milliseconds an image of both sides, and the median ratio of their turns."""
    ratios = [theirs / own for own, theirs in zip(ours, peer, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    mine, theirs = (1e3 * statistics.median(side) / images for side in (ours, peer))
    found = judged(name, "ms/image", mine, peer_name, theirs, least, turns=len(ratios))
    held = None if least is None else middle >= least
    return replace(found, ratio=round(middle, 3), held=held, quartiles=(round(low, 3), round(high, 3)))


# ---- reading ----


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEGs of two classes (quality 95): coarse noise and fine noise, of about 40 kB at 256 x 256."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
        place = folder / str(number % 2) / f"{number:06d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(place, quality=95)


def pixels(name: str, read: Callable[[str], bytes]) -> Decoded:
    """One file, decoded as everywhere; ValueError if it is damaged."""
    found = decode(name, read, None, None)
    if not isinstance(found, Decoded):
        raise ValueError(f"{found.name}: {found.reason}")
    return found


def read_batch(files: FileSet, side: int, wanted: Tensor) -> ImageBatch:
    """uint8 (b, 3, side, side), each file decoded as it is asked for."""
    images = np.empty((len(wanted), 3, side, side), np.uint8)
    for place, item in zip(images, wanted.tolist(), strict=True):
        place[:] = pixels(files.names[item], files.read).pixels.transpose(2, 0, 1)
    return ImageBatch(torch.from_numpy(images), torch.zeros(len(wanted), dtype=torch.int64))


def file_of(path: str) -> Tensor:
    """The same of a path, for ImageFolder."""
    return torch.from_numpy(np.array(pixels(path, lambda name: Path(name).read_bytes()).pixels)).permute(2, 0, 1)


def decoding_alone(files: FileSet, workers: int, batch: int) -> float:
    """All files by `workers` threads, a batch at a time."""

    def work(names: Sequence[str]) -> None:
        for name in names:
            pixels(name, files.read)

    parts = [files.names[at : at + batch] for at in range(0, len(files.names), batch)]

    def all_parts() -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, parts))

    return timed(all_parts)


def the_loader(files: FileSet, side: int, workers: int, batch: int, accelerator: Accelerator) -> float:
    """All files by a fresh loader, as fit() uses it."""
    config = TrainConfig(steps=len(files.names) // batch, batch_size=batch, workers=workers)
    context = Context(0, 0, torch.arange(batch))

    def all_batches() -> None:
        with Loader(Items(partial(read_batch, files, side), len(files.names)), config, accelerator) as loader:
            for step in range(config.steps):
                assert len(loader(step, 0, context).images) == batch

    return timed(all_batches)


def image_folder(loader: Any, batch: int) -> float:
    """All files by a DataLoader."""

    def all_batches() -> None:
        for images, _ in loader:
            assert len(images) == batch

    return timed(all_batches)


@contextmanager
def reading_sides(folder: Path, side: int, workers: Sequence[int], batch: int) -> Iterator[dict[str, Work]]:
    """The three ways of reading all images of a folder, with each number of workers."""
    AcceleratorState._reset_state(True)
    accelerator, sides = Accelerator(cpu=True), dict[str, Work]()
    with open_files(folder) as files:
        for count in workers:
            peer = DataLoader(
                ImageFolder(str(folder), loader=file_of), batch, True, num_workers=count, persistent_workers=count > 0
            )
            sides[f"decoding alone {count}"] = partial(decoding_alone, files, count, batch)
            sides[f"the loader {count}"] = partial(the_loader, files, side, count, batch, accelerator)
            sides[f"ImageFolder {count}"] = partial(image_folder, peer, batch)
        yield sides


def reading_rows(sizes: Sizes, side: int, workers: Sequence[int], judge: bool) -> Iterator[Measured]:
    """The loader beside both peers, with each number of workers; and what two workers gain, of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), sizes.images, side)
        with reading_sides(Path(folder), side, workers, sizes.batch) as sides:
            found = take_turns(sides, sizes.turns)
    for count in workers:
        name = f"{side}x{side} JPEG, {count} worker(s)"
        for peer, target in (("decoding alone", BARE_TARGET), ("ImageFolder", PEER_TARGET)):
            times = found[f"the loader {count}"], found[f"{peer} {count}"]
            yield row(name, times[0], peer, times[1], sizes.images, target if judge else None)
    first, *more = workers
    for kind in ("decoding alone", "ImageFolder"):
        for count in more:
            name = f"{side}x{side} JPEG, {kind}, {count} workers"
            yield row(name, found[f"{kind} {count}"], f"{first}", found[f"{kind} {first}"], sizes.images, None)


# ---- the interpreter lock ----


class Unlocked:
    """A decoder of Pillow that adds up the processor time of its C code, which runs without the interpreter lock."""

    seconds = 0.0

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def decode(self, data: bytes) -> tuple[int, int]:
        begun = time.thread_time()
        found = self.decoder.decode(data)
        Unlocked.seconds += time.thread_time() - begun
        return found


def lock_row(side: int, sizes: Sizes) -> Iterator[Measured]:
    """Processor time of decoding a JPEG of this side, beside the part of it that holds the lock. Their ratio is the number of
    threads beyond which decoding is no faster."""
    plain, pairs = Image._getdecoder, list[tuple[float, float]]()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), 1, side)
        data = next(Path(folder).rglob("*.jpg")).read_bytes()
    for _ in range(UNTIMED_TURNS + sizes.turns):
        begun = time.thread_time()
        for _ in range(sizes.images):
            pixels("one", lambda _: data)
        whole, Unlocked.seconds = time.thread_time() - begun, 0.0
        try:
            Image._getdecoder = lambda *arguments: Unlocked(plain(*arguments))
            for _ in range(sizes.images):
                pixels("one", lambda _: data)
        finally:
            Image._getdecoder = plain
        pairs.append((whole - Unlocked.seconds, whole))
    held, whole = zip(*pairs[UNTIMED_TURNS:], strict=True)
    yield row(f"{side}x{side} JPEG, holding the interpreter lock", held, "all of a decode", whole, sizes.images, None)


# ---- training ----


class Stopwatch(nn.Module):
    """A model whose training notes when each step ends."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.ends = model, list[float]()

    def loss(self, batch: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner.loss(batch, context)  # pyright: ignore[reportCallIssue]

    def after_step(self, step_ok: Tensor) -> None:
        self.inner.after_step(step_ok)  # pyright: ignore[reportCallIssue]
        self.ends.append(time.perf_counter())


def training(items: Items, side: int, sizes: Sizes, workers: int) -> float:
    """Seconds of the timed steps of a small tokenizer's training."""
    torch.manual_seed(0)
    AcceleratorState._reset_state(True)
    quantizer = {"type": "fsq", "levels": [8, 5, 5, 5]}
    tokenizer = ImageTokenizer(
        in_channels=3, image_size=side, width=sizes.width, downsample=4, blocks=1, quantizer=quantizer
    )
    model = Stopwatch(TokenizerObjective(tokenizer))
    config = TrainConfig(steps=sizes.steps, batch_size=sizes.training_batch, save_seconds=0, workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), "benchmark", {"train": to_dict(config)}, quiet=True)
        fit(model, items, config, run, Accelerator(cpu=True))
    return model.ends[-1] - model.ends[UNTIMED_STEPS - 1]


def training_rows(sizes: Sizes, source: Path, workers: Sequence[int]) -> Iterator[Measured]:
    """Training that reads image files or records, each beside training from memory."""
    images = load_images(str(source), channels=3).images[:]
    labels, side = torch.zeros(len(images), dtype=torch.int64), images.shape[-1]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        form = RecordFormat("uint8", tuple(images.shape[1:]))
        seal(folder, "images", form, [write_shard(folder, 0, form, [(images, {})])], {})
        records, files = open_records(folder, "images", "run it again"), stack.enter_context(open_files(source))
        memory = Items(lambda wanted: ImageBatch(images[wanted], labels[wanted]), len(images))
        on_disk = {
            "image files": Items(partial(read_batch, files, side), len(images)),
            "records": Items(lambda wanted: ImageBatch(records.read(wanted), labels[wanted]), len(images)),
        }
        for name, items in on_disk.items():
            for threads in workers:
                sides = partial(training, items, side, sizes, threads), partial(training, memory, side, sizes, 0)
                found = take_turns(dict(zip(("ours", "memory"), sides, strict=True)), sizes.training_turns)
                label, count = f"training from {name}, {threads} worker(s)", sizes.training_batch * sizes.timed_steps
                yield row(label, found["ours"], "memory", found["memory"], count, TRAINING_TARGET)


# ---- all of it ----


def main() -> int:
    """Print the table, write the JSON; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loading.json")
    parser.add_argument(
        "--cifar", type=Path, help="folder or zip of CIFAR-10's training images (default: noise of its size)"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sizes, workers = Sizes(**{name: getattr(arguments, name) for name in vars(Sizes())}), arguments.workers
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.cifar or Path(folder)
        if arguments.cifar is None:
            write_images(source, max(sizes.images, sizes.training_batch), sizes.small)
        rows = printed(
            [
                partial(reading_rows, sizes, sizes.side, workers, True),
                partial(reading_rows, sizes, sizes.small, workers, False),
                *(partial(lock_row, side, sizes) for side in (sizes.small, sizes.side)),
                partial(training_rows, sizes, source, workers),
            ],
            width=56,
        )
    return conclude(rows, arguments.out, "cpu", sizes=vars(sizes), torch_threads=torch.get_num_threads())


if __name__ == "__main__":
    sys.exit(main())
