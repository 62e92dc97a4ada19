"""Commands on a built set: the bits of the same run from memory, and a named error for a shard that is not as it was."""

import csv
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import noise, save
from pipelines import Script
from torch import Tensor

from midway.gen.core.errors import DataError
from midway.gen.data.build import build
from midway.gen.data.images import load_images
from midway.gen.data.splits import DataConfig
from midway.gen.files.records import Records

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
LINE = "--steps 3 --batch-size 8 --model.width 8 --log-every 1"


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 images in three classes, and beside it `built` and `encoded`, of several shards."""
    root = tmp_path_factory.mktemp("built")
    for index in range(60):
        save(root / "animals" / f"class{index % 3}" / f"{index:03}.png", noise(8, 8, 3, seed=index))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("midway.gen.files.record_writer.SHARD_BYTES", 1920)
        for name in ("built", "encoded"):
            build(DataConfig(str(root / "animals")), root / name, keep_encoded=name == "encoded")
    return root


@pytest.fixture
def own(animals: Path, tmp_path: Path) -> Path:
    """A copy of the built set."""
    return Path(shutil.copytree(animals / "built", tmp_path / "built"))


def weights(run: Path) -> dict[str, str]:
    """sha256 of every file of weights of a run."""
    found = {path.relative_to(run).as_posix(): path for path in run.rglob("*.safetensors")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


def test_a_run_from_memory_and_from_the_disk_has_the_same_bits(animals: Path, succeed: Script, tmp_path: Path) -> None:
    for name in ("animals", "built", "encoded"):
        succeed(f"train_tokenizer digits-fsq {LINE}", "--data", animals / name, "--out", tmp_path / name)
    wanted = weights(tmp_path / "animals")
    assert any(name.startswith("tokenizer/") for name in wanted) and any("checkpoints" in name for name in wanted)
    assert weights(tmp_path / "built") == weights(tmp_path / "encoded") == wanted


def test_tokenizers_are_measured_as_from_memory_a_batch_at_a_time(
    animals: Path, succeed: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read, counts, tables = Records.read, list[int](), list[list[str]]()

    def counting(self: Records, items: Tensor) -> Tensor:
        counts.append(len(items))
        return read(self, items)

    for name in ("animals", "built"):
        succeed(f"train_tokenizer digits-fsq {LINE}", "--data", animals / name, "--out", tmp_path / name)
        monkeypatch.setattr(Records, "read", counting)
        flags = ("--features", "none", "--batch-size", 4, "--out", tmp_path / "report")
        succeed("evaluate_tokenizer", "--tokenizers", tmp_path / name, *flags)
        monkeypatch.setattr(Records, "read", read)
        (row,) = csv.DictReader((tmp_path / "report" / "results.csv").read_text().splitlines())
        tables.append([value for key, value in row.items() if "seconds" not in key and key not in ("name", "images")])
    assert len(tables[0]) > 10 and tables[0] == tables[1]
    assert sum(counts) >= 12 and max(counts) <= 10  # 12 are held out, of which the page shows 10


def _change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (_change, r"has changed"),
    "truncated": (_truncate, r"cannot be read"),
    "missing": (Path.unlink, r"cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_ends_training_with_its_name(damage: str, own: Path, script: Script, tmp_path: Path) -> None:
    work, words = DAMAGES[damage]
    work(own / "records-00003.npy")
    found = script("train_tokenizer", "digits-fsq", *LINE.split(), "--data", own, "--out", tmp_path / "run")
    assert found.code == 3 and "Traceback" not in found.err
    assert f"{own / 'records-00003.npy'} {words}" in found.err and "fix: build it again" in found.err


def test_a_changed_image_that_no_step_took_ends_training_too(own: Path, script: Script, tmp_path: Path) -> None:
    """It is read by the statistics of latents or the held-out figures; the checkpoint stays."""
    for number in range(6):
        path = own / f"records-{number:05}.npy"
        whole = path.read_bytes()
        _change(path)
        flags = ("--model.width", 8, "--steps", 1, "--batch-size", 1, "--overwrite")
        found = script("train_tokenizer", "digits-fsq", *flags, "--data", own, "--out", tmp_path / "run")
        assert found.code == 3 and f"{path} has changed" in found.err, number
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["manifest.json", "index.safetensors"])
def test_a_damaged_index_or_manifest_is_named(name: str, own: Path, script: Script, tmp_path: Path) -> None:
    (own / name).write_bytes((own / name).read_bytes()[:-30])
    found = script("train_tokenizer", "digits-fsq", *LINE.split(), "--data", own, "--out", tmp_path / "run")
    assert found.code == 3 and name in found.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_shard_that_vanishes_in_training(
    damage: str, own: Path, script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file that was opened is read to its end though its name is gone; every other one is named."""
    read, gone = Records.read, list[Path]()

    def reading(self: Records, items: Tensor) -> Tensor:
        found = read(self, items)
        if not gone:
            gone.extend(own / f"records-{number:05}.npy" for number in range(6) if number not in self._files)
            for path in gone:
                DAMAGES[damage][0](path)
        return found

    monkeypatch.setattr(Records, "read", reading)
    flags = ("--model.width", 8, "--steps", 3, "--batch-size", 2)
    found = script("train_tokenizer", "digits-fsq", *flags, "--data", own, "--out", tmp_path / "run")
    assert len(gone) >= 4, "the first batch is in two shards at most"
    assert found.code == 3 and any(f"{path} cannot be read" in found.err for path in gone), found.err
    assert "Traceback" not in found.err


def test_an_unfinished_set_is_not_read(own: Path, script: Script, tmp_path: Path) -> None:
    (own / "manifest.json").rename(own / "unfinished-build.json")
    found = script("train_tokenizer", "digits-fsq", *LINE.split(), "--data", own, "--out", tmp_path / "run")
    assert found.code == 3 and "unfinished" in found.err


def test_a_source_that_is_too_large_for_memory(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2 * 60 * 8 * 8 * 3
    monkeypatch.setattr("midway.gen.data.images.free_memory", lambda: needed)
    load_images(str(animals / "animals"))
    monkeypatch.setattr("midway.gen.data.images.free_memory", lambda: needed - 1)
    with pytest.raises(DataError, match=r"too large for memory[\s\S]*60 images[\s\S]*data build .*animals --out DIR"):
        load_images(str(animals / "animals"))
    load_images(str(animals / "built"))  # nothing of it is in memory
