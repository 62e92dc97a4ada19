"""Files that are whole or absent, and hashes of what networks hold."""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from midway.gen.core.errors import DiskError


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` completely or not at all: a temporary file beside it, fsync, replace. DiskError if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DiskError(f"cannot write {path}", str(error), "free disk space or choose another directory") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def clear_temporaries(folder: Path) -> None:
    """Remove what `write_atomically` was writing in `folder` when its process was killed."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the operating system put a file or directory on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def state_hash(description: str, state: Mapping[str, Tensor]) -> str:
    """12 hexadecimal digits: sha256 of a description and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
