"""Image files of a folder or a zip, read in place: their names, their classes, and work on all of them by several threads."""

import os
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

from PIL import Image

from midway.gen.core.errors import DataError, raising
from midway.gen.core.files import ZIP_DAMAGE, read_bytes, read_member, regular_file
from midway.gen.data.decoding import IMAGE_LIMIT, Decoded, Undecodable, Unusable, counted, decode

Result = TypeVar("Result")

_PORTABLE, _HEIF = (".ppm", ".pgm", ".pbm", ".pnm"), (".avif", ".heic", ".heif")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", *_PORTABLE, *_HEIF)
_CHUNK = 16  # files a thread takes at once: one future per file would cost as much as a small JPEG
_WORTH_A_THREAD = 5e-4  # seconds an image; about a 128x128 PNG
_LISTED = 5  # files named in an error
_BROKEN, _UNUSABLE = "cannot be decoded", "intact but cannot be used"


@dataclass(frozen=True)
class FileSet:
    """The image files of one folder or zip."""

    names: tuple[str, ...]  # sorted, relative to the source, "/" between parts
    read: Callable[[str], bytes]  # safe to call from several threads
    others: tuple[str, ...] = ()  # files beside them whose names do not end like an image's


# ---- which files, and their classes ----


@contextmanager
def open_files(path: Path) -> Iterator[FileSet]:
    """The images of a folder or zip, to be read while the context is open. DataError: missing, broken or without images."""
    if path.is_dir():
        yield _file_set(path, _walk(path), lambda name: read_bytes(path / name, IMAGE_LIMIT))
    else:
        with _open_zip(path) as archive:
            found = (entry.filename for entry in archive.infolist() if not entry.is_dir())
            yield _file_set(path, found, _locked_read(archive))


def class_labels(names: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """(label of each file, class names): the folder just below a common wrapper; flat files are one class, `all`."""
    parts = _without_wrapper([PurePosixPath(name).parts for name in names])
    loose = [name for name, part in zip(names, parts, strict=True) if len(part) == 1]
    if len(loose) == len(names):
        return [0] * len(names), ("all",)
    classes = tuple(sorted({part[0] for part in parts if len(part) > 1}))
    _check_loose_files(loose, classes)
    _check_class_names(classes)
    index = {name: label for label, name in enumerate(classes)}
    return [index[part[0]] for part in parts], classes


def _walk(folder: Path) -> Iterator[str]:
    """Relative names of all files below `folder`, through links but never back up into a parent."""
    for here, folders, files in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        parent = Path(here).resolve()
        folders[:] = [name for name in folders if not parent.is_relative_to((parent / name).resolve())]
        yield from ((Path(here) / name).relative_to(folder).as_posix() for name in files)


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed", str(error), "check its permissions") from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    fix = "give a folder of images or a complete .zip; if this was downloaded, download it again"
    with raising(DataError, f"{path} cannot be read as a zip of images", fix, *ZIP_DAMAGE):
        return zipfile.ZipFile(regular_file(path))


def _locked_read(archive: zipfile.ZipFile) -> Callable[[str], bytes]:
    lock = threading.Lock()  # ZipFile counts its open members without one

    def read(name: str) -> bytes:
        with lock:
            return read_member(archive, name, IMAGE_LIMIT)

    return read


def _is_junk(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _file_set(path: Path, found: Iterable[str], read: Callable[[str], bytes]) -> FileSet:
    files = {name for name in found if not _is_junk(name)}
    images = tuple(sorted(name for name in files if name.lower().endswith(EXTENSIONS)))
    if not images:
        endings = ", ".join(sorted({PurePosixPath(name).suffix or "no extension" for name in files})[:_LISTED])
        why = f"it holds {len(files)} other files ({endings})" if files else "it is empty"
        raise DataError(f"no images in {path}", why, f"put image files there ({' '.join(EXTENSIONS)})")
    return FileSet(images, read, tuple(sorted(files.difference(images))))


def _without_wrapper(parts: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Drop folders that all files share, as long as a folder remains below."""
    while all(len(part) > 2 and part[0] == parts[0][0] for part in parts):
        parts = [part[1:] for part in parts]
    return parts


def _check_loose_files(loose: Sequence[str], classes: Sequence[str]) -> None:
    if loose:
        what = f"{len(loose)} images lie beside the class folders, for example {loose[0]}"
        why = f"with class folders ({', '.join(classes[:_LISTED])}) every image needs a class"
        raise DataError(what, why, "move them into a class folder, or all images into one folder")


def _check_class_names(classes: tuple[str, ...]) -> None:
    splits = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
    if len(classes) > 1 and splits.issuperset(name.lower() for name in classes):
        what = f"the folders {', '.join(classes)} look like splits, not classes"
        raise DataError(what, "they would become the labels", "give the path of one of them (unpack a zip first)")


# ---- all files ----


def decode_all(files: FileSet, channels: int | None, resize: int | None) -> Iterator[Decoded | Undecodable]:
    """Every file, decoded, in the order of `files.names`."""
    return map_files(files.names, lambda name: decode(name, files.read, channels, resize))


def map_files(names: Sequence[str], work: Callable[[str], Result]) -> Iterator[Result]:
    """`work` of every name, in their order; by several threads where that is faster."""
    Image.init()  # plugins are registered once here rather than by racing threads

    def work_chunk(names: Sequence[str]) -> list[Result]:
        return [work(name) for name in names]

    start = time.perf_counter()
    first = work_chunk(names[:_CHUNK])
    threads = _threads((time.perf_counter() - start) / len(first))
    pool, ahead = ThreadPoolExecutor(threads), deque()
    try:
        yield from first
        for at in range(_CHUNK, len(names), _CHUNK):
            ahead.append(pool.submit(work_chunk, names[at : at + _CHUNK]))
            if len(ahead) > threads:  # decoded images must not pile up before they are taken
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _threads(seconds_each: float) -> int:
    """Small images hold the interpreter lock for most of their time: two threads took twice as long as one."""
    return 1 if seconds_each < _WORTH_A_THREAD else os.cpu_count() or 1


def check_bad(bad: Sequence[Undecodable], total: int, on_bad_image: Literal["error", "skip"]) -> tuple[str, ...]:
    """The stated skip, if any. DataError naming the first few files: when not skipping, or above 1 % of `total`."""
    if not bad:
        return ()
    unusable = [item for item in bad if isinstance(item, Unusable)]
    broken = [item for item in bad if not isinstance(item, Unusable)]
    if on_bad_image == "skip" and 100 * len(bad) <= total:
        return tuple(_skipped(items, why) for items, why in ((broken, _BROKEN), (unusable, _UNUSABLE)) if items)
    listed = "; ".join(f"{item.name} ({item.reason})" for item in bad[:_LISTED])
    more = f"; and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    why = _BROKEN if not unusable else f"are {_UNUSABLE}" if not broken else "cannot be decoded or used"
    above = "more than 1 % is bad; " if on_bad_image == "skip" else "up to 1 % may be left out by --on-bad-image skip; "
    fix = above + "replace or remove these files"
    raise DataError(f"{len(bad)} of {counted(total)} {why}", listed + more, fix)


def _skipped(items: Sequence[Undecodable], why: str) -> str:
    return f"{counted(len(items))}: skipped, {why} (first: {items[0].name}: {items[0].reason})"
