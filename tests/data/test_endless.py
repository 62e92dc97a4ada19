"""Images that never end, or declare more than anything honest: an error or a bad file, and neither time nor memory is spent."""

import io
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deep_images import png_chunk, tiff
from endless import ENDLESS, guarded
from numpy.lib import format as npy
from pictures import noise, save
from PIL import GifImagePlugin, Image, TiffImagePlugin

from midway.gen.core.errors import DataError
from midway.gen.data import external
from midway.gen.data.check import check
from midway.gen.data.external import NPZ_LIMIT, ReadingOptions, read_external, read_npz
from midway.gen.data.images import load_images
from midway.gen.data.splits import DataConfig
from midway.gen.files.decoding import IMAGE_LIMIT, PIXEL_LIMIT, Decoded, Unusable, decode

FILES = {kind: made for kind, made in ENDLESS.items() if "directory" not in kind}
READERS: dict[str, Callable[[Path], Any]] = {
    "training": lambda path: load_images(str(path)),
    "check": lambda path: check(DataConfig(data=str(path))),
    "external": read_external,
}
SKIPPING: dict[str, Callable[[Path], Any]] = {
    "training": lambda path: load_images(str(path), on_bad_image="skip").conversions,
    "check": lambda path: [item.reason for item in check(DataConfig(str(path), on_bad_image="skip")).bad],
    "external": lambda path: read_external(path, ReadingOptions(on_bad_image="skip")).notes,
}


def folder(path: Path, count: int) -> Path:
    for index in range(count):
        save(path / f"{index:03}.png", noise(4, 6, 3, seed=index))
    return path


# ---- in a folder ----


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("reader", SKIPPING)
def test_among_images_it_is_a_bad_file(kind: str, reader: str, tmp_path: Path) -> None:
    make, words = FILES[kind]
    make(folder(tmp_path, 100) / "050x.png")
    found = guarded(lambda: SKIPPING[reader](tmp_path))
    assert sum(words in line for line in found) == 1
    if reader == "check":
        (problem,) = guarded(lambda: READERS[reader](tmp_path)).problems
        assert (
            problem.what == "1 of 101 images cannot be decoded" and f"050x.png (OSError: it is {words}" in problem.why
        )
    else:
        with pytest.raises(DataError, match="1 of 101 images cannot be decoded") as caught:
            guarded(lambda: READERS[reader](tmp_path))
        assert f"050x.png (OSError: it is {words}" in caught.value.why


def test_a_folder_may_be_named_like_an_image(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        folder(tmp_path / name, 2)
    data = load_images(str(tmp_path))
    assert len(data.images) == 4 and data.classes == ("a.png", "b.png")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("reader", READERS)
def test_a_source_is_a_folder_or_a_file(kind: str, reader: str, tmp_path: Path) -> None:
    make, words = FILES[kind]
    for name in ("a.zip", "a.npz", "a"):
        make(tmp_path / name)
        with pytest.raises(DataError, match=words) as caught:
            guarded(lambda name=name: READERS[reader](tmp_path / name))
        assert str(tmp_path / name) in caught.value.what


def test_an_image_file_of_terabytes(tmp_path: Path) -> None:
    folder(tmp_path, 1)
    os.truncate(save_empty(tmp_path / "a.png"), 1 << 42)
    with pytest.raises(DataError, match=f"{1 << 42:,} bytes, more than the limit of {IMAGE_LIMIT:,}"):
        load_images(str(tmp_path))


def save_empty(path: Path) -> Path:
    path.touch()
    return path


# ---- in a zip ----


def zipped(path: Path, content: bytes, declared: int | None = None, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Two good images, and b.png with this content, which declares another size."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for index in range(2):
            buffer = io.BytesIO()
            Image.fromarray(noise(4, 6, 3, seed=index)).save(buffer, "PNG")
            archive.writestr(f"{index}.png", buffer.getvalue())
        archive.writestr("b.png", content)
    if declared is not None:
        data = path.read_bytes()
        place = data.rindex(b"PK\1\2") + 24
        path.write_bytes(data[:place] + struct.pack("<I", declared) + data[place + 4 :])
    return path


def peak(work: Callable[[], object]) -> int:
    """Bytes that Python and zlib had at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(source: Path, *words: str) -> int:
    """Memory that the error took."""

    def read() -> None:
        with pytest.raises(DataError) as caught:
            load_images(str(source))
        assert all(word in str(caught.value) for word in words), str(caught.value)

    return peak(lambda: guarded(read))


def test_a_member_that_declares_too_much_is_not_read(tmp_path: Path) -> None:
    source = zipped(tmp_path / "a.zip", bytes(64 << 20), declared=0xFFFFFFFE)
    declared = f"it declares {0xFFFFFFFE:,} bytes, more than the limit of {IMAGE_LIMIT:,}"
    assert refused(source, "1 of 3 images cannot be decoded", "b.png", declared) < 8 << 20


def test_a_member_that_holds_more_than_it_declares_is_cut(tmp_path: Path) -> None:
    source = zipped(tmp_path / "a.zip", bytes(64 << 20), declared=100)
    assert refused(source, "b.png", "Bad CRC-32") < 8 << 20


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_expand_without_bound_are_not_read(method: int, tmp_path: Path) -> None:
    source = zipped(tmp_path / "a.zip", bytes(64 << 20), declared=100, method=method)
    assert refused(source, "neither stored nor deflated") < 8 << 20


def test_members_that_share_bytes_are_not_read(tmp_path: Path) -> None:
    """A zip of some megabytes can hold petabytes so, each member within the limit."""
    source = zipped(tmp_path / "a.zip", bytes(1 << 20))
    data = source.read_bytes()
    place = data.index(b"PK\1\2") + 20
    source.write_bytes(data[:place] + struct.pack("<I", len(data)) + data[place + 4 :])
    refused(source, "a.zip cannot be read", "zip bomb", "pack the images again")


def test_members_beyond_four_gigabytes_of_zip_are_read(tmp_path: Path) -> None:
    """The form of large archives, ZIP64."""
    buffer = io.BytesIO()
    Image.fromarray(noise(4, 6, 3)).save(buffer, "PNG")
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w") as archive,
        archive.open("a.png", "w", force_zip64=True) as file,
    ):
        file.write(buffer.getvalue())
    assert (load_images(str(tmp_path / "a.zip")).images[:].permute(0, 2, 3, 1).numpy()[0] == noise(4, 6, 3)).all()


# ---- pixels ----


def large(kind: str) -> bytes:
    """A small file whose header declares 30,000 x 30,000 pixels or more."""
    if kind == "PNG":
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"x") + png_chunk(b"IEND", b"")
    if kind == "TIFF":
        return tiff(noise(4, 6, 3), 8, tags={256: (30_000,), 257: (30_000,)})
    if kind == "PPM":
        return b"P6\n30000 30000\n255\n" + bytes(99)
    buffer = io.BytesIO()
    Image.fromarray(noise(4, 6, 3)).save(buffer, kind)
    data = buffer.getvalue()
    place, width, height = {
        "JPEG": (data.find(b"\xff\xc0") + 5, ">H", ">H"),
        "GIF": (6, "<H", "<H"),
        "BMP": (18, "<i", "<i"),
    }[kind]
    size = struct.pack(height, 30_000) + struct.pack(width, 30_000)
    return data[:place] + size + data[place + len(size) :]


@pytest.mark.parametrize("moved", [False, True], ids=["Pillow's limit", "no limit of Pillow"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG", "GIF", "BMP"])
def test_pixels_are_counted_before_they_are_decoded(kind: str, moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if moved:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some libraries leave it
    data, found = large(kind), list[Any]()
    assert peak(lambda: found.append(decode("a", lambda name: data, None, None))) < 8 << 20
    assert isinstance(found[0], Unusable)
    assert str(PIXEL_LIMIT) in found[0].reason.replace(",", "") and "900000000" in found[0].reason.replace(",", "")


FRAMES = {"TIFF": TiffImagePlugin.TiffImageFile, "GIF": GifImagePlugin.GifImageFile}


@pytest.mark.parametrize("kind", FRAMES)
def test_frames_are_not_counted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million of them fit into a few megabytes, and Pillow's time for those of a TIFF grows with their square."""
    seek, places = FRAMES[kind]._seek, list[int]()  # pyright: ignore[reportPrivateUsage]

    def noted(self: Any, frame: int, *options: Any) -> None:
        places.append(frame)
        seek(self, frame, *options)

    monkeypatch.setattr(FRAMES[kind], "_seek", noted)
    buffer, frames = io.BytesIO(), [Image.new("L", (2, 2), level) for level in range(100)]
    frames[7].save(buffer, kind, save_all=True, append_images=frames)
    found = decode("a", lambda name: buffer.getvalue(), 1, None)
    assert isinstance(found, Decoded) and found.pixels.tolist() == [[7, 7], [7, 7]]
    assert "first of several frames" in found.notes and max(places) <= 1


# ---- NPZ ----


def npz(path: Path, header: bytes, body: bytes = b"", declared: int | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header + body)
    if declared is not None:
        data = path.read_bytes()
        place = data.rindex(b"PK\1\2") + 24
        path.write_bytes(data[:place] + struct.pack("<I", declared) + data[place + 4 :])
    return path


def npy_header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


LONG = b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFFFFF0) + bytes(32 << 20)
"""A header that declares four gigabytes of itself."""
NPZ: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a trillion": (
        lambda path: npz(path, npy_header((10**6, 1000, 1000, 1))),
        (f"declares {10**12:,} bytes", f"limit of {NPZ_LIMIT:,}"),
    ),
    "more than it holds": (
        lambda path: npz(path, npy_header((1000, 64, 64, 3)), bytes(99)),
        (f"declares {1000 * 64 * 64 * 3:,} bytes and holds 99",),
    ),
    "less than it holds": (lambda path: npz(path, npy_header((1, 2, 2, 3)), bytes(32 << 20)), ("declares 12 bytes",)),
    "a trillion floats": (lambda path: npz(path, npy_header((10**9, 10, 10, 3), "<f4")), ("float32", "uint8")),
    "a long header": (lambda path: npz(path, LONG), ("no images that can be read",)),
    "a cut header": (lambda path: npz(path, npy_header((1, 2, 2, 3)).replace(b"(", b" ")), ("no images that",)),
    "an open header": (
        lambda path: npz(path, b"\x93NUMPY\1\0\x40\0" + b"{'descr': (((".ljust(64)),
        ("no images that",),
    ),
    "a member that lies": (
        lambda path: npz(path, npy_header((1, 2, 2, 3)), bytes(32 << 20), declared=140),
        ("Bad CRC-32",),
    ),
    "an array": (lambda path: path.write_bytes(npy_header((10**6, 1000, 1000, 1))), ("not a zip",)),
    "a folder": (Path.mkdir, ("no images",)),
}


@pytest.mark.parametrize("name", NPZ)
def test_declared_sizes_of_an_npz_are_compared_before_it_is_read(name: str, tmp_path: Path) -> None:
    make, words = NPZ[name]
    make(tmp_path / "a.npz")

    def read() -> None:
        with pytest.raises(DataError) as caught:
            read_npz(tmp_path / "a.npz") if name != "a folder" else read_external(tmp_path / "a.npz")
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert str(tmp_path / "a.npz") in caught.value.what

    assert peak(lambda: guarded(read)) < 8 << 20


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_honest_arrays_are_read(write: Callable[..., None], version: tuple[int, int], tmp_path: Path) -> None:
    images = noise(5, 4, 6, 3)
    write(tmp_path / "a.npz", images, labels=np.arange(5))
    np.testing.assert_array_equal(read_npz(tmp_path / "a.npz"), images)
    write(tmp_path / "f.npz", np.asfortranarray(images))
    np.testing.assert_array_equal(read_npz(tmp_path / "f.npz"), images)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        npy.write_array(file, images, version=version)
    np.testing.assert_array_equal(read_npz(tmp_path / "b.npz"), images)
    assert 50_000 * 256 * 256 * 3 < 50_000 * 1024 * 1024 * 3 < external.NPZ_LIMIT
