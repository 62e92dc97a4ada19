"""Samples of other than 8 bits: one rule for all formats, every level checked, and what cannot be converted is named."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from deep_images import Samples, every_level, png, png_chunk, pnm, tiff
from numpy.typing import NDArray
from pictures import noise, save
from PIL import Image, TiffImagePlugin

from midway.gen.core.errors import DataError
from midway.gen.data.check import check
from midway.gen.data.external import read_external
from midway.gen.data.images import load_images
from midway.gen.data.splits import DataConfig
from midway.gen.files.decoding import Decoded, Undecodable, Unusable, decode

GREY, GREY_ALPHA, RGB, RGBA = (every_level(bands) for bands in (1, 2, 3, 4))
SIXTEEN = "16-bit rounded to 8-bit: round(x / 257)"
ON_WHITE = "alpha composited on white"


def rounded(samples: Samples, white: int = 65535) -> NDArray[np.uint8]:
    return np.rint(samples * 255.0 / white).astype(np.uint8)


def on_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey or RGB with alpha of 8 bits as Pillow composites it."""
    mode, plain = ("LA", "L") if pixels.shape[2] == 2 else ("RGBA", "RGB")
    image = Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes()).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(plain))


def read(data: bytes, channels: int | None = None) -> Decoded:
    found = decode("x", lambda name: data, channels, None)
    assert isinstance(found, Decoded), found
    return found


def refused(data: bytes, channels: int | None = None) -> str:
    found = decode("x", lambda name: data, channels, None)
    assert isinstance(found, Unusable), found
    return found.reason


# ---- colour ----

Encoder = Callable[[Samples], bytes]
TIFFS: dict[str, Encoder] = {
    f"TIFF {order}{' deflated' * deflated}": lambda samples, order=order, deflated=deflated: tiff(
        samples, order=order, deflated=deflated
    )
    for order in "<>"
    for deflated in (False, True)
}
PNGS: dict[str, Encoder] = {"PNG": png, "interlaced PNG": lambda samples: png(samples, interlaced=True)}
PNMS: dict[str, Encoder] = {
    "PNM": lambda samples: pnm(samples, 65535),
    "plain PNM": lambda samples: pnm(samples, 65535, plain=True),
}


@pytest.mark.parametrize("encoder", {**PNGS, **TIFFS, **PNMS})
def test_rgb_of_16_bits_is_rounded_at_every_level(encoder: str) -> None:
    found = read({**PNGS, **TIFFS, **PNMS}[encoder](RGB))
    np.testing.assert_array_equal(found.pixels, rounded(RGB))
    assert (found.pixels != RGB >> 8).any(), "the high byte, which Pillow gives, is another number"
    assert found.notes == (SIXTEEN,)


@pytest.mark.parametrize("encoder", {**PNGS, **TIFFS})
def test_alpha_of_16_bits_is_rounded_and_composited(encoder: str) -> None:
    found = read({**PNGS, **TIFFS}[encoder](RGBA))
    np.testing.assert_array_equal(found.pixels, on_white(rounded(RGBA)))
    assert found.notes == (SIXTEEN, ON_WHITE)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflated", [False, True])
def test_other_bands_of_tiff(order: str, deflated: bool) -> None:
    """A fourth band without meaning, colours multiplied by alpha, and CMYK."""
    unused = read(tiff(RGBA, order=order, deflated=deflated, tags={338: (0,)}))
    np.testing.assert_array_equal(unused.pixels, rounded(RGBA)[..., :3])
    colours, alpha = RGBA[..., :3].astype(np.int64), RGBA[..., 3:].astype(np.int64)
    multiplied = np.concatenate([(colours * alpha / 65535).round().astype(np.uint16), RGBA[..., 3:]], -1)
    found = read(tiff(multiplied, order=order, deflated=deflated, tags={338: (1,)}))
    difference = np.abs(found.pixels.astype(int) - on_white(rounded(RGBA)))
    assert difference.max() <= 1 and difference.mean() < 0.01
    ink = read(tiff(RGBA, order=order, deflated=deflated, photometric=5))
    expected = Image.frombytes("CMYK", (256, 256), rounded(RGBA).tobytes()).convert("RGB")
    np.testing.assert_array_equal(ink.pixels, np.asarray(expected))
    assert ink.notes == (SIXTEEN, "CMYK converted to RGB")


# ---- grey ----


def miniswhite(samples: Samples) -> bytes:
    return tiff(65535 - samples, photometric=0)


@pytest.mark.parametrize("encoder", {**PNGS, **TIFFS, **PNMS, "white is 0": miniswhite})
def test_grey_of_16_bits_needs_a_word(encoder: str) -> None:
    """It is as often a depth map: without `channels` it is left out, with a reason and the remedy."""
    data = {**PNGS, **TIFFS, **PNMS, "white is 0": miniswhite}[encoder](GREY)
    reason = refused(data)
    assert all(word in reason for word in ("is not an 8-bit image", "16-bit grey", "--channels 1 or 3", "0 ... 65535"))
    for channels, notes in ((1, (SIXTEEN,)), (3, (SIXTEEN, "grey repeated to RGB"))):
        found = read(data, channels)
        expected = rounded(GREY)[..., 0] if channels == 1 else rounded(GREY).repeat(3, -1)
        np.testing.assert_array_equal(found.pixels, expected)
        assert found.notes == notes


@pytest.mark.parametrize("encoder", PNGS)
def test_grey_with_alpha_is_grey(encoder: str) -> None:
    data = PNGS[encoder](GREY_ALPHA)
    assert "16-bit grey" in refused(data)
    np.testing.assert_array_equal(read(data, 1).pixels, on_white(rounded(GREY_ALPHA)))


@pytest.mark.parametrize("white", [100, 255, 256, 300, 511, 1000, 1023, 4095, 12345, 65534])
@pytest.mark.parametrize("plain", [False, True])
def test_the_maxval_of_pgm_and_ppm_is_white(white: int, plain: bool) -> None:
    levels = np.arange(white + 1, dtype=np.uint16).reshape(1, -1, 1)
    expected = rounded(levels, white)
    grey, colour = pnm(levels, white, plain), pnm(levels.repeat(3, -1), white, plain)
    np.testing.assert_array_equal(read(colour).pixels, expected.repeat(3, -1))
    np.testing.assert_array_equal(read(grey, 1).pixels, expected[..., 0])
    how = "expanded" if white < 255 else "rounded"
    notes = () if white == 255 else (f"0 ... {white} {how} to 8-bit: round(255 x / {white})",)
    assert read(colour).notes == read(grey, 1).notes == notes
    if white > 255:
        assert f"{white.bit_length()}-bit grey" in refused(grey)
    else:
        assert read(grey).notes == notes


def test_a_tiff_of_12_bits() -> None:
    levels = every_level(1, 4096)
    assert "12-bit grey" in refused(tiff(levels, 12))
    np.testing.assert_array_equal(read(tiff(levels, 12), 1).pixels, rounded(levels, 4095)[..., 0])


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("encoder", [png, tiff])
def test_few_bits_are_expanded_and_stated(bits: int, encoder: Callable[..., bytes]) -> None:
    levels = (np.arange(32) % 2**bits).astype(np.uint16).reshape(4, 8, 1)
    found = read(encoder(levels, bits))
    np.testing.assert_array_equal(found.pixels, rounded(levels, 2**bits - 1)[..., 0])
    assert found.notes == (f"{bits}-bit expanded to 8-bit grey",)


# ---- transparency and orientation of what is converted ----


def transparent(*key: int) -> bytes:
    return png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))


@pytest.mark.parametrize(
    ("samples", "bits"), [(RGB, 16), (GREY, 16), (GREY >> 14, 2), (GREY >> 12, 4), (GREY >> 15, 1)]
)
def test_a_transparent_colour_has_the_bits_of_the_file(samples: Samples, bits: int) -> None:
    white = 2**bits - 1
    found = read(png(samples, bits, chunks=transparent(*samples[3, 5].tolist())), 3)
    expected = rounded(samples, white)
    expected[(samples == samples[3, 5]).all(-1)] = 255
    np.testing.assert_array_equal(found.pixels, expected if expected.shape[2] == 3 else expected.repeat(3, -1))
    assert ON_WHITE in found.notes


ORIENTED: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", ORIENTED)
def test_deep_images_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    samples = RGB[:4, :6]
    expected = ORIENTED[orientation](rounded(samples))
    turned = ("EXIF rotation applied",) if orientation > 1 else ()
    tags = {274: (orientation,)}
    for data, notes in (
        (png(samples, chunks=png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))), (SIXTEEN, *turned)),
        (tiff(samples, tags=tags), (SIXTEEN, *turned)),
        (tiff(samples, tags=tags, deflated=True), (SIXTEEN, *turned)),
        (tiff(rounded(samples), 8, tags=tags), turned),
    ):
        found = read(data)
        np.testing.assert_array_equal(found.pixels, expected)
        assert found.notes == notes


# ---- never ----

NEVER: dict[str, tuple[bytes, str]] = {
    "signed 16": (tiff(GREY, tags={339: (2,)}), "signed 16-bit"),
    "signed 8": (tiff(GREY >> 8, 8, tags={339: (2,)}), "signed 8-bit"),
    "signed 32": (tiff(GREY, 32, tags={339: (2,)}), "signed 32-bit"),
    "unsigned 32": (tiff(GREY, 32), "32-bit"),
    "float": (tiff(GREY, 32, tags={339: (3,)}), "float"),
    "half": (tiff(GREY, 16, tags={339: (3,)}), "float 16-bit"),
    "float RGB": (tiff(RGB, 32, tags={339: (3, 3, 3)}), "float 32-bit"),
    "float map": (b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0, 1), "float"),
    "planes": (tiff(RGB, tags={284: (2,)}), "separate planes"),
    "deflated planes": (tiff(RGB, tags={284: (2,)}, deflated=True), "separate planes"),
    "TIFF with alpha": (tiff(GREY_ALPHA, tags={338: (2,)}), "16-bit numbers in a layout"),
    "big-endian 12": (tiff(every_level(1, 4096), 12, ">"), "12-bit numbers in a layout"),
}
"""What Pillow would misread, clip or not open at all."""


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_samples_without_a_white_are_never_converted(name: str, channels: int | None) -> None:
    data, words = NEVER[name]
    assert words in refused(data, channels)


def test_another_layout_of_colour_is_an_error_rather_than_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = (b"II", 2, (1,), 1, (16, 16, 16), ())
    monkeypatch.setitem(TiffImagePlugin.OPEN_INFO, layout, ("RGB", "RGB;4B"))
    assert "a layout that is not read (RGB;4B)" in refused(tiff(RGB))


# ---- one rule for training, its check and other people's samples ----


def folder(path: Path, count: int, *others: tuple[str, bytes]) -> Path:
    for index in range(count):
        save(path / f"{index:03}.png", noise(4, 6, 3, seed=index))
    for name, data in others:
        (path / name).write_bytes(data)
    return path


def notes_of(path: Path) -> list[Sequence[str]]:
    """Conversions as loading, the check and external samples state them."""
    facts = check(DataConfig(data=str(path)))
    counted = [f"{count} image{'s' * (count > 1)}: {note}" for note, count in facts.conversions.items()]
    return [load_images(str(path)).conversions, tuple(counted), read_external(path).notes]


def test_all_readers_have_the_rule(tmp_path: Path) -> None:
    small = RGB[:4, :6]
    deep = folder(tmp_path, 2, ("a.png", png(small)), ("b.tif", tiff(small)), ("c.ppm", pnm(small, 65535)))
    assert notes_of(deep) == 3 * [(f"3 images: {SIXTEEN}",)]
    found = load_images(str(deep)).images[2:]
    assert (found.numpy() == rounded(small).transpose(2, 0, 1)).all()


def test_one_deep_grey_file_does_not_stop_a_set_that_may_skip(tmp_path: Path) -> None:
    path = folder(tmp_path / "set", 199, ("050x.png", png(GREY[:4, :6])))
    with pytest.raises(DataError, match="1 of 200 images are intact but cannot be used") as caught:
        load_images(str(path))
    assert "050x.png (is not an 8-bit image: its pixels are 16-bit grey" in caught.value.why
    assert "--on-bad-image skip" in caught.value.fix
    data = load_images(str(path), on_bad_image="skip")
    assert len(data.images) == 199
    (stated,) = data.conversions
    assert stated.startswith("1 image: skipped, intact but cannot be used (first: 050x.png: is not an 8-bit image")
    assert data.fingerprint == load_images(str(folder(tmp_path / "clean", 199))).fingerprint
    (path / "150x.png").write_bytes(b"")
    data = load_images(str(path), on_bad_image="skip")
    assert [note.split(" (")[0] for note in data.conversions] == [
        "1 image: skipped, cannot be decoded",
        "1 image: skipped, intact but cannot be used",
    ]
    facts = check(DataConfig(data=str(path), on_bad_image="skip"))
    assert facts.problems == () and facts.fingerprint == data.fingerprint and len(facts.bad) == 2


def test_without_skip_all_of_them_are_listed(tmp_path: Path) -> None:
    deep = [(f"{index}.png", png(GREY[:4, :6])) for index in range(7)]
    path = folder(tmp_path, 0, *deep, ("cut.png", png(GREY[:4, :6])[:60]))
    with pytest.raises(DataError, match="8 of 8 images cannot be decoded or used") as caught:
        load_images(str(path))
    assert all(f"{index}.png" in caught.value.why for index in range(5)) and "and 3 more" in caught.value.why
    with pytest.raises(DataError, match="more than 1 % is bad"):
        load_images(str(path), on_bad_image="skip")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_tiff_that_is_only_damaged_is_not_called_intact() -> None:
    for cut in (8, 60, 200):
        found = decode("x", lambda name, cut=cut: tiff(GREY)[:cut], None, None)
        assert isinstance(found, Undecodable) and not isinstance(found, Unusable), found
