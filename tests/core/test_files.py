"""What `replacing` makes is whole or absent, a file or a directory, whatever fails or is killed on the way."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nobody import NOBODY

from midway.gen.core import files
from midway.gen.core.errors import UsageError
from midway.gen.core.files import clear_all_temporaries, clear_temporaries, replacing, write_atomically


def make_file(path: Path, text: str) -> None:
    path.write_text(text)


def make_directory(path: Path, text: str) -> None:
    (path / "inner" / "deep").mkdir(parents=True)
    (path / "a").write_text(text)
    (path / "inner" / "deep" / "b").write_text(2 * text)
    (path / "a").chmod(0o600)  # as safetensors' are


MAKERS = {"file": make_file, "directory": make_directory}
Maker = Callable[[Path, str], None]
pytestmark = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def tree(root: Path) -> dict[str, bytes | None]:
    """Every file and directory below `root`, hidden ones too."""
    return {p.relative_to(root).as_posix(): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


def put(path: Path, make: Maker, text: str) -> None:
    with replacing(path) as temporary:
        make(temporary, text)


def test_the_new_replaces_the_old_and_leaves_nothing_else(make: Maker, tmp_path: Path) -> None:
    make(tmp_path / "expected", "new")
    put(tmp_path / "folder" / "x", make, "old")
    if make is make_directory:
        (tmp_path / "folder" / "x" / "extra").touch()
    put(tmp_path / "folder" / "x", make, "new")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["x"]
    assert tree(tmp_path / "folder" / "x") == tree(tmp_path / "expected")
    for path in (tmp_path / "folder" / "x").rglob("*"):
        assert path.is_dir() or path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o666


def test_everything_is_on_the_disk_before_it_has_its_name(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash of the machine can leave no name without its content."""
    order, really_sync, really_replace = list[str](), files.sync, Path.replace

    def sync(path: Path) -> None:
        order.append(path.name.split(".")[1] if path.suffix == ".tmp" else path.name)
        really_sync(path)

    def replace(self: Path, target: Path) -> Path:
        order.append(f"replace {target.name}")
        return really_replace(self, target)

    monkeypatch.setattr(files, "sync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    put(tmp_path / "x", make, "new")
    inner = ["a", "b", "deep", "inner"] if make is make_directory else []
    assert sorted(order[: len(inner)]) == inner
    assert order[len(inner) :] == ["x", "replace x", tmp_path.name]


@pytest.mark.parametrize("point", ["the writer", "sync", "replace"])
@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_older_one_or_nothing(
    make: Maker, point: str, older: bool, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error(28, "No space left on device")

    if older:
        put(tmp_path / "x", make, "old")
    before = tree(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(error), replacing(tmp_path / "x") as temporary:
        make(temporary, "new")
        if point == "the writer":
            fail()
        patched.setattr(*(files, "sync") if point == "sync" else (Path, "replace"), fail)
    assert tree(tmp_path) == before
    put(tmp_path / "x", make, "new")


def test_what_a_killed_process_left_is_removed(make: Maker, tmp_path: Path) -> None:
    put(tmp_path / "x", make, "old")
    before = tree(tmp_path)
    for name in (f".x.{NOBODY}.tmp", f".other.{NOBODY}.tmp", f".x.{NOBODY}.old"):
        make(tmp_path / name, "half")
    clear_temporaries(tmp_path)
    assert tree(tmp_path) == before, "a whole one is never replaced by what it replaced"
    (tmp_path / "x").rename(tmp_path / f".x.{NOBODY}.old")  # killed between the two renames
    clear_temporaries(tmp_path)
    assert tree(tmp_path) == before


def is_zombie(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_somebody_may_be_writing_stays(make: Maker, tmp_path: Path) -> None:
    """A process that runs, one of another machine, and what has other names; the file it belongs to may be replaced."""
    alive, elsewhere = os.getppid(), f"{0:08x}-{NOBODY}"
    names = [f".x.{alive}.tmp", f".x.{files.MACHINE}-{alive}.old", f".y.{elsewhere}.tmp", ".x.tmp", ".x.y.tmp", ".rc"]
    for name in names:
        make(tmp_path / name, "somebody's")
    before = tree(tmp_path)
    clear_temporaries(tmp_path)
    assert tree(tmp_path) == before
    put(tmp_path / "x", make, "new")
    assert {name: data for name, data in tree(tmp_path).items() if not name.startswith("x")} == before


def test_what_nobody_writes_is_removed(make: Maker, tmp_path: Path) -> None:
    """Another machine's after a day, a zombie's, and those of numbers that no process can have."""
    killed = subprocess.Popen(["sleep", "60"])
    killed.kill()
    while not is_zombie(killed.pid):
        time.sleep(0.001)
    for owner in (f"{0:08x}-{NOBODY}", killed.pid, f"{files.MACHINE}-{NOBODY}", 10**30):
        make(tmp_path / f".x.{owner}.tmp", "half")
    for path in (tmp_path / f".x.{0:08x}-{NOBODY}.tmp", *(tmp_path / f".x.{0:08x}-{NOBODY}.tmp").rglob("*")):
        os.utime(path, (0, 0))
    clear_temporaries(tmp_path)
    killed.wait()
    assert tree(tmp_path) == {}


def test_writing_again_removes_what_was_left_of_the_same(make: Maker, tmp_path: Path) -> None:
    for name in ("x", "other", "x.x"):
        make(tmp_path / f".{name}.{files.MACHINE}-{NOBODY}.tmp", "half")
    put(tmp_path / "x", make, "new")
    assert sorted(p.name.split(f".{files.MACHINE}")[0] for p in tmp_path.iterdir()) == [".other", ".x.x", "x"]


def test_folders_in_a_folder_are_cleared_too_but_not_behind_links(make: Maker, tmp_path: Path) -> None:
    for folder in (tmp_path / "run" / "a" / "b", tmp_path / "else"):
        folder.mkdir(parents=True)
        make(folder / f".x.{NOBODY}.tmp", "half")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "else")
    clear_all_temporaries(tmp_path / "run")
    assert [p.name for p in tmp_path.rglob(".x*")] == [f".x.{NOBODY}.tmp"]
    assert list(tmp_path.glob("else/.x*"))


def test_a_name_that_something_else_has_is_a_usage_error_that_names_the_file(make: Maker, tmp_path: Path) -> None:
    make(tmp_path / "x", "no folder to write into")
    place = tmp_path / "x" / "inner" if make is make_file else tmp_path / "x"
    with pytest.raises(UsageError, match=f"cannot write {place}") as caught:
        write_atomically(place, b"text")
    assert caught.value.exit_code == 2
    assert not list(tmp_path.rglob(".*"))
