"""Build a set of one JPEG many times, and take a training step on it; the last line has the peak RSS in KiB after each, as JSON.

python peak_memory.py FOLDER COUNT
"""

import io
import json
import sys
import zipfile
from pathlib import Path

import torch
from peaks import peak_kib
from PIL import Image

from midway.gen.commands import data
from midway.gen.flags.cli import resolve
from midway.gen.flags.tasks import TokenizerTask
from midway.gen.recipes.recipes import TOKENIZER_RECIPES
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.batches import Context
from midway.gen.trainings import train_tokenizer


def write_source(path: Path, count: int) -> None:
    """A zip with `count` images of 256 x 256 in two classes: the same one under many names."""
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, "JPEG")
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(count):
            archive.writestr(f"{'ab'[index % 2]}/{index:06}.jpg", file.getvalue())


def main(folder: Path, count: int) -> dict[str, int]:
    """Peaks before, after the build, after a training step, and after all else that a tokenizer's training reads."""
    write_source(folder / "set.zip", count)
    line = ["digits-fsq", "--data", str(folder / "set"), "--out", str(folder / "run"), "--model.width", "4"]
    task = resolve(TokenizerTask, TOKENIZER_RECIPES, [*line, "--model.downsample", "32", "--batch-size", "4"])
    accelerator, found = make_accelerator(task.train, task.out), {"imports": peak_kib()}
    data.build_command([str(folder / "set.zip"), "--out", str(folder / "set"), "--workers", "2"])
    found["build"] = peak_kib()
    parts = train_tokenizer.make_parts(task, accelerator)
    items = torch.arange(0, count, count // 4)[:4] * 4 // 5
    loss, _ = parts.model.loss(parts.items.read(items), Context(0, 0, items))
    loss.backward()
    return found | {"step": peak_kib()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
