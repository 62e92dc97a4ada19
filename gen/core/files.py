"""Files that are read to an end, files and directories that are whole or absent, and hashes of both and of networks.

Nothing of a user is opened before `regular_file` has seen it: a pipe waits for ever, a device has no end, and a file that is
larger than anything honest would fill the memory. What is read whole has a limit, a constant beside its reader.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from midway.gen.core.errors import DataError, DiskError, UsageError, one_line, raising

DAMAGE = (
    *(OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RuntimeError, MemoryError),
)
"""Errors of reading files that are missing, damaged or of another kind, and of building a network from them."""

ZIP_DAMAGE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, ValueError, KeyError, RuntimeError)
"""Errors of reading zip files that are missing, damaged, encrypted or of another kind."""
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Of compression; zipfile expands others without bound."""
TEXT_LIMIT = 64 << 20
"""Bytes of a JSON file or another text that is read whole. Those that are written here have some kB."""
LOG_LIMIT = 8 << 30
"""Bytes of a metrics.jsonl: 20 million lines of 400 bytes."""
WEIGHTS_LIMIT = 256 << 30
"""Bytes of a file of weights or of an optimizer's state: 64 billion numbers in float32."""
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""This machine in the names of temporaries: `.<name>.<machine>-<process>.tmp`."""
ABANDONED_SECONDS = 86400.0
"""After so long without a write another machine's temporary, whose process cannot be looked for, is nobody's."""
_TEMPORARY = re.compile(r"\.(.+)\.(?:([0-9a-f]{8})-)?(\d+)\.(?:tmp|old)", re.DOTALL)
"""Earlier versions named the process alone."""


# ---- reading ----


def regular_file(path: Path, limit: int | None = None) -> Path:
    """`path`, if it is a regular file, or a link to one, of at most `limit` bytes (None: it is read in parts); else OSError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}, not a regular file")
    if limit is not None:
        check_size(found.st_size, limit)
    return path


def check_size(size: int, limit: int, what: str = "bytes") -> None:
    """OSError where a declared `size` is above the `limit`."""
    if size > limit:
        raise OSError(f"it declares {size:,} {what}, more than the limit of {limit:,}")


def read_bytes(path: Path, limit: int) -> bytes:
    """The bytes that a regular file has when it is opened; OSError as `regular_file`."""
    with regular_file(path, limit).open("rb") as file:
        return file.read(os.fstat(file.fileno()).st_size)


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """The text of a regular file in UTF-8; OSError as `regular_file`, UnicodeDecodeError, which is a ValueError."""
    return read_bytes(path, limit).decode()


def read_json(path: Path, limit: int = TEXT_LIMIT) -> Any:
    """The contents of a JSON file; OSError as `regular_file`, ValueError for anything else."""
    text = read_text(path, limit)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and header of a safetensors file; OSError as `regular_file`, SafetensorError for anything else."""
    with safe_open(regular_file(path, WEIGHTS_LIMIT), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)


def member(archive: zipfile.ZipFile, name: str | zipfile.ZipInfo, limit: int) -> zipfile.ZipInfo:
    """A member of a zip that declares at most `limit` bytes; OSError if it is larger, KeyError if there is none."""
    entry = archive.getinfo(name) if isinstance(name, str) else name
    check_size(entry.file_size, limit)
    if entry.compress_type not in ZIP_METHODS:
        raise OSError("it is neither stored nor deflated: make the zip again")
    return entry


def read_member(archive: zipfile.ZipFile, name: str | zipfile.ZipInfo, limit: int) -> bytes:
    """The bytes of a member of a zip, as many as it declares and no more than `limit`; errors of `ZIP_DAMAGE`."""
    entry = member(archive, name, limit)
    with archive.open(entry) as file:
        return file.read(entry.file_size)


def reading(path: Path, fix: str, why: str = "{}") -> contextlib.AbstractContextManager[None]:
    """Within the block an error of `DAMAGE` becomes a DataError that names `path`; `why` holds its text."""
    return raising(DataError, f"{path} cannot be read", fix, *DAMAGE, why=lambda error: why.format(one_line(error)))


# ---- writing ----


def appending(path: Path) -> IO[str]:
    """`path` opened for text at its end; OSError, also for a pipe that nobody reads, where `open` waits for ever."""
    flag = getattr(os, "O_NONBLOCK", 0)  # not on Windows, which has no such pipes
    return open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | flag, 0o666))


def check_path(path: Path) -> Path:
    """`path`; UsageError where its name is not UTF-8, for files of weights could not be read there again."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        why = "its name has bytes that are not UTF-8, and files of weights cannot be opened there"
        raise UsageError(f"{path} cannot be used", why, "choose another --out") from None
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within the block a free path beside `path`; what is made there, file or directory, then replaces `path` as a whole.

    It is on the disk before it replaces anything. When the block raises, nothing is left of it; OSError also of the disk.
    What killed processes left of the same is removed first.
    """
    temporary = _beside(path, "tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_temporaries(path.parent, path.name)
    try:
        yield temporary
        _settle(temporary)
        _put(temporary, path)
    finally:
        _remove(temporary)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` completely or not at all. DiskError if not."""
    fix = "free disk space or choose another directory"
    with raising(DiskError, f"cannot write {path}", fix, OSError), replacing(path) as temporary:
        temporary.write_bytes(data)


def clear_temporaries(folder: Path, name: str | None = None) -> None:
    """Undo in `folder` what killed processes left of `replacing`: half-written files, directories moved out of the way.

    Of all files, or of `name`. Nothing is touched that a running process, here or on another machine, may be writing.
    """
    left = [path for path in folder.glob(".*") if _is_abandoned(path) and name in (None, replaced_name(path))]
    for path in left:
        target = folder / str(replaced_name(path))
        if path.suffix == ".old" and not target.exists():
            with contextlib.suppress(OSError):  # another process was first
                path.rename(target)
        else:
            _remove(path)


def clear_all_temporaries(folder: Path) -> None:
    """`clear_temporaries` of a folder and all folders in it; links are not followed."""
    for root, _, _ in os.walk(folder):
        clear_temporaries(Path(root))


def replaced_name(path: Path) -> str | None:
    """The name of what a temporary of `replacing` was to become, None for any other path."""
    found = _TEMPORARY.fullmatch(path.name)
    return found and found[1]


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{MACHINE}-{os.getpid()}.{ending}")


def _is_abandoned(path: Path) -> bool:
    """Whether this is a temporary that nobody is writing; one of this process is not, since it ends with its block."""
    found = _TEMPORARY.fullmatch(path.name)
    if found is None:
        return False
    machine, process = found[2], int(found[3])
    if machine in (None, MACHINE):
        return process == os.getpid() or not _is_alive(process)
    return time.time() - _last_write(path) > ABANDONED_SECONDS


def _is_alive(process: int) -> bool:
    """Whether a process of this machine runs; True where that cannot be known."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's, or no /proc
        return True
    return state != "Z"  # killed, and nobody has taken note


def _last_write(path: Path) -> float:
    """The newest time of a file, or of anything in a directory; the present if it is gone."""
    with contextlib.suppress(OSError):
        return max(inner.lstat().st_mtime for inner in (path, *path.rglob("*")))
    return time.time()


def _settle(path: Path) -> None:
    """Put a file or a directory on the disk, its files as readable as itself (safetensors' are the owner's alone)."""
    for inner in path.rglob("*"):
        if inner.is_file():
            inner.chmod(path.stat().st_mode & 0o666)
        sync(inner)
    sync(path)


def _put(temporary: Path, path: Path) -> None:
    """Move it to `path`; a directory that is there goes out of the way before, and back if that fails."""
    old = _beside(path, "old")
    if path.is_dir() and temporary.is_dir():
        path.rename(old)
    try:
        temporary.replace(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    sync(path.parent)
    _remove(old)


def _remove(path: Path) -> None:
    """Remove a file or directory if there is one, of a link the link alone; errors of removal are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """fsync a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- hashes ----


def file_hash(path: Path) -> str:
    """sha256 of a regular file, 64 hexadecimal digits."""
    with regular_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_hash(description: str, state: Mapping[str, Tensor]) -> str:
    """12 hexadecimal digits: sha256 of a description and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
