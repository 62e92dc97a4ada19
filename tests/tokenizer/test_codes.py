"""Codes on the disk: those of encode_indices, view by view, the same bytes by any processes and after a stop; named errors."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from multiprocess import together
from torch import Tensor

from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.processes import device_and_process
from midway.gen.data.images import ImageData, image_data, load_images, to_float
from midway.gen.files.records import MANIFEST
from midway.gen.tokenizer.codes import all_codes, codes_path, encode_codes, index_shape, open_codes
from midway.gen.tokenizer.encoding import Encoding, encode, views_of
from midway.gen.tokenizer.stored import Views
from midway.gen.training.batches import Context
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

FLIPPED = Views(mirrored=True)
QUANTIZERS = {
    "fsq": {"type": "fsq", "levels": [5, 3]},
    "residual": {"type": "residual", "base": {"type": "vq", "codebook_size": 6, "dim": 3}, "depth": 2},
    "two levels": {
        "type": "two_level",
        "top": {"type": "fsq", "levels": [3, 3]},
        "bottom": {"type": "fsq", "levels": [3, 3]},
    },
    "more than 2**31": {"type": "fsq", "levels": [64] * 6},
}


def tokenizer(name: str = "fsq", seed: int = 0) -> ImageTokenizer:
    torch.manual_seed(seed)
    return ImageTokenizer(width=8, blocks=1, quantizer=QUANTIZERS[name]).eval()


def digits(count: int = 60) -> ImageData:
    data = load_images("digits")
    return image_data(data.images[:count], data.labels[:count], data.classes, "digits", ())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@dataclass(frozen=True)
class Whole:
    """One token an index."""

    def tokens(self, indices: Tensor) -> Tensor:
        if int(indices.max()) >= 15:
            raise ValueError("codes are too large")
        return indices.flatten(1)[..., None]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_records_are_the_codes_of_every_view(name: str, tmp_path: Path) -> None:
    model, data = tokenizer(name), digits(20)
    assert name != "two levels" or index_shape(model) == (20,)
    encode_codes(tmp_path / "codes", model, data, FLIPPED, batch_size=8)
    found = open_codes(tmp_path / "codes", data, model, flip=True)
    stored = found.read(torch.tensor([3, 19, 0]))
    with torch.no_grad():
        for i, view in enumerate(views_of(data.images[:], FLIPPED, 8)):
            expected = model.encode_indices(to_float(view))[[3, 19, 0]]
            assert torch.equal(stored.views[:, i].long(), expected) and expected.unique().numel() > 3
    assert stored.views.dtype == (torch.int64 if name.startswith("more") else torch.int32)
    assert torch.equal(stored.labels, data.labels[[3, 19, 0]])
    assert torch.equal(all_codes(model, data.images).long(), found.read(torch.arange(20)).views[:, 0].long())


def test_fit_gets_one_view_of_each_as_tokens(tmp_path: Path) -> None:
    model, data = tokenizer(), digits()
    encode_codes(tmp_path / "codes", model, data, FLIPPED)
    codes, wanted = open_codes(tmp_path / "codes", data, model, flip=True), torch.arange(60)
    context = Context(0, 3, wanted)
    for flip in (False, True):
        items = codes.items(Whole(), flip)
        assert items.augment is not None and items.size == 60
        batch = items.augment(items.read(wanted), context)
        mirrored = (context.uniform("flip") < 0.5) if flip else torch.zeros(60, dtype=torch.bool)
        expected = codes.read(wanted).views[torch.arange(60), mirrored.long()]
        assert torch.equal(batch.tokens, expected.flatten(1)[..., None]) and batch.tokens.dtype == torch.int32
        assert torch.equal(batch.labels, data.labels)
        assert data.fingerprint in items.fingerprint


def _write(_: int, folder: Path) -> None:
    process = device_and_process()[1]
    encode_codes(folder, tokenizer(), digits(), FLIPPED, 7, process)


def test_bytes_depend_on_neither_processes_nor_interruptions(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    encode_codes(whole, tokenizer(), digits(), FLIPPED, 7)
    together(_write, 2, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(whole)

    class Stopped(Exception):
        pass

    calls, original = list[int](), ImageTokenizer.encode_indices

    def stopping(self: ImageTokenizer, images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(calls) == 10:
            raise Stopped
        return original(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageTokenizer, "encode_indices", stopping)
        with pytest.raises(Stopped):
            encode_codes(tmp_path / "parts", tokenizer(), digits(), FLIPPED, 7)
        done = len(list((tmp_path / "parts").glob("*.index")))
        assert 0 < done < 9 and not (tmp_path / "parts" / MANIFEST).exists()
        with pytest.raises(DataError, match=r"no finished set of codes[\s\S]*midway encode --kind codes"):
            open_codes(tmp_path / "parts", digits(), tokenizer())
        encode_codes(tmp_path / "parts", tokenizer(), digits(), FLIPPED)  # with the batch that was begun with
    assert contents(tmp_path / "parts") == contents(whole)
    assert len(calls) == 10 + 2 * (9 - done), "what was written is kept"


def test_what_is_not_these_codes_is_named(tmp_path: Path) -> None:
    path, data, model = tmp_path / "codes", digits(), tokenizer()
    encode_codes(path, model, data, Views())
    with pytest.raises(DataError, match=r"no codes at[\s\S]*midway encode --kind codes"):
        open_codes(tmp_path / "nothing", data, model)
    with pytest.raises(DataError, match=r"stale\n.*its tokenizer is"):
        open_codes(path, data, tokenizer(seed=1))
    with pytest.raises(DataError, match=r"stale\n.*its data is"):
        open_codes(path, digits(59), model)
    with pytest.raises(DataError, match="no codes of mirrored images"):
        open_codes(path, data, model, flip=True)
    encode(tmp_path / "latents", model, data, Encoding())
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        open_codes(tmp_path / "latents", data, model)
    with pytest.raises(UsageError, match="no folder of codes"):
        encode_codes(tmp_path / "latents", model, data, Views())
    continuous = ImageTokenizer(width=8, blocks=1, quantizer={"type": "kl", "dim": 2})
    with pytest.raises(UsageError, match=r"no codes: its quantizer is kl\n.*continuous"):
        encode_codes(tmp_path / "kl", continuous, data, Views())
    for name, words in (("record", "has changed"), ("code", "codes that this tokenizer does not have")):
        damaged = tmp_path / name
        shutil.copytree(path, damaged)
        if name == "record":
            file = damaged / "records-00000.npy"
            file.write_bytes(file.read_bytes()[:-4] + b"\x07\x00\x00\x00")
            with pytest.raises(DataError, match=words):
                open_codes(damaged, data, model)
            continue
        found = open_codes(damaged, data, model)
        assert found.kept is not None
        wrong = replace(found, kept=found.kept + 100)
        with pytest.raises(DataError, match=words):
            wrong.items(Whole(), False).read(torch.arange(4))
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "facts": {**manifest["facts"], "windows": 3}}))
    with pytest.raises(DataError, match="windows of its manifest are 3"):
        open_codes(path, data, model)


def test_a_place_names_images_tokenizer_and_views(tmp_path: Path) -> None:
    paths = {codes_path(tmp_path, digits(), tokenizer(), views).name for views in (Views(), FLIPPED, Views(5, True))}
    assert len(paths) == 3 and all(name.startswith("codes-") for name in paths)
