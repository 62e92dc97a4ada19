"""Folders of latents: the same bytes by any number of processes and after any kill, views, types of numbers, damage by name."""

import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from multiprocess import together
from safetensors.torch import save_file
from stored_latents import encoded
from torch import Tensor

from midway.gen.core.errors import DataError, DiskError, DivergedError, UsageError
from midway.gen.core.files import read_tensors
from midway.gen.core.locks import lock
from midway.gen.core.processes import device_and_process
from midway.gen.data.crops import cropped
from midway.gen.data.images import ImageData, load_images, to_float
from midway.gen.files import record_work
from midway.gen.files.records import INDEX, MANIFEST, is_records, open_records
from midway.gen.tokenizer import stored as stored_file
from midway.gen.tokenizer.encoding import Encoding, encode, images_of, latent_statistics, views_of
from midway.gen.tokenizer.latents import open_latents
from midway.gen.tokenizer.statistics import ChannelMoments, merged
from midway.gen.tokenizer.stored import StoredViews, Views
from midway.gen.training.batches import Context
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
FLIPPED, CROPS = Encoding(Views(1, True), batch_size=7), Encoding(Views(5, True), batch_size=7)


def digits(count: int = 60) -> ImageData:
    found = load_images("digits")
    return replace(found, images=found.images[:count], labels=found.labels[:count], fingerprint=f"{count}" * 20)


def tokenizer(side: int = 8) -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(width=8, blocks=1, image_size=side, quantizer={"type": "fsq", "levels": [4, 3]}).eval()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def everything(folder: Path) -> Tensor:
    """All records (N, V, D, h, w)."""
    records = open_records(folder, "latents", "")
    return records.read(torch.arange(len(records)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mirrored views of 60 images in nine batches, and so in nine shards, by one process without interruption."""
    folder = tmp_path_factory.mktemp("latents") / "whole"
    encode(folder, tokenizer(), digits(), FLIPPED)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# ---- processes, kills and shards ----


def _encode(_: int, folder: Path) -> None:
    encode(folder, tokenizer(), digits(), FLIPPED, device_and_process()[1])


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_together_write_the_bytes_of_one(processes: int, whole: Path, tmp_path: Path) -> None:
    """Mean and std in the manifest among them."""
    together(_encode, processes, tmp_path / "latents")
    assert contents(tmp_path / "latents") == contents(whole)


def test_moments_do_not_depend_on_shards_and_are_those_of_all(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = tokenizer(), digits()
    found = open_latents(whole, images, model, flip=True)
    for shards in (1, 2, 4):
        monkeypatch.setattr(record_work, "SHARDS", shards)
        folder = tmp_path / f"{shards}"
        encode(folder, model, images, FLIPPED)
        assert len(list(folder.glob("records-*"))) in (shards, shards - 1)
        other = open_latents(folder, images, model, flip=True)
        assert all(shard.count % 7 == 0 for shard in other.records.shards[:-1]), "each batch has the same images"
        assert torch.equal(other.mean, found.mean) and torch.equal(other.std, found.std)
        assert torch.equal(everything(folder), everything(whole))
    mean, std = latent_statistics(model, images.images, 7, flip=True)
    assert torch.equal(mean, found.mean) and torch.equal(std, found.std)
    rows = everything(whole).double().transpose(0, 2).flatten(1)
    torch.testing.assert_close(mean.double(), rows.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(std.double(), rows.std(1), rtol=1e-6, atol=0)


def test_moments_survive_json_and_are_merged_to_those_of_the_whole() -> None:
    raw = torch.randn(50, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 1e-3 + 1e4
    parts = [ChannelMoments.of(part) for part in raw.split(7)]
    again = merged((ChannelMoments.from_json(part.to_json()) for part in parts), 3)
    assert torch.equal(again.deviations, merged(parts, 3).deviations)
    rows = raw.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(again.mean, rows.mean(1), rtol=1e-15, atol=0)
    torch.testing.assert_close(again.result()[1].double(), rows.std(1), rtol=1e-6, atol=0)


def _encode_slowly(folder: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    raw_latents = ImageTokenizer.raw_latents

    def slower(self: ImageTokenizer, images: Tensor) -> Tensor:
        time.sleep(seconds)
        return raw_latents(self, images)

    ImageTokenizer.raw_latents = slower
    _encode(0, folder)


def _killed(folder: Path, when: Callable[[], bool]) -> None:
    """Encode in another process until `when`."""
    process = multiprocessing.get_context("forkserver").Process(target=_encode_slowly, args=(folder, 0.05), daemon=True)
    process.start()
    end = time.monotonic() + 60
    while not when():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_killed_encoding_goes_on_to_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, with one shard and with four, inside of the next; those that were there are not encoded again."""
    folder = tmp_path / "latents"
    for shards in (1, 4):
        half = f".records-{shards:05}.npy.*"
        _killed(folder, lambda n=shards, half=half: len([*folder.glob("*.index")]) == n and any(folder.glob(half)))
        assert not is_records(folder) and len(list(folder.glob("records-*.npy"))) == shards
        with pytest.raises(DataError, match=r"no finished set of latents[\s\S]*midway encode"):
            open_latents(folder, digits(), tokenizer())
    batches, raw_latents = list[int](), ImageTokenizer.raw_latents

    def counting(self: ImageTokenizer, images: Tensor) -> Tensor:
        batches.append(len(images))
        return raw_latents(self, images)

    monkeypatch.setattr(ImageTokenizer, "raw_latents", counting)
    encode(folder, tokenizer(), digits(), replace(FLIPPED, batch_size=None))  # with the batch that was begun with
    assert sum(batches) == 2 * (60 - 4 * 7)
    assert contents(folder) == contents(whole)
    assert not list(folder.glob(".records*"))
    encode(folder, tokenizer(), digits(), FLIPPED)
    assert sum(batches) == 2 * (60 - 4 * 7), "what is finished stays"


def test_shards_of_another_plan_are_not_used(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    _killed(folder, lambda: len([*folder.glob("*.index")]) > 2)
    other = replace(FLIPPED, batch_size=20)
    encode(folder, tokenizer(), digits(), other)
    encode(tmp_path / "fresh", tokenizer(), digits(), other)
    assert contents(folder) == contents(tmp_path / "fresh")
    assert len(list(folder.glob("records-*"))) == 3
    encode(folder, tokenizer(), digits(), FLIPPED, overwrite=True)
    assert contents(folder) == contents(whole)


def test_a_full_disk_leaves_what_can_be_gone_on_from(whole: Path, tmp_path: Path) -> None:
    """Files of at most 1,000 bytes, of which a shard has 1,920."""
    folder, limits = tmp_path / "latents", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"cannot write .*records-00000.npy") as raised:
            encode(folder, tokenizer(), digits(), FLIPPED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.exit_code == 5 and not folder.exists()
    encode(folder, tokenizer(), digits(), FLIPPED)
    assert contents(folder) == contents(whole)


def test_two_commands_do_not_write_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    folder.mkdir()
    with lock(folder), pytest.raises(UsageError, match="being encoded by another process"):
        encode(folder, tokenizer(), digits(), FLIPPED)
    (folder / "mine").touch()
    with pytest.raises(UsageError, match="no folder of latents"):
        encode(folder, tokenizer(), digits(), FLIPPED)


# ---- views ----


def stored(count: int, views: int) -> StoredViews:
    """Every number is that of its view."""
    numbers = torch.arange(views).float().view(1, -1, 1, 1, 1)
    return StoredViews(numbers.expand(count, -1, 2, 4, 4), torch.zeros(count, dtype=torch.int64))


def test_a_sample_is_its_latents_or_those_of_its_mirror_image_as_ever(whole: Path) -> None:
    """By the same draw and the same arithmetic as before latents were on the disk."""
    model, images = tokenizer(), digits()
    found = open_latents(whole, images, model, flip=True)
    items, context = (
        torch.randperm(60, generator=torch.Generator().manual_seed(2)),
        Context(3, 5, torch.arange(60) + 60),
    )
    batch = found.standardised(found.read(items), context, flip=True)
    old = encoded(model, images, 7, flip=True)
    assert old.mirrored is not None
    plain, mirrored = ((raw - old.mean.view(-1, 1, 1)) / old.std.view(-1, 1, 1) for raw in (old.raw, old.mirrored))
    assert torch.equal(batch.latents, context.either(plain[items], mirrored[items], "flip"))
    assert torch.equal(batch.labels, images.labels[items])
    alone = found.standardised(found.read(items), context, flip=False)
    assert torch.equal(alone.latents, plain[items])
    assert not torch.equal(alone.latents, batch.latents)


def test_windows_and_mirror_images_are_drawn_equally_and_by_themselves() -> None:
    context = Context(0, 3, torch.arange(5000))
    for views, flip, chosen in (
        (Views(5, True), True, 10),
        (Views(5, True), False, 5),
        (Views(1, True), True, 2),
        (Views(1, True), False, 1),
    ):
        numbers = views.choose(context, flip)
        counts = torch.zeros(5000) if numbers is None else numbers
        shares = torch.bincount(counts.long(), minlength=views.count) / 5000
        expected = torch.zeros(views.count)
        expected[:chosen] = 1 / chosen
        torch.testing.assert_close(shares, expected, rtol=0, atol=4 * (0.25 / 5000) ** 0.5)
    again = Views(5, True).choose(Context(0, 3, torch.arange(1000, 2000)), True)
    whole = Views(5, True).choose(context, True)
    assert again is not None and whole is not None and torch.equal(again, whole[1000:2000])


def test_the_views_of_an_image_are_its_corners_its_centre_and_their_mirror_images() -> None:
    images = torch.arange(2 * 11 * 8).view(2, 1, 11, 8)
    found = list(views_of(images, Views(5, True), 4))
    places = [(0, 0), (0, 4), (7, 0), (7, 4), (3, 2)]
    assert [view[0, 0, 0, 0].item() for view in found[:5]] == [8 * top + left for top, left in places]
    for (top, left), view, mirrored in zip(places, found[:5], found[5:], strict=True):
        assert torch.equal(view, images[:, :, top : top + 4, left : left + 4])
        assert torch.equal(mirrored, view.flip(-1))
    assert torch.equal(torch.stack(list(views_of(images, Views(), 4))), images[None])


def test_ten_crops_are_encoded_one_by_one(tmp_path: Path) -> None:
    model, data = tokenizer(6), cropped(digits(20), 6)
    encode(tmp_path / "ten", model, data, CROPS)
    found = open_latents(tmp_path / "ten", data, model, flip=True)
    assert found.records.shape == (10, 2, 3, 3) and found.views == CROPS.views
    assert data.whole is not None
    windows = list(views_of(digits(20).images[:], CROPS.views, 6))
    with torch.no_grad():
        wanted = torch.stack([model.raw_latents(to_float(window[:7])) for window in windows], 1)
    assert torch.equal(everything(tmp_path / "ten")[:7], wanted)
    encode(tmp_path / "one", model, data, Encoding(batch_size=7))
    assert torch.equal(everything(tmp_path / "one")[:, 0], everything(tmp_path / "ten")[:, 4]), "the centre"
    assert found.items(True).fingerprint.endswith(" in float32, 5 windows")
    with pytest.raises(UsageError, match=r"--crops 10\n.*8x8[\s\S]*--crop on larger"):
        encode(tmp_path / "no", tokenizer(), digits(), CROPS)
    assert not (tmp_path / "no").exists()
    assert images_of(digits(), CROPS.views).shape == digits().images.shape


# ---- types of numbers ----


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_numbers_are_the_wide_ones_rounded(dtype: Any, whole: Path, tmp_path: Path) -> None:
    """Mean and std are those of what is stored, and the rounding error is recorded."""
    model, images, kind = tokenizer(), digits(), getattr(torch, dtype)
    encode(tmp_path / "narrow", model, images, replace(FLIPPED, dtype=dtype))
    found, wide, narrow = (
        open_latents(tmp_path / "narrow", images, model),
        everything(whole),
        everything(tmp_path / "narrow"),
    )
    assert narrow.dtype == kind and torch.equal(narrow, wide.to(kind))
    rows = narrow.double().transpose(0, 2).flatten(1)
    torch.testing.assert_close(found.mean.double(), rows.mean(1), rtol=1e-6, atol=1e-7)
    error = (narrow.double() - wide.double()).square().sum() / wide.double().square().sum()
    assert found.records.facts["rms_error"] == pytest.approx(error.sqrt().item(), rel=1e-9)
    assert 0 < error.sqrt() < 2 * torch.finfo(kind).eps
    assert "rms_error" not in open_latents(whole, images, model).records.facts
    context = Context(0, 0, torch.arange(60))
    batch = found.standardised(found.read(torch.arange(60)), context, flip=False)
    assert batch.latents.dtype == torch.float32
    assert torch.equal(batch.latents, (narrow[:, 0].float() - found.mean.view(-1, 1, 1)) / found.std.view(-1, 1, 1))
    assert found.items(False).fingerprint == f"{images.fingerprint} by {found.tokenizer_hash} in {dtype}, 1 windows"
    assert (
        open_latents(whole, images, model).items(True).fingerprint == f"{images.fingerprint} by {found.tokenizer_hash}"
    )


@pytest.mark.parametrize(
    ("value", "dtype", "error", "words"),
    [
        (7e4, "float16", DataError, r"--dtype float16[\s\S]*7e\+04[\s\S]*bfloat16 or float32"),
        (float("nan"), "float32", DivergedError, "not finite"),
    ],
)
def test_numbers_that_cannot_be_stored_leave_nothing(
    value: float, dtype: Any, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_latents = ImageTokenizer.raw_latents

    def spoiled(self: ImageTokenizer, images: Tensor) -> Tensor:
        raw = raw_latents(self, images)
        raw[-1, 0, 0, 0] = value
        return raw

    monkeypatch.setattr(ImageTokenizer, "raw_latents", spoiled)
    with pytest.raises(error, match=words):
        encode(tmp_path / "latents", tokenizer(), digits(), replace(FLIPPED, dtype=dtype))
    assert not (tmp_path / "latents").exists()


# ---- damage ----


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def with_labels(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors, header = read_tensors(path)
        save_file({**tensors, "labels": change(tensors["labels"])}, path, header or None)

    return write


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a changed shard": ("records-00003.npy", change),
    "a shorter shard": ("records-00003.npy", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "a missing shard": ("records-00003.npy", Path.unlink),
    "no index": (INDEX, Path.unlink),
    "other labels": (INDEX, with_labels(lambda labels: labels + 1)),
    "labels of int32": (INDEX, with_labels(lambda labels: labels.int())),
    "fewer labels": (INDEX, with_labels(lambda labels: labels[1:])),
    "no manifest": (MANIFEST, Path.unlink),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("bound", [0, 1 << 30])
def test_damage_is_named_with_the_command_that_repairs_it(
    kind: str, bound: int, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the disk batch by batch, and where all is kept in memory."""
    monkeypatch.setattr(stored_file, "IN_MEMORY", bound)
    name, damage = DAMAGE[kind]
    damage(copy / name)
    with pytest.raises(DataError) as raised:
        open_latents(copy, digits(), tokenizer(), flip=True).read(torch.arange(60))
    assert str(copy) in str(raised.value) and "midway encode --flip --overwrite" in raised.value.fix
    assert name in str(raised.value) or "labels" in kind or kind == "no manifest"


def test_from_memory_and_from_disk_are_the_same(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, context = tokenizer(), digits(), Context(0, 2, torch.arange(40))
    items, found = torch.randint(0, 60, (40,), generator=torch.Generator().manual_seed(0)), []
    for bound in (1 << 30, 0):
        monkeypatch.setattr(stored_file, "IN_MEMORY", bound)
        opened = open_latents(whole, images, model, flip=True)
        assert (opened.kept is None) == (bound == 0)
        batch = opened.items(True)
        assert batch.augment is not None and batch.size == 60
        found.append(batch.augment(batch.read(items), context))
    assert torch.equal(found[0].latents, found[1].latents) and torch.equal(found[0].labels, found[1].labels)
