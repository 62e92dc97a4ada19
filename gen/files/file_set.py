"""Image files of a folder or a zip, read in place, what lies beside them, and work on all of them by several threads."""

import os
import threading
import time
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from midway.gen.core.errors import DataError, raising
from midway.gen.core.files import ZIP_DAMAGE, read_bytes, read_member, regular_file
from midway.gen.files.decoding import IMAGE_LIMIT, Decoded, Undecodable, Unusable, counted, decode
from midway.gen.files.listing import Listing, list_folder, list_zip
from midway.gen.files.names import EXTENSIONS, ending, is_image, is_library, junk
from midway.gen.files.parquet import open_parquet
from midway.gen.files.shards import TAR, shard_paths
from midway.gen.files.tars import index_tars, reading_members, sidecar_labels
from midway.gen.progress.bar import Progress

Name = TypeVar("Name")
Result = TypeVar("Result")

_CHUNK = 16  # files a thread takes at once: one future per file would cost as much as a small JPEG
_WORTH_A_THREAD = 5e-4  # seconds an image; about a 128x128 PNG
_LISTED = 5  # files named in an error
_BROKEN, _UNUSABLE = "cannot be decoded", "intact but cannot be used"


@dataclass(frozen=True)
class FileSet:
    """The image files of one folder or zip, and what lies beside them."""

    names: tuple[str, ...]  # sorted, relative to the source, "/" between parts
    read: Callable[[str], bytes]  # of `names` and `others`; safe to call from several threads
    size: Callable[[str], int]  # bytes of the file
    others: tuple[str, ...] = ()  # files whose names do not end like an image's
    junk: Mapping[str, int] = field(
        default_factory=dict
    )  # left-overs of systems and programs, counted by what marks them
    repeated: int = 0  # names of files and folders that are read by another name
    folders: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()  # links to one folder, of which the first is read
    labels: Mapping[str, str] | None = None  # of all `names`, where the source itself has them
    labels_from: str = ""  # where those are
    classes: tuple[str, ...] | None = None  # the names of the classes that such labels number


# ---- which files ----


@contextmanager
def open_files(path: Path) -> Iterator[FileSet]:
    """The images of a folder or zip, to be read while the context is open. DataError: missing, broken or without images."""
    if is_library(path.name):
        why = "it holds previews and thumbnails beside the photos, in folders that are no classes"
        raise DataError(f"{path} is a library of photo software", why, "export its photos to a folder, and give that")
    if shards := shard_paths(path):
        with _open_shards(path, shards) as files:
            yield files
    elif path.is_dir():
        listing = list_folder(path)
        yield _file_set(path, listing, *_reader(path, listing))
    else:
        with _open_zip(path) as archive:
            listing, members = list_zip(archive, path)
            yield _file_set(path, listing, _locked_read(archive, members), lambda name: members[name].file_size)


@contextmanager
def _open_shards(path: Path, shards: Sequence[Path]) -> Iterator[FileSet]:
    """The images in tar or parquet files."""
    if shards[0].suffix == TAR:
        listing, members = index_tars(shards)
        with reading_members(members) as read:
            labels, kind = sidecar_labels(listing, read)
            files = _file_set(path, listing, read, members.size)
            others = tuple(name for name in files.others if labels is None or not name.endswith(kind))
            yield replace(files, others=others, labels=labels, labels_from=f"the {kind} files")
    else:
        with open_parquet(shards) as rows:
            names, values = tuple(rows.names()), rows.labels()
            labels = None if values is None else dict(zip(names, values, strict=True))
            left = f"; {', '.join(rows.other_labels)} would be others" if rows.other_labels else ""
            if not names:
                raise DataError(f"no images in {path}", "it has no rows", "give files with rows")
            given = (labels, f"the column {rows.label}{left}", rows.classes)
            yield FileSet(names, rows.read, rows.size, (), {}, 0, (), (), *given)


def _reader(path: Path, listing: Listing) -> tuple[Callable[[str], bytes], Callable[[str], int]]:
    """How the files of a folder are read, and their sizes."""

    def place(name: str) -> Path:
        return path / listing.raw.get(name, name)

    return lambda name: read_bytes(place(name), IMAGE_LIMIT), lambda name: place(name).stat().st_size


def _open_zip(path: Path) -> zipfile.ZipFile:
    fix = "give a folder of images or a complete .zip; if this was downloaded, download it again"
    with raising(DataError, f"{path} cannot be read as a zip of images", fix, *ZIP_DAMAGE):
        return zipfile.ZipFile(regular_file(path))


def _locked_read(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> Callable[[str], bytes]:
    lock = threading.Lock()  # ZipFile counts its open members without one

    def read(name: str) -> bytes:
        with lock:
            return read_member(archive, members[name], IMAGE_LIMIT)

    return read


def _file_set(path: Path, listing: Listing, read: Callable[[str], bytes], size: Callable[[str], int]) -> FileSet:
    marks = {name: mark for name in listing.files if (mark := junk(name)) is not None}
    names = tuple(name for name in listing.files if is_image(name) and name not in marks)
    others = tuple(name for name in listing.files if not is_image(name) and name not in marks)
    left = Counter(marks.values())
    if not names:
        kinds = ", ".join(sorted({*map(ending, others), *left})[:_LISTED])
        why = f"it holds {len(listing.files)} other files ({kinds})" if listing.files else "it is empty"
        raise DataError(f"no images in {path}", why, f"put image files there ({' '.join(EXTENSIONS)})")
    folders = tuple(name for name in listing.folders if junk(name) is None)
    return FileSet(names, read, size, others, left, len(listing.repeated), folders, tuple(listing.aliases))


# ---- all files ----


def decode_all(files: FileSet, channels: int | None, resize: int | None) -> Iterator[Decoded | Undecodable]:
    """Every file, decoded, in the order of `files.names`."""
    return map_files(files.names, lambda name: decode(name, files.read, channels, resize))


def map_files(
    names: Sequence[Name], work: Callable[[Name], Result], workers: int | None = None
) -> Generator[Result, None, None]:
    """`work` of every name, in their order; by `workers` threads, or where that is faster by as many as there are cores."""
    Image.init()  # plugins are registered once here rather than by racing threads
    if not names:
        return

    def work_chunk(names: Sequence[Name]) -> list[Result]:
        return [work(name) for name in names]

    start = time.perf_counter()
    first = work_chunk(names[:_CHUNK])
    threads = workers or _threads((time.perf_counter() - start) / len(first))
    pool, ahead, progress = ThreadPoolExecutor(threads), deque(), Progress("reading", len(names), "images")
    try:
        with progress:
            yield from first
            progress.advance(len(first))
            for at in range(_CHUNK, len(names), _CHUNK):
                ahead.append(pool.submit(work_chunk, names[at : at + _CHUNK]))
                if len(ahead) > threads:  # decoded images must not pile up before they are taken
                    yield from ahead.popleft().result()
                    progress.advance(_CHUNK)
            while ahead:
                yield from ahead.popleft().result()
                progress.advance(min(_CHUNK, len(names) - progress.done))
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
