"""Only regular files of an honest size are opened: pipes, sockets, devices, folders and endless texts are errors."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from endless import ENDLESS, guarded
from resuming import seal
from safetensors.torch import save_file

from midway.gen.core import checkpoints, files
from midway.gen.core.checkpoints import Checkpoint
from midway.gen.core.config import YAML_LIMIT, read_as, read_yaml, write_yaml
from midway.gen.core.errors import DataError, DiskError, UsageError
from midway.gen.core.files import file_hash, read_bytes, read_json, read_text, regular_file
from midway.gen.core.locks import lock
from midway.gen.core.runs import Run


@dataclass(frozen=True)
class Nothing:
    """An object without keys."""


def sparse(path: Path, size: int) -> Path:
    """A file of this many zeros, which takes no space."""
    path.touch()
    os.truncate(path, size)
    return path


def checkpoint(root: Path) -> Checkpoint:
    def write(folder: Path) -> None:
        save_file({"x": torch.zeros(3)}, folder / "x.safetensors")
        (folder / "x.json").write_text("{}")

    return checkpoints.save(root, 1, write)


# ---- one function ----


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("read", [regular_file, file_hash, read_text, read_json, lambda path: read_bytes(path, 9)])
def test_what_is_no_regular_file_is_never_opened(kind: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    make, words = ENDLESS[kind]
    make(tmp_path / "x")
    with pytest.raises(OSError, match=words):
        guarded(lambda: read(tmp_path / "x"))


def test_regular_files_and_links_to_them_are_read_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for path in (tmp_path / "x", tmp_path / "link"):
        assert regular_file(path) == path and read_bytes(path, 5) == b"12345"
        with pytest.raises(OSError, match="5 bytes, more than the limit of 4"):
            read_bytes(path, 4)
    with pytest.raises(FileNotFoundError):
        regular_file(tmp_path / "absent")


def test_a_file_that_grows_is_cut_at_the_size_it_had_when_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    real = os.fstat

    def stat_and_grow(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        os.truncate(tmp_path / "x", 1 << 40)
        return found

    monkeypatch.setattr(files.os, "fstat", stat_and_grow)
    assert read_bytes(tmp_path / "x", 5) == b"12345"


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "", "\ud800"])
def test_json_that_cannot_be_read_is_a_value_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError):
        read_json(tmp_path / "x")


# ---- its readers in core ----


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_configuration_is_a_file(kind: str, tmp_path: Path) -> None:
    make, words = ENDLESS[kind]
    make(tmp_path / "config.yaml")
    with pytest.raises(UsageError, match=words) as caught:
        guarded(lambda: read_yaml(tmp_path / "config.yaml"))
    assert f"{tmp_path}/config.yaml cannot be read" in caught.value.what
    with pytest.raises(DataError, match=words) as found:
        guarded(lambda: Run.open(tmp_path, "tokenizer"))
    assert f"{tmp_path}/config.yaml cannot be read" in str(found.value)


BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}, *a{n}, *a{n}]\n" for n in range(20))
"""4^20 numbers."""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases"),
        ("[" * 50_000, "RecursionError"),
        ("a: " + 5000 * "1", "4300 digits"),
        ("a: 2024-99-99", "month"),
    ],
)
def test_yaml_that_stands_for_too_much_or_nothing(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        guarded(lambda: read_yaml(tmp_path / "c.yaml"))


def test_written_yaml_has_no_aliases(tmp_path: Path) -> None:
    shared = [1, 2]
    write_yaml(tmp_path / "c.yaml", {"a": shared, "b": shared})
    assert read_yaml(tmp_path / "c.yaml") == {"a": [1, 2], "b": [1, 2]}


def test_a_configuration_of_gigabytes(tmp_path: Path) -> None:
    sparse(tmp_path / "c.yaml", 8 << 30)
    with pytest.raises(UsageError, match=f"{8 << 30:,} bytes, more than the limit of {YAML_LIMIT:,}"):
        read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["x.safetensors", "x.json", "manifest.json"])
@pytest.mark.parametrize("kind", [*ENDLESS, "gigabytes"])
def test_a_checkpoint_is_made_of_files(name: str, kind: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoints").path
    (path / name).unlink()
    make, words = ENDLESS.get(kind, (lambda file: sparse(file, 1 << 40), "more than the limit of"))
    make(path / name)
    readers: list[Callable[[], object]] = [lambda: checkpoints.verify(path)]
    if name == "x.json":
        readers.append(lambda: read_as(Nothing, path / name, "train again"))
    elif name == "x.safetensors":
        readers.append(lambda: Checkpoint(path, 1).tensors(name))
    reasons = list[str]()
    for read in readers:
        with pytest.raises(DataError) as caught:
            guarded(read)
        reasons.append(caught.value.why)
    assert words in reasons[-1]  # a checkpoint that is verified may differ in size before


def test_a_pipe_that_the_manifest_calls_empty_is_not_hashed(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoints").path
    (path / "x.json").write_bytes(b"")
    seal(path)
    (path / "x.json").unlink()
    os.mkfifo(path / "x.json")
    with pytest.raises(DataError, match="a FIFO"):
        guarded(lambda: checkpoints.verify(path))


@pytest.mark.parametrize("kind", [*ENDLESS, "gigabytes"])
def test_the_files_of_a_run(kind: str, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "tokenizer", {})
    make, words = ENDLESS.get(kind, (lambda file: sparse(file, 1 << 40), "more than the limit of"))
    make(run.path / "metrics.jsonl")
    with pytest.raises(DataError, match=words):
        guarded(lambda: run.forget_after(3))
    (run.path / "env.json").unlink()
    if "directory" not in kind:
        make(run.path / "env.json")
        guarded(lambda: run.note({"batch": 4}))
        assert json.loads((run.path / "env.json").read_text())["starts"] == [{"batch": 4}]


@pytest.mark.parametrize("kind", [kind for kind in ENDLESS if "device" not in kind])
def test_what_is_appended_to_never_waits(kind: str, tmp_path: Path) -> None:
    """A pipe that nobody reads would block its writer too."""
    run = Run.create(tmp_path / "run", "tokenizer", {})
    for name, write in (
        ("log.txt", lambda: run.say("a line")),
        ("metrics.jsonl", lambda: run.log({"step": 1})),
        (".lock", lambda: lock(run.path).__enter__()),
    ):
        (run.path / name).unlink(missing_ok=True)
        ENDLESS[kind][0](run.path / name)
        expected = UsageError if "directory" in kind else DiskError
        with pytest.raises(expected, match=f"{run.path}.* cannot be written"):
            guarded(write)
