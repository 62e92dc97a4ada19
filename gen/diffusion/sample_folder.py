"""Samples as single images in a folder, which an interrupted command completes, and which several processes share.

    00000012.png, 00000012-3.png, 00000012-3-cat.png    an image: its seed, the number of its class, the class by name
    sampling.json                                       all that the images depend on; other settings do not mix with them
    dataset.json                                        the labels, as EDM lists them, when all is drawn

An image is whole or absent. Archives are made of such a folder, so that an interrupted one is completed, too.
"""

import contextlib
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from midway.gen.core.errors import DiskError, UsageError, raising
from midway.gen.core.files import DAMAGE, MACHINE, clear_temporaries, read_json, replaced_name, write_atomically
from midway.gen.core.locks import LOCK, claimed
from midway.gen.core.text import json_text
from midway.gen.data.pictures import npz_writer, png_bytes, zip_files

SETTINGS, LABELS = "sampling.json", "dataset.json"
LAST = b"\x00\x00\x00\x00IEND\xaeB`\x82"
"""How a whole PNG ends."""
READ = 256  # images at once
_NAME = re.compile(r"(\d{8,})(?:-(\d+)(?:-.*)?)?\.png", re.DOTALL)
_UNSAFE = re.compile(r"[^\w.-]+")
_LONGEST = 80  # bytes of a class name in the name of a file


def file_name(seed: int, label: int | None = None, name: str = "") -> str:
    """The name of an image's file; of a class's name, letters, digits, `.`, `-` and `_` stay, and what is between becomes `_`."""
    safe = _UNSAFE.sub("_", unicodedata.normalize("NFC", name)).encode()[:_LONGEST].decode(errors="ignore").strip("._-")
    parts = [f"{seed:08d}", *([] if label is None else [str(label)])]
    return "-".join([*parts, *([safe] if label is not None and safe not in ("", str(label)) else [])]) + ".png"


@dataclass(frozen=True)
class SampleFolder:
    """The folder `path` of images that depend on `settings` (JSON) and their seeds; `names` of the classes, () where unknown."""

    path: Path
    settings: dict[str, Any]
    classes: int = 0
    names: tuple[str, ...] = ()

    def file(self, seed: int, label: int) -> Path:
        """Where the image of a seed belongs."""
        known = None if self.classes == 0 else label
        return self.path / file_name(seed, known, self.names[label] if self.names and self.classes else "")

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Within the block this process's own, made if it is not there, tidied, with its settings written.

        UsageError while another command writes there, for samples of other settings, and for any other folder. DiskError.
        """
        self.check()
        with claimed(self.path, "written"):
            self.check()  # another command may have been here first
            clear_temporaries(self.path)
            if not (self.path / SETTINGS).exists():
                write_atomically(self.path / SETTINGS, (json_text(self.settings, indent=1) + "\n").encode())
            yield

    def check(self) -> None:
        """UsageError for a folder of samples of other settings, of anything else, and for what is no folder."""
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise UsageError(f"{self.path} is no folder", "images are written there", "choose another --out")
        if not (self.path / SETTINGS).exists():
            others = [path.name for path in self.path.iterdir() if path.name != LOCK and replaced_name(path) is None]
            if others:
                why, fix = f"it holds {others[0]}, and no {SETTINGS}", "choose another --out, or an empty folder"
                raise UsageError(f"{self.path} holds other files", why, fix)
            return
        fix = f"choose another --out, or remove {self.path}"
        with raising(UsageError, f"{self.path / SETTINGS} cannot be read", fix, *DAMAGE):
            found = read_json(self.path / SETTINGS)
            found = {**found}
        own = json.loads(json_text(self.settings))
        other = [key for key in {**own, **found} if own.get(key) != found.get(key)]
        if other:
            listed = "; ".join(f"{key} was {found.get(key)}, is {own.get(key)}" for key in other[:3])
            raise UsageError(
                f"{self.path} holds samples of other settings", listed, "choose another --out, or the same settings"
            )

    def missing(self, seeds: Tensor, labels: Tensor) -> list[int]:
        """The places of those seeds (B,) whose image is not there, or not whole."""
        pairs = zip(seeds.tolist(), labels.tolist(), strict=True)
        return [place for place, pair in enumerate(pairs) if not _is_whole(self.file(*pair))]

    def write(self, seeds: Tensor, labels: Tensor, images: Tensor) -> None:
        """Write uint8 images (B, C, H, W) that are not there. DiskError."""
        for place in self.missing(seeds, labels):
            path = self.file(int(seeds[place]), int(labels[place]))
            temporary = path.with_name(f".{path.name}.{MACHINE}-{os.getpid()}.tmp")
            with raising(DiskError, f"{path} cannot be written", "free space; the same command goes on", OSError):
                try:
                    temporary.write_bytes(png_bytes(images[place].permute(1, 2, 0).numpy(), compression=6))
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)

    def finish(self) -> None:
        """List the labels of all images in the folder."""
        names = sorted(name for name in os.listdir(self.path) if _NAME.fullmatch(name))
        write_atomically(self.path / LABELS, _labels_json(names).encode())

    # ---- archives ----

    def about(self, seeds: Tensor) -> str:
        """Names the images of these seeds in an archive."""
        own = json_text([self.settings, int(seeds[0]), len(seeds)], sort_keys=True)
        return f"midway {hashlib.sha256(own.encode()).hexdigest()[:16]}"

    def pack(self, target: Path, seeds: Tensor, labels: Tensor) -> None:
        """Write the images of these seeds as `target`, a .zip or .npz; what is there of other images raises UsageError."""
        files = [self.file(*pair) for pair in zip(seeds.tolist(), labels.tolist(), strict=True)]
        if target.suffix.lower() == ".zip":
            names = [file.name for file in files]
            write_atomically(self.path / LABELS, _labels_json(names).encode())
            zip_files(target, [*names, LABELS], self.path, self.about(seeds))
            return
        own = labels if self.classes else None
        with npz_writer(target, len(files), own, self.about(seeds), seeds) as writer:
            for at in range(0, len(files), READ):
                writer.add(torch.stack([_read(file) for file in files[at : at + READ]]))


PARTS = ".parts"
"""The folder in which images of an archive are drawn is named like it, with this ending."""


def _is_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-len(LAST), os.SEEK_END)
            return file.read() == LAST
    except OSError:
        return False


def _read(path: Path) -> Tensor:
    """uint8 (C, H, W)."""
    with Image.open(path, formats=("PNG",)) as image:
        pixels = np.asarray(image)
    return torch.from_numpy(pixels.copy()).view(*pixels.shape[:2], -1).permute(2, 0, 1)


def _labels_json(names: Sequence[str]) -> str:
    """dataset.json: (name, label) of each image, null without classes."""
    matches = [(name, found[2]) for name in names if (found := _NAME.fullmatch(name)) is not None]
    classes = all(label is not None for _, label in matches)
    return json.dumps({"labels": [[name, int(label)] for name, label in matches] if classes else None}) + "\n"
