"""Checkpoints are whole or absent; every damage is found and named."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from traps import Trap

from midway.gen.core import checkpoints
from midway.gen.core.checkpoints import Checkpoint, directories, save, set_aside, valid, verify
from midway.gen.core.errors import DataError, DiskError

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that failed saves would have waited for."""
    seconds: list[float] = []
    monkeypatch.setattr(checkpoints.time, "sleep", seconds.append)
    return seconds


def write(folder: Path) -> None:
    """Two files, one of them in a folder of folders."""
    save_file({"weight": torch.arange(6.0)}, folder / "model.safetensors")
    (folder / "tokenizer" / "deep").mkdir(parents=True)
    (folder / "tokenizer" / "deep" / "config.json").write_text('{"width": 8}\n')


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root`, hidden ones too."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# ---- writing ----


def test_the_manifest_lists_every_file_with_size_and_sha256(tmp_path: Path) -> None:
    saved = save(tmp_path, 7, write, header={"config_hash": "abc"})
    assert saved == Checkpoint(tmp_path / "step-7", 7)
    manifest = json.loads((saved.path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["config_hash"]) == ("midway-checkpoint-1", 7, "abc")
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    contents = tree(saved.path)
    del contents["manifest.json"]
    assert contents.keys() == {"model.safetensors", "tokenizer/deep/config.json"}
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()
    }


def test_latest_names_the_newest(tmp_path: Path) -> None:
    for step in (5, 20):
        save(tmp_path, step, write, keep=2)
        assert (tmp_path / "latest").read_text() == f"step-{step}\n"


SHORT = "a file of safetensors"


def fail_in(name: str) -> Callable[[pytest.MonkeyPatch], Callable[[Path], None]]:
    """Break one point of saving; the writer to save with."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
        def broken(*_: object, **__: object) -> Any:
            raise (SafetensorError if name == SHORT else OSError)(errno.EIO, f"no luck with {name}")

        def half(folder: Path) -> None:
            write(folder)
            broken()

        if name in ("the writer", SHORT):
            return half
        monkeypatch.setattr(checkpoints, name, broken)
        return write

    return patch


@pytest.mark.parametrize("point", ["the writer", SHORT, "file_hash", "write_manifest"])
def test_a_failing_save_leaves_older_checkpoints_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    save(tmp_path, 1, write, keep=2)
    save(tmp_path, 2, write, keep=2)
    before = tree(tmp_path)
    with monkeypatch.context() as patched:
        writer = fail_in(point)(patched)
        with pytest.raises(DiskError, match=f"no luck with {point}") as caught:
            save(tmp_path, 3, writer, keep=2)
    assert caught.value.exit_code == 5
    assert tree(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1", "step-2"]
    assert [verify(path).step for path in directories(tmp_path)] == [2, 1]


def test_a_failing_pointer_leaves_a_whole_checkpoint_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`latest` is only for people: the new checkpoint counts, and no older one is gone."""
    save(tmp_path, 1, write)
    with monkeypatch.context() as patched, pytest.raises(DiskError):
        save(tmp_path, 2, fail_in("write_atomically")(patched))
    assert [verify(path).step for path in directories(tmp_path)] == [2, 1]
    assert not list(tmp_path.glob(".*"))
    assert (tmp_path / "latest").read_text() == "step-1\n"


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyboardInterrupt])
def test_a_writer_that_fails_otherwise_leaves_nothing_and_is_not_called_again(
    tmp_path: Path, waits: list[float], error: type[BaseException]
) -> None:
    save(tmp_path, 1, write)
    before = tree(tmp_path)

    def broken(folder: Path) -> None:
        write(folder)
        raise error("a bug, or a person")

    with pytest.raises(error):
        save(tmp_path, 2, broken)
    assert tree(tmp_path) == before
    assert not waits


@dataclass
class Flaky:
    """A writer that fails a number of times."""

    failures: int
    calls: int = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        assert not list(folder.iterdir()), "each attempt starts empty"
        write(folder)
        if self.calls <= self.failures:
            raise OSError(errno.ENOSPC, "no space left")


def test_a_save_that_works_the_third_time_is_a_save(tmp_path: Path, waits: list[float]) -> None:
    writer = Flaky(2)
    verify(save(tmp_path, 4, writer).path)
    assert writer.calls == 3
    assert waits == list(checkpoints.BACKOFF[:2])


def test_a_save_that_never_works_is_a_disk_error_after_the_last_attempt(tmp_path: Path, waits: list[float]) -> None:
    writer = Flaky(100)
    with pytest.raises(DiskError, match="no space left") as caught:
        save(tmp_path, 4, writer)
    assert caught.value.exit_code == 5
    assert "earlier checkpoints are intact" in caught.value.fix
    assert writer.calls == 1 + len(checkpoints.BACKOFF)
    assert waits == list(checkpoints.BACKOFF)
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_a_disk_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 5 * 2**20, 5 * 2**20))
    writer = Flaky(0)
    with pytest.raises(DiskError, match="6 MiB are needed and 5 MiB are free"):
        save(tmp_path, 1, writer, needed=6 * 2**20)
    assert writer.calls == 0
    assert not list(tmp_path.iterdir())
    save(tmp_path, 1, writer, needed=5 * 2**20)
    assert writer.calls == 1


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    """A damaged directory of the same step does not stand in the way."""
    save(tmp_path, 4, write)
    (tmp_path / "step-4" / "model.safetensors").write_bytes(b"")
    verify(save(tmp_path, 4, write).path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-4"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_few_stay(tmp_path: Path, keep: int) -> None:
    """By number, not by name: 100 is newer than 9."""
    for step in (8, 9, 99, 100):
        save(tmp_path, step, write, keep)
    assert [p.name for p in directories(tmp_path)] == ["step-100", "step-99", "step-9"][:keep]


def test_a_damaged_checkpoint_that_is_newer_never_outlives_the_one_just_written(tmp_path: Path) -> None:
    """As after going back: what was just saved is the newest valid one, whatever the numbers say."""
    save(tmp_path, 9, write)
    (tmp_path / "step-9" / "model.safetensors").unlink()
    save(tmp_path, 5, write, keep=1)
    assert [p.name for p in directories(tmp_path)] == ["step-5"]


# ---- reading ----


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "bytes, "),
    "flipped": (flip, "sha256 differs"),
    "empty": (empty, "has 0 bytes"),
    "missing": (Path.unlink, "FileNotFoundError"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer/deep/config.json"])
def test_damage_is_found_and_the_file_is_named(tmp_path: Path, damage: str, name: str) -> None:
    path = save(tmp_path, 1, write).path
    assert verify(path).step == 1
    act, why = DAMAGES[damage]
    act(path / name)
    with pytest.raises(DataError, match=why) as caught:
        verify(path)
    assert name in caught.value.why
    assert str(path) in caught.value.what
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_manifest_is_found(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, 1, write).path
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().rstrip())
    DAMAGES[damage][0](manifest)
    with pytest.raises(DataError, match="manifest cannot be used"):
        verify(path)


CLAIMS: list[tuple[dict[str, Any], str]] = [
    ({"files": {"ghost.safetensors": {"size": 1, "sha256": "0"}}}, r"ghost\.safetensors"),
    ({"format": "midway-checkpoint-0"}, "midway-checkpoint-0"),
    ({"step": 2}, "step 2"),
    ({"step": "soon"}, "step cannot be 'soon'"),
]


@pytest.mark.parametrize(("change", "why"), CLAIMS)
@pytest.mark.parametrize("signed", [True, False])
def test_a_manifest_of_another_checkpoint_raises(
    tmp_path: Path, change: dict[str, Any], why: str, signed: bool
) -> None:
    """It holds a hash of itself, and is about the directory it is in. With a hash that fits, what it claims is compared."""
    path = save(tmp_path, 1, write).path
    manifest = json.loads((path / "manifest.json").read_text())
    logged = {key: value for key, value in {**manifest, **change}.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(logged, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**logged, "sha256": digest if signed else manifest["sha256"]}))
    with pytest.raises(DataError, match=why if signed else "sha256 differs"):
        verify(path)


def test_a_file_that_was_not_written_with_it_is_found(tmp_path: Path) -> None:
    """Weights that a checkpoint never had would be loaded unverified; what other programs hide is nobody's business."""
    path = save(tmp_path, 1, write).path
    for hidden in (".DS_Store", ".cache/x.json", "tokenizer/.nfs0001"):
        (path / hidden).parent.mkdir(exist_ok=True)
        (path / hidden).touch()
    assert verify(path).step == 1
    (path / "tokenizer/ema.safetensors").touch()
    with pytest.raises(DataError, match=r"tokenizer/ema\.safetensors was not written with it"):
        verify(path)


def test_a_checkpoint_under_another_name_raises(tmp_path: Path) -> None:
    """Its step is the name's, so that a run is never resumed from a step that it is not at."""
    path = save(tmp_path, 1, write).path
    path.rename(tmp_path / "step-8")
    with pytest.raises(DataError, match="step 1"):
        verify(tmp_path / "step-8")


def test_the_newest_valid_one_is_found_and_the_others_are_named(tmp_path: Path) -> None:
    for step in (2, 10, 30):
        save(tmp_path, step, write, keep=3)
    flip(tmp_path / "step-30" / "model.safetensors")
    (tmp_path / "step-10" / "manifest.json").unlink()
    (tmp_path / "step-x").mkdir()
    logged: list[str] = []
    assert next(valid(tmp_path, logged.append), None) == Checkpoint(tmp_path / "step-2", 2)
    assert len(logged) == 2
    assert logged[0].startswith("skipped step-30") and "model.safetensors" in logged[0]
    assert logged[1].startswith("skipped step-10") and "manifest" in logged[1]
    truncate(tmp_path / "step-2" / "model.safetensors")
    assert next(valid(tmp_path, logged.append), None) is None
    assert next(valid(tmp_path / "nowhere", logged.append), None) is None


def test_damaged_ones_are_renamed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, write, keep=3)
    (tmp_path / "damaged-step-3").mkdir()
    before = tree(tmp_path / "step-3")
    set_aside(tmp_path, 1)
    assert [p.name for p in directories(tmp_path)] == ["step-1"]
    assert tree(tmp_path / "damaged-step-3") == before, "nothing is thrown away"
    assert (tmp_path / "damaged-step-2").is_dir()
    set_aside(tmp_path, -1)
    assert not directories(tmp_path)


def test_a_pickle_raises_and_never_runs(tmp_path: Path) -> None:
    """Also when it comes as torch.save writes it, and even when its hash is in the manifest."""
    trap = tmp_path / "sprung"

    def plant(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(trap)))
        torch.save(Trap(trap), folder / "optimizer.safetensors")

    found = verify(save(tmp_path / "all", 1, plant).path)
    for name in ("model.safetensors", "optimizer.safetensors", "absent.safetensors"):
        with pytest.raises(DataError, match=name) as caught:
            found.tensors(name)
        assert caught.value.exit_code == 3
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))  # noqa: S301  (the trap does work)
    assert trap.exists()


def test_tensors_come_back(tmp_path: Path) -> None:
    found = save(tmp_path, 1, write)
    assert torch.equal(found.tensors("model.safetensors")["weight"], torch.arange(6.0))
