"""Images in: decoding, stated conversions, errors, and that the fingerprint is the content's alone."""

import gzip
import hashlib
import io
import os
import shutil
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torchvision
from endless import ENDLESS, guarded
from pictures import PIXEL_LIMIT, UNDECODABLE, UNUSABLE, Fault, noise, save
from PIL import Image

from midway.gen.core.errors import DataError, UsageError
from midway.gen.data import sources
from midway.gen.data.images import ImageData, describe, load_images, to_float, to_uint8
from midway.gen.data.pixels import fingerprint
from midway.gen.data.sources import SOURCES, Arrays
from midway.gen.data.splits import DataConfig, load_splits, split
from midway.gen.files import file_set as files
from midway.gen.files.decoding import Decoded

CIFAR_ZIP = Path(__file__).parents[2] / ".." / "shared" / "data" / "cifar10-train.zip"


def zip_folder(folder: Path, target: Path, prefix: str = "", compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(target, "w", compression) as archive:
        for path in sorted(folder.rglob("*"), reverse=True):  # not in the order of names
            archive.write(path, prefix + path.relative_to(folder).as_posix())
    return target


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Two classes of RGB PNGs, 6 x 4 (width x height): cat/0, cat/1, dog/0."""
    folder = tmp_path / "animals"
    for seed, name in enumerate(("cat/0.png", "cat/1.png", "dog/0.png")):
        save(folder / name, noise(4, 6, 3, seed=seed))
    return folder


def flat(folder: Path, count: int, shape: tuple[int, ...] = (4, 4, 3)) -> Path:
    for index in range(count):
        save(folder / f"{index:03}.png", noise(*shape, seed=index))
    return folder


def only(folder: Path, channels: int | None = None, resize: int | None = None) -> tuple[torch.Tensor, tuple[str, ...]]:
    data = load_images(str(folder), channels=channels, resize=resize)
    assert len(data.images) == 1
    return data.images[:][0], data.conversions


# ---- content ----


def test_folder_content_labels_and_order(animals: Path):
    data = load_images(str(animals))
    expected = np.stack([noise(4, 6, 3, seed=seed).transpose(2, 0, 1) for seed in range(3)])
    assert torch.equal(data.images[:], torch.from_numpy(expected))
    assert data.images[:].dtype == torch.uint8 and data.images[:].is_contiguous()
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == [0, 0, 1]
    assert (data.classes, data.name, data.conversions) == (("cat", "dog"), "animals", ())


def test_flat_folder_is_one_class_in_order_of_names(tmp_path: Path):
    for name in ("b.png", "c.PNG", "a.png"):
        save(tmp_path / name, np.full((2, 2), ord(name[0]), np.uint8))
    data = load_images(str(tmp_path))
    assert data.classes == ("all",) and data.labels.tolist() == [0, 0, 0]
    assert data.images[:][:, 0, 0, 0].tolist() == [ord(letter) for letter in "abc"]


@pytest.mark.parametrize("prefix", ["", "animals/", "download/animals/"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_equals_folder(animals: Path, tmp_path: Path, prefix: str, compression: int):
    folder, zipped = (
        load_images(str(animals)),
        load_images(str(zip_folder(animals, tmp_path / "a.zip", prefix, compression))),
    )
    assert torch.equal(folder.images[:], zipped.images[:]) and torch.equal(folder.labels, zipped.labels)
    assert (zipped.classes, zipped.fingerprint, zipped.name) == (folder.classes, folder.fingerprint, "a")


def test_folders_inside_a_class_belong_to_it(animals: Path):
    save(animals / "dog" / "2024" / "x.png", noise(4, 6, 3))
    data = load_images(str(animals))
    assert data.classes == ("cat", "dog") and data.labels.tolist() == [0, 0, 1, 1]


def test_single_class_folder_keeps_its_name(tmp_path: Path):
    flat(tmp_path / "set" / "cat", 2)
    assert load_images(str(tmp_path / "set")).classes == ("cat",)


def test_junk_is_ignored(animals: Path):
    clean = load_images(str(animals)).fingerprint
    for name in (
        "__MACOSX/cat/0.png",
        "cat/._0.png",
        ".cache/x.png",
        "cat/Thumbs.db",
        "readme.txt",
        "cat/labels.csv",
    ):
        (animals / name).parent.mkdir(exist_ok=True, parents=True)
        (animals / name).write_bytes(b"junk")
    assert load_images(str(animals)).fingerprint == clean


def test_class_folders_may_be_links_but_not_loops(animals: Path, tmp_path: Path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "cat").symlink_to(animals / "cat")
    (linked / "dog").symlink_to(animals / "dog")
    (animals / "cat" / "up").symlink_to(animals)
    assert load_images(str(linked)).fingerprint == load_images(str(animals)).fingerprint
    assert len(load_images(str(animals)).images) == 3


def test_threads_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flat(tmp_path, 100)
    serial = load_images(str(tmp_path))
    monkeypatch.setattr(files, "_threads", lambda seconds_each: 8)
    monkeypatch.setattr(files, "_CHUNK", 3)
    threaded = load_images(str(tmp_path))
    assert threaded.fingerprint == serial.fingerprint
    assert torch.equal(threaded.images[:][57], torch.from_numpy(noise(4, 4, 3, seed=57)).permute(2, 0, 1))


def test_digits():
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    data = load_images("digits")
    assert data.images.shape == (1797, 1, 8, 8) and data.name == "digits"
    assert data.classes == tuple("0123456789") and data.labels.tolist() == labels.tolist()
    exact = torch.from_numpy(values).view(1797, 1, 8, 8) * 255 / 16
    assert (data.images[:].double() - exact).abs().max() <= 0.5
    assert data.images[:].unique().tolist() == [round(v * 255 / 16) for v in range(17)]
    assert load_images("digits").fingerprint == data.fingerprint


def test_cifar_zip_sample(tmp_path: Path):
    if not CIFAR_ZIP.exists():
        pytest.skip("no cifar10-train.zip in ../shared/data beside the repository")
    with zipfile.ZipFile(CIFAR_ZIP) as whole, zipfile.ZipFile(tmp_path / "some.zip", "w") as some:
        names = whole.namelist()[::500]
        for name in names:
            some.writestr(name, whole.read(name))
        first = np.asarray(Image.open(io.BytesIO(whole.read(names[0]))))
    data = load_images(str(tmp_path / "some.zip"))
    assert data.images.shape == (100, 3, 32, 32)
    assert data.classes[0] == "airplane" and data.classes[-1] == "truck"
    assert torch.bincount(data.labels).tolist() == [10] * 10
    assert torch.equal(data.images[:][0].permute(1, 2, 0), torch.from_numpy(first.copy()))
    assert data.conversions == ("100 images: lossy JPEG source",)


# ---- conversions, each stated ----


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    return image


@dataclass(frozen=True)
class Conversion:
    """An image of 2 x 1 pixels as it is saved, the values of its pixels when loaded, and how that is stated."""

    image: Image.Image
    expected: Sequence[float]
    note: str = "alpha composited on white"
    ending: str = "png"
    transparency: int | tuple[int, int, int] | None = None


CONVERSIONS = {
    "alpha 0": Conversion(Image.new("RGBA", (2, 1), (200, 0, 100, 0)), 2 * [255, 255, 255]),
    "alpha 128": Conversion(Image.new("RGBA", (2, 1), (200, 0, 100, 128)), 2 * [227.4, 127, 177.2]),
    "alpha 255": Conversion(Image.new("RGBA", (2, 1), (200, 0, 100, 255)), 2 * [200, 0, 100]),
    "grey with alpha": Conversion(Image.new("LA", (2, 1), (40, 0)), [255, 255]),
    "palette": Conversion(palette(), [10, 20, 30, 40, 50, 60], "palette expanded to RGB"),
    "palette with transparency": Conversion(palette(), [255, 255, 255, 40, 50, 60], transparency=0),
    "a transparent colour": Conversion(Image.new("RGB", (2, 1), (9, 8, 7)), 6 * [255], transparency=(9, 8, 7)),
    "one bit": Conversion(Image.fromarray(np.array([[True, False]])), [255, 0], "1-bit expanded to 8-bit grey"),
    "CMYK": Conversion(Image.new("CMYK", (2, 1), (255, 0, 0, 0)), 2 * [0, 255, 255], "CMYK converted to RGB", "tif"),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_are_right_and_stated(tmp_path: Path, name: str):
    case = CONVERSIONS[name]
    options: dict[str, Any] = {} if case.transparency is None else {"transparency": case.transparency}
    case.image.save(tmp_path / f"a.{case.ending}", **options)
    image, stated = only(tmp_path)
    assert image[:, 0].T.flatten().tolist() == pytest.approx(case.expected, abs=0.5)
    assert stated == (f"1 image: {case.note}",)


@pytest.mark.parametrize(
    ("orientation", "quarters", "note"), [(6, -1, ("1 image: EXIF rotation applied",)), (1, 0, ())]
)
def test_exif_rotation(tmp_path: Path, orientation: int, quarters: int, note: tuple[str, ...]):
    """6 is to be shown turned clockwise by 90 degrees, 1 as it is."""
    pixels, exif = noise(2, 3, 3), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image, stated = only(tmp_path)
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.rot90(pixels, quarters).copy()))
    assert stated == note


def test_grey_among_rgb_is_promoted(tmp_path: Path):
    save(tmp_path / "a.png", noise(2, 2))
    save(tmp_path / "b.png", noise(2, 2, 3))
    data = load_images(str(tmp_path))
    assert torch.equal(data.images[:][0], torch.from_numpy(noise(2, 2)).expand(3, 2, 2))
    assert torch.equal(data.images[:][1], torch.from_numpy(noise(2, 2, 3)).permute(2, 0, 1))
    assert data.conversions == ("1 image: grey promoted to RGB",)


def test_channels_forced(tmp_path: Path):
    save(tmp_path / "a.png", np.full((2, 2, 3), (100, 150, 200), np.uint8))
    image, stated = only(tmp_path, channels=1)
    assert image.unique().tolist() == [round(0.299 * 100 + 0.587 * 150 + 0.114 * 200)] and image.shape == (1, 2, 2)
    assert stated == ("1 image: RGB converted to grey (ITU-R 601 luma)",)
    digits = load_images("digits", channels=3)
    assert torch.equal(digits.images[:], load_images("digits").images[:].expand(-1, 3, -1, -1))
    assert digits.conversions == ("1797 images: grey repeated to RGB",)


def test_resize_crops_the_centre(tmp_path: Path):
    """A 4 x 12 image of three 4 x 4 squares: the middle one is what remains."""
    save(tmp_path / "a.png", np.repeat(np.array([[10] * 4 + [100] * 4 + [200] * 4], np.uint8), 4, axis=0))
    image, stated = only(tmp_path, resize=4)
    assert image.shape == (1, 4, 4) and image.unique().tolist() == [100]
    assert stated == ("1 image: resized to 4x4 (antialiased bicubic, shorter side, centre crop)",)


def test_resize_is_antialiased(tmp_path: Path):
    """A fine checkerboard of mean 127.5 must become grey; point-sampled bicubic would keep its extremes."""
    save(tmp_path / "a.png", (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    image, _ = only(tmp_path, resize=8)
    assert (image.float() - 127.5).abs().max() < 4
    unchanged, stated = only(tmp_path, resize=64)
    assert unchanged.unique().tolist() == [0, 255] and stated == ()


def test_jpeg_and_animation_are_stated(tmp_path: Path):
    save(tmp_path / "a.jpeg", np.full((8, 8, 3), 90, np.uint8))
    frames = [Image.new("L", (8, 8), level) for level in (90, 0)]
    frames[0].save(tmp_path / "b.tiff", save_all=True, append_images=frames[1:])
    data = load_images(str(tmp_path), channels=1)
    assert data.images[:].unique().tolist() == [90]
    assert {"1 image: lossy JPEG source", "1 image: first of several frames"} <= set(data.conversions)


# ---- errors ----


def assert_raises(source: Path | str, *fragments: str, on_bad_image: Literal["error", "skip"] = "error") -> DataError:
    with pytest.raises(DataError) as caught:
        load_images(str(source), on_bad_image=on_bad_image)
    for fragment in fragments:
        assert fragment in str(caught.value)
    return caught.value


@pytest.mark.parametrize("keep", [0, 300])
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "webp", "tiff"])
def test_truncated_and_empty_files_are_named(tmp_path: Path, ending: str, keep: int):
    flat(tmp_path, 2, (64, 64, 3))
    path = tmp_path / f"hurt.{ending}"
    save(path, noise(64, 64, 3))
    path.write_bytes(path.read_bytes()[:keep])
    error = assert_raises(tmp_path, f"1 of 3 images cannot be decoded\n  why: hurt.{ending} (")
    assert "0x" not in error.why


def test_damaged_member_of_a_zip(animals: Path, tmp_path: Path):
    target = zip_folder(animals, tmp_path / "a.zip", compression=zipfile.ZIP_STORED)
    content = bytearray(target.read_bytes())
    content[content.index((animals / "dog/0.png").read_bytes()) + 60] ^= 255
    target.write_bytes(content)
    assert_raises(target, "dog/0.png", "CRC")


def test_skip_leaves_out_up_to_one_percent(tmp_path: Path):
    flat(tmp_path / "a", 99)
    (tmp_path / "a" / "050x.png").write_bytes(b"")
    data = load_images(str(tmp_path), on_bad_image="skip")
    assert len(data.images) == len(data.labels) == 99
    assert torch.equal(data.images[:][51], torch.from_numpy(noise(4, 4, 3, seed=51)).permute(2, 0, 1))
    assert data.conversions == ("1 image: skipped, cannot be decoded (first: a/050x.png: empty or not an image)",)
    (tmp_path / "a" / "051x.png").write_bytes(b"not an image")
    assert_raises(tmp_path, "2 of 101 images", "a/050x.png", "a/051x.png", "1 %", on_bad_image="skip")


def test_skip_keeps_labels_with_their_images(tmp_path: Path):
    flat(tmp_path / "a", 60)
    flat(tmp_path / "b", 60)
    (tmp_path / "a" / "000.png").write_bytes(b"")
    data = load_images(str(tmp_path), on_bad_image="skip")
    assert data.labels.tolist() == [0] * 59 + [1] * 60


def test_many_bad_files_are_listed_in_part(tmp_path: Path):
    for index in range(8):
        (tmp_path / f"{index}.png").write_bytes(b"")
    assert_raises(tmp_path, "8 of 8 images", "4.png", "and 3 more", "--on-bad-image skip")


def test_mixed_sizes_name_two_files(animals: Path):
    save(animals / "dog" / "1.png", noise(5, 9, 3))
    assert_raises(animals, "cat/0.png is 6x4", "dog/1.png is 9x5", "--resize N", "smallest side here is 4")
    assert load_images(str(animals), resize=4).images.shape == (4, 3, 4, 4)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("fault", UNDECODABLE + UNUSABLE, ids=lambda fault: fault.name)
def test_bad_files_raise_with_their_name_and_reason(tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXEL_LIMIT)
    flat(tmp_path, 2)
    fault.make(tmp_path / fault.name)
    assert_raises(tmp_path, fault.name, fault.word, on_bad_image="skip")


def test_sources_without_images(tmp_path: Path):
    assert_raises(tmp_path, f"no images in {tmp_path}", "it is empty")
    (tmp_path / "a.npz").write_bytes(b"x")
    assert_raises(tmp_path, "1 other files (.npz)", ".png")
    assert_raises(zip_folder(tmp_path, tmp_path.parent / "none.zip"), "no images in", ".npz")


def test_missing_and_broken_paths(animals: Path, tmp_path: Path):
    assert_raises(tmp_path / "absent", "does not exist")
    assert_raises("absent.zip", "absent.zip does not exist")
    assert_raises(animals / "cat" / "0.png", "cannot be read as a zip of images")
    target = zip_folder(animals, tmp_path / "cut.zip")
    target.write_bytes(target.read_bytes()[:-30])
    assert_raises(target, "cut.zip cannot be read as a zip", "download it again")


def test_a_folder_that_cannot_be_listed(animals: Path, monkeypatch: pytest.MonkeyPatch):
    scan = os.scandir

    def forbidding(path: str):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    assert_raises(animals, "dog cannot be listed", "permissions")


def test_loose_images_beside_class_folders(animals: Path):
    save(animals / "x.png", noise(4, 6, 3))
    assert_raises(animals, "1 images lie beside the class folders, for example x.png", "cat, dog")


def test_split_folders_are_not_classes(tmp_path: Path):
    for name in ("Train/cat", "Train/dog", "test/cat"):
        flat(tmp_path / name, 1)
    assert_raises(tmp_path, "Train, test look like splits")
    assert load_images(str(tmp_path / "Train")).classes == ("cat", "dog")


@pytest.mark.parametrize("name", ["cifar", "CIFAR10", "cifar-10"])
def test_unknown_name_suggests_the_nearest(name: str):
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        load_images(name)


@pytest.mark.parametrize("options", [{"channels": 2}, {"resize": 0}, {"on_bad_image": "ignore"}])
def test_bad_options(options: dict):
    with pytest.raises(UsageError, match=next(iter(options))):
        load_images("digits", **options)


def test_an_empty_name_is_not_the_working_folder(animals: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(animals)
    assert load_images("cat").classes == ("all",)
    with pytest.raises(UsageError):
        load_images("")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ConnectionError("the test has no network")

    monkeypatch.setattr("urllib.request.urlopen", fail)


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"digits", "mnist5k"}))
def test_absent_named_source(name: str, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIDWAY_DATA", str(tmp_path))
    error = assert_raises(name, f"{name} is not on this machine")
    assert "pass --download" in error.fix and str(tmp_path) in error.fix and ".gz" in error.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"digits", "mnist5k"}))
def test_failed_download(name: str, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIDWAY_DATA", str(tmp_path))
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        load_images(name, download=True)
    assert "try again" in caught.value.fix and str(tmp_path) in caught.value.fix
    assert "no network" in caught.value.why


def _raw(kind: int, shape: tuple[int, ...], values: bytes) -> bytes:
    """An array as MNIST has it."""
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape) + values


@pytest.fixture
def mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files of an MNIST of four images by their addresses; the server sends `sent`."""
    monkeypatch.setenv("MIDWAY_DATA", str(tmp_path))
    kind, sent = torchvision.datasets.MNIST, dict[str, bytes]()
    arrays = [_raw(8, (4, 28, 28), bytes(4 * 28 * 28)), _raw(8, (4,), bytes([3, 1, 4, 9]))] * 2
    for (name, _), array in zip(kind.resources, arrays, strict=True):
        sent[f"https://first/{name}"] = gzip.compress(array, mtime=0)
    published = [(url.split("/")[-1], hashlib.md5(data).hexdigest()) for url, data in sent.items()]
    monkeypatch.setattr(kind, "resources", published)
    monkeypatch.setattr(kind, "mirrors", ["https://first/", "https://second/"])

    def answer(request: Any, timeout: float = 0) -> io.BytesIO:
        assert timeout, "a server that stalls would be waited for"
        return io.BytesIO(sent[request.full_url])

    monkeypatch.setattr("urllib.request.urlopen", answer)
    return sent


def test_a_named_source_is_fetched_once(mnist: dict[str, bytes], tmp_path: Path):
    with pytest.raises(DataError, match="not on this machine"):
        load_images("mnist")
    data = load_images("mnist", download=True)
    assert data.images.shape == (4, 1, 28, 28) and data.labels.tolist() == [3, 1, 4, 9]
    mnist.clear()
    assert load_images("mnist", download=True).fingerprint == load_images("mnist").fingerprint == data.fingerprint


@pytest.mark.parametrize("fault", ["endless", "another file", "cut"])
def test_a_download_that_is_not_the_published_file_leaves_nothing(
    mnist: dict[str, bytes], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From the first address; the second is tried, and has it or not."""
    monkeypatch.setattr(sources, "ARCHIVE_LIMIT", 1 << 20)
    url, data = next(iter(mnist.items()))
    mnist[url] = {"endless": bytes(2 << 20), "another file": b"x", "cut": data[:-1]}[fault]
    mnist[url.replace("first", "second")] = mnist[url]
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        load_images("mnist", download=True)
    assert ("more than the limit" if fault == "endless" else "another file than the published one") in caught.value.why
    assert not list((tmp_path / "MNIST" / "raw").iterdir())
    mnist[url.replace("first", "second")] = data
    assert len(load_images("mnist", download=True).images) == 4


@pytest.mark.parametrize("kind", [kind for kind in ENDLESS if "directory" not in kind])
@pytest.mark.parametrize("place", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
@pytest.mark.parametrize("download", [False, True])
def test_files_of_a_named_source_are_regular(
    mnist: dict[str, bytes], tmp_path: Path, kind: str, place: str, download: bool
):
    make, words = ENDLESS[kind]
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    make(tmp_path / "MNIST" / "raw" / place)
    with pytest.raises(DataError) as caught:
        guarded(lambda: load_images("mnist", download=download))
    assert words in caught.value.why and place in caught.value.what


def test_files_of_a_named_source_have_a_limit_and_labels_of_its_classes(mnist: dict[str, bytes], tmp_path: Path):
    load_images("mnist", download=True)
    raw = tmp_path / "MNIST" / "raw"
    (raw / "train-labels-idx1-ubyte").write_bytes(_raw(8, (4,), bytes([3, 1, 4, 10])))
    assert_raises("mnist", "its labels are not those of its images")
    os.truncate(raw / "train-labels-idx1-ubyte", 1 << 42)
    assert_raises("mnist", "train-labels-idx1-ubyte is no file of mnist", f"{1 << 42:,} bytes")


def test_named_sources_read_what_torchvision_holds(monkeypatch: pytest.MonkeyPatch):
    colour, grey = noise(5, 4, 4, 3), noise(5, 4, 4)

    class Colour:
        data, targets, classes = colour, [1, 0, 1, 0, 0], ["a", "b"]

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert train and not download

    class Grey(Colour):
        data, targets = torch.from_numpy(grey), torch.tensor([1, 0, 1, 0, 0])

    for name, kind in (("CIFAR10", Colour), ("MNIST", Grey), ("FashionMNIST", Grey)):
        monkeypatch.setattr(f"torchvision.datasets.{name}", kind)
    loaded = load_images("cifar10")
    assert torch.equal(loaded.images[:], torch.from_numpy(colour).permute(0, 3, 1, 2))
    assert (loaded.labels.tolist(), loaded.classes, loaded.name) == ([1, 0, 1, 0, 0], ("a", "b"), "cifar10-train")
    for name in ("mnist", "fashion_mnist"):
        loaded = load_images(name)
        assert torch.equal(loaded.images[:][:, 0], torch.from_numpy(grey)) and loaded.labels.tolist() == [1, 0, 1, 0, 0]
        assert loaded.name == f"{name}-train"


# ---- fingerprint ----


def test_fingerprint_ignores_the_path(animals: Path, tmp_path: Path):
    before = load_images(str(animals)).fingerprint
    moved = tmp_path / "elsewhere" / "other"
    for name in ("dog/0.png", "cat/1.png", "cat/0.png"):  # written in another order
        (moved / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(animals / name, moved / name)
    assert load_images(str(moved)).fingerprint == before and len(before) == 64


def test_fingerprint_sees_one_pixel_one_label_one_name_and_the_shape():
    images, labels = torch.arange(16, dtype=torch.uint8).view(2, 2, 2, 2), torch.tensor([0, 1])
    pixel = images.clone()
    pixel[1, 1, 1, 1] += 1
    variants = [
        (images, labels, ("a", "b")),
        (pixel, labels, ("a", "b")),
        (images, torch.tensor([0, 0]), ("a", "b")),
        (images, labels, ("a", "c")),
        (images, labels, ("a", "b", "c")),
        (images.view(2, 1, 4, 2), labels, ("a", "b")),
        (images.flip(0), labels, ("a", "b")),
    ]
    assert len({fingerprint(*variant) for variant in variants}) == len(variants)
    strided = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert fingerprint(strided, labels, ("a", "b")) == fingerprint(*variants[0])


# ---- split ----


def numbered(counts: list[int]) -> ImageData:
    """One 1 x 1 x 4 image per item, its index in its bytes; classes interleaved."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    index = torch.arange(len(labels), dtype=torch.int32).view(torch.uint8).view(-1, 1, 1, 4)
    return ImageData(index, labels, tuple(f"c{i}" for i in range(len(counts))), "set", "0" * 64)


def indices(data: ImageData) -> list[int]:
    return data.images[:].contiguous().view(torch.int32).flatten().tolist()


def test_split_is_a_stratified_partition():
    data = numbered([100, 55, 7])
    train, held_out = split(data, 0.2)
    assert sorted(indices(train) + indices(held_out)) == list(range(162))
    assert indices(train) == sorted(indices(train)) and indices(held_out) == sorted(indices(held_out))
    assert torch.bincount(held_out.labels).tolist() == [20, 11, 1]
    for part in (train, held_out):
        assert part.labels.tolist() == data.labels[indices(part)].tolist()
    assert (train.name, held_out.name) == ("set-train", "set-heldout")
    assert len({data.fingerprint, train.fingerprint, held_out.fingerprint}) == 3


def test_split_depends_on_the_seed_alone():
    data = numbered([40, 40])
    state = torch.get_rng_state()
    first = [indices(part) for part in split(data, seed=3)]
    torch.manual_seed(99)
    assert [indices(part) for part in split(data, seed=3)] == first
    assert indices(split(data, seed=4)[1]) != first[1]
    torch.set_rng_state(state)


def test_split_of_many_small_classes_still_has_its_share():
    train, held_out = split(numbered([2] * 50), 0.2)
    assert len(held_out.labels) == 20 and torch.bincount(held_out.labels).max() == 1
    assert len(train.labels) == 80


def test_split_of_digits_by_seed_zero():
    train, held_out = split(load_images("digits"))
    assert (len(train.images), len(held_out.images)) == (1438, 359)
    assert (train.name, held_out.name) == ("digits-train", "digits-heldout")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_outside_the_unit_interval_raises(share: float):
    with pytest.raises(UsageError, match="held_out"):
        split(numbered([5]), share)


@pytest.mark.parametrize(("count", "share"), [(1, 0.5), (2, 0.1), (2, 0.9)])
def test_an_empty_side_raises(count: int, share: float):
    with pytest.raises(DataError, match="empty"):
        split(numbered([count]), share)


# ---- report and conversions ----


def test_describe(animals: Path):
    save(animals / "cat" / "0.png", noise(4, 6))
    report = describe(load_images(str(animals)))
    for fragment in ("animals: 3 images, 6x4, RGB (3 channels)", "2: cat (2), dog (1)", "1 image: grey promoted"):
        assert fragment in report
    assert load_images(str(animals)).fingerprint[:12] in report
    assert "88 more; 1 to 2 images each" in describe(numbered([2] + [1] * 99))


def test_all_256_values_round_trip():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = to_float(values)
    assert floats.dtype == torch.float32 and floats.min() == -1 and floats.max() == 1
    assert (floats.double() - (values.double() / 127.5 - 1)).abs().max() < 1e-7
    assert torch.equal(to_uint8(floats), values)
    assert torch.equal(to_uint8(floats.double()), values)


def test_to_uint8_rounds_to_nearest_and_clamps():
    levels = torch.tensor([-7.0, -1.0, -1 + 0.6 / 127.5, -1 + 1.4 / 127.5, 1.0, 1.5])
    assert to_uint8(levels).tolist() == [0, 0, 1, 1, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_to_uint8_raises_for_values_that_are_not_finite(value: float):
    with pytest.raises(ValueError, match="1 of 3 values"):
        to_uint8(torch.tensor([0.0, value, 1.0]))


def test_conversions_raise_for_the_other_type():
    with pytest.raises(ValueError, match="uint8"):
        to_float(torch.zeros(2))
    with pytest.raises(ValueError, match="float"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))


# ---- memory ----


def kilobytes(key: str) -> int:
    """A line of /proc/self/status, such as VmRSS, the memory in use, and VmHWM, the most there was."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux")
@pytest.mark.parametrize("kind", ["named", "files"])
def test_splitting_holds_the_images_twice_and_not_three_times(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source beside the tensor of all images, then that tensor beside those of both sides."""
    count, side = (5000, 64) if kind == "named" else (1200, 256)

    def source(root: Path, download: bool) -> Arrays:
        return Arrays(np.full((count, side, side, 3), 7, np.uint8), [i % 2 for i in range(count)], ("a", "b"), "large")

    def decoded(name: str, *_: object) -> Decoded:
        return Decoded(name, np.full((side, side, 3), 7, np.uint8))

    monkeypatch.setitem(SOURCES, "large", source)
    for number in range(count if kind == "files" else 0):
        (tmp_path / f"{number}.png").touch()
    config = DataConfig("large" if kind == "named" else str(tmp_path))
    load_splits(DataConfig("digits"))  # imports what a source needs
    monkeypatch.setattr(files, "decode", decoded)
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    splits = load_splits(config)
    assert len(splits.train.images) + len(splits.held_out.images) == count
    assert (kilobytes("VmHWM") - before) * 1024 <= 2.1 * count * side * side * 3
