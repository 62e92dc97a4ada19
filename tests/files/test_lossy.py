"""Whether an image was saved with loss is read from its file, and formats that need more than Pillow name what they need."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pictures import noise
from PIL import Image, ImageFile, features

from midway.gen.data.check import check
from midway.gen.data.external import LOSSY_SAMPLES, read_external
from midway.gen.data.images import load_images
from midway.gen.data.splits import DataConfig
from midway.gen.files import decoding
from midway.gen.files.decoding import Decoded, Undecodable, decode

COLOUR = Image.fromarray(noise(16, 24, 3))
FRAMES: dict[str, Any] = {"save_all": True, "append_images": [COLOUR.rotate(180)]}
EXTENDED: dict[str, Any] = {"icc_profile": bytes(301)}
AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
HEADER = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
"""The first bytes of a HEIF file."""


def encoded(kind: str, image: Image.Image = COLOUR, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def notes(data: bytes) -> tuple[str, ...]:
    found = decode("x", lambda name: data, None, None)
    assert isinstance(found, Decoded), found
    return tuple(note for note in found.notes if note.startswith("lossy"))


@pytest.mark.parametrize(
    "options", [{}, FRAMES, EXTENDED, FRAMES | EXTENDED], ids=["plain", "frames", "extended", "both"]
)
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("lossless", [False, True])
def test_webp_is_lossy_by_its_chunks(options: dict[str, Any], alpha: bool, lossless: bool) -> None:
    image = COLOUR.convert("RGBA") if alpha else COLOUR
    if alpha:
        image.putalpha(Image.fromarray(noise(16, 24)))
    data = encoded("WEBP", image, lossless=lossless, **options)
    assert notes(data) == (() if lossless else ("lossy WebP source",))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("JPEG", {}, ("lossy JPEG source",)),
        ("MPO", FRAMES, ("lossy JPEG source",)),
        ("TIFF", {"compression": "jpeg"}, ("lossy JPEG source",)),
        ("TIFF", {"compression": "tiff_lzw"}, ()),
        ("TIFF", {}, ()),
        ("PNG", {}, ()),
        ("BMP", {}, ()),
        pytest.param("AVIF", {}, ("lossy AVIF source",), marks=AVIF),
    ],
)
def test_other_formats(kind: str, options: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert notes(encoded(kind, **options)) == expected


def test_the_name_of_a_file_decides_nothing(tmp_path: Path) -> None:
    """Training, its check and external samples: lossy by content, a JPEG called .png included."""
    for lossless, words in ((True, 0), (False, 1)):
        folder = tmp_path / str(lossless)
        folder.mkdir()
        (folder / "a.webp").write_bytes(encoded("WEBP", lossless=lossless))
        (folder / "b.png").write_bytes(encoded("PNG" if lossless else "JPEG"))
        source = str(folder)
        assert sum("lossy" in note for note in load_images(source).conversions) == 2 * words
        assert any("lossy files" in warning for warning in check(DataConfig(data=source)).warnings) == bool(words)
        assert read_external(folder).notes.count(LOSSY_SAMPLES) == words
    pixels = load_images(str(tmp_path / "True")).images[:]
    assert (pixels.permute(0, 2, 3, 1).numpy() == np.asarray(COLOUR)).all()


@AVIF
@pytest.mark.parametrize(("flags", "bits"), [(0x0C, None), (0x4C, 10), (0x6C, 12)])
def test_more_bits_of_avif_are_stated(flags: int, bits: int | None) -> None:
    """The decoder itself brings them to 8; the third byte of av1C has two flags: high depth, and 12 bits."""
    data = bytearray(encoded("AVIF"))
    data[data.index(b"av1C") + 6] = flags
    expected = () if bits is None else (f"{bits}-bit brought to 8-bit by the decoder of AVIF",)
    image = Image.open(io.BytesIO(encoded("AVIF")))
    assert decoding.to_eight_bits(image, bytes(data), None)[1] == expected


# ---- formats that this machine may not read ----


@pytest.fixture
def fresh() -> Iterator[None]:
    """The readable formats are found again, before and after."""
    decoding._readable.cache_clear()
    yield
    decoding._readable.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_heif_without_its_plugin_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # type: ignore[arg-type]
    (tmp_path / "a.heic").write_bytes(HEADER + bytes(100))
    found = decode("a.heic", lambda name: (tmp_path / name).read_bytes(), None, None)
    assert isinstance(found, Undecodable) and "pip install pillow-heif" in found.reason
    with pytest.raises(Exception, match="1 of 1 image cannot be decoded") as caught:
        load_images(str(tmp_path))
    assert "pip install pillow-heif" in str(caught.value)


class Plugin(ImageFile.ImageFile):
    """A stand-in for the plugin's reader: grey of 2 x 1 pixels, whatever the file holds."""

    format = "HEIF"

    def _open(self) -> None:
        self._mode, self._size = "L", (2, 1)
        self.info["bit_depth"] = 10
        self.tile = [("raw", (0, 0, 2, 1), 4, "L")]  # type: ignore[list-item]


@pytest.mark.usefixtures("fresh")
def test_heif_with_its_plugin_is_read_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = ModuleType("pillow_heif")

    def register() -> None:
        monkeypatch.setitem(Image.OPEN, "HEIF", (Plugin, lambda prefix: prefix[4:12] == b"ftypheic"))

    plugin.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    found = decode("x", lambda name: HEADER, None, None)
    assert isinstance(found, Decoded) and found.pixels.tolist() == [[ord("f"), ord("t")]]
    assert found.notes == ("lossy HEIF source", "10-bit brought to 8-bit by the decoder of HEIF")


@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore:image file could not be identified because AVIF")
@pytest.mark.parametrize("missing", ["plugin", "decoder"])
def test_avif_before_pillow_reads_it(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow before 11.3 has no plugin; later ones may have been built without the decoder."""
    Image.init()
    if missing == "plugin":
        monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    else:
        monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
        monkeypatch.setattr(features, "check", lambda feature: False)
    found = decode("x", lambda name: b"\0\0\0\x18ftypavif" + bytes(60), None, None)
    assert isinstance(found, Undecodable) and "pip install --upgrade pillow" in found.reason
