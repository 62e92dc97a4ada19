"""Random reads of stored images: our records beside numpy's memory map and an Arrow file as Hugging Face's `datasets` maps it.

Every container holds the same uint8 images of 256 x 256 x 3 in one folder, and is read in a process of its own, in batches of 64
at random places, into new tensors. Turns alternate between the containers; rates are medians over the turns, with the pages of
all files in memory as far as they fit. `resident` is the growth of the resident memory over the reads: a mapped file counts there
by the pages that were touched, though the system may take them back.

    python benchmarks/storage.py --images 4000 --out benchmarks/results/storage.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from midway.gen.core.environment import environment
from midway.gen.files.record_writer import RecordFormat, records_per_shard, seal, write_shard
from midway.gen.files.records import open_records

SHAPE = (3, 256, 256)
SIZE = int(np.prod(SHAPE))
BATCH, READ_BATCHES, TURNS = 64, 30, 5
NAMES = ("records", "memory map", "arrow")


def write(folder: Path, count: int) -> None:
    """The same images in all three; what is not installed is left out."""
    images = torch.randint(0, 256, (64, *SHAPE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    form, per_shard = RecordFormat("uint8", SHAPE), records_per_shard(count, SIZE)
    (folder / "records").mkdir()
    numbers = [range(at, min(at + per_shard, count)) for at in range(0, count, per_shard)]
    indices = [
        write_shard(folder / "records", i, form, ((images[k % 64 : k % 64 + 1], {}) for k in some))
        for i, some in enumerate(numbers)
    ]
    seal(folder / "records", "benchmark", form, indices, {})
    mapped = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, *SHAPE))
    for k in range(count):
        mapped[k] = images[k % 64].numpy()
    mapped.flush()
    try:
        import pyarrow as pa
    except ImportError:
        return
    schema = pa.schema([("image", pa.binary(SIZE))])
    with pa.OSFile(str(folder / "images.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for at in range(0, count, 100):
            rows = [images[k % 64].numpy().tobytes() for k in range(at, min(at + 100, count))]
            stream.write_batch(pa.record_batch([pa.array(rows, pa.binary(SIZE))], schema=schema))


def reader(name: str, folder: Path) -> Callable[[Tensor], Tensor]:
    """int64 (n,) -> uint8 (n, C, H, W) in new memory."""
    if name == "records":
        records = open_records(folder / "records", "benchmark", "run it again")
        return records.read
    if name == "memory map":
        mapped = np.load(folder / "images.npy", mmap_mode="r")
        return lambda items: torch.from_numpy(mapped[items.numpy()])
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.memory_map(str(folder / "images.arrow"))).read_all()["image"]

    def read(items: Tensor) -> Tensor:
        rows = [np.frombuffer(table[i].as_buffer(), np.uint8) for i in items.tolist()]
        return torch.from_numpy(np.stack(rows).reshape(-1, *SHAPE))

    return read


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(name: str, folder: Path, count: int, turn: int) -> dict[str, float]:
    """Images a second, and the growth of resident memory, in this process."""
    read, generator = reader(name, folder), torch.Generator().manual_seed(turn)
    read(torch.randint(0, count, (BATCH,), generator=generator))
    before, start = resident(), time.perf_counter()
    for _ in range(READ_BATCHES):
        read(torch.randint(0, count, (BATCH,), generator=generator))
    return {"images_per_second": BATCH * READ_BATCHES / (time.perf_counter() - start), "resident": resident() - before}


def main() -> None:
    """Write, measure in turns, remove; print and store the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, folder, count, turn = options.measure
        print(json.dumps(measure(name, Path(folder), int(count), int(turn))))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder, options.images)
        names = [name for name in NAMES if name != "arrow" or (folder / "images.arrow").exists()]
        turns = {name: list[dict[str, float]]() for name in names}
        for turn in range(options.turns):
            for name in names:
                line = [sys.executable, __file__, "--measure", name, place, str(options.images), str(turn)]
                turns[name].append(json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout))
    keys = ("images_per_second", "resident")
    rows = {
        name: {key: statistics.median(each[key] for each in found) for key in keys} for name, found in turns.items()
    }
    for name, row in rows.items():
        row["of_memory_map"] = statistics.median(
            mine["images_per_second"] / other["images_per_second"]
            for mine, other in zip(turns[name], turns["memory map"], strict=True)
        )
        speed = f"{row['images_per_second']:8,.0f} images/s, {row['of_memory_map']:.2f} of a memory map"
        print(f"{name:<12}{speed}, resident +{row['resident']:,.0f} MiB")
    if options.out:
        found = {"images": options.images, "shape": SHAPE, "batch": BATCH, "turns": options.turns, "rows": rows}
        options.out.write_text(json.dumps({**found, "environment": environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
