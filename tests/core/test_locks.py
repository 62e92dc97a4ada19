"""One writer of a folder at a time, also while the folder is emptied or made anew; nothing behind a link is removed."""

import shutil
from pathlib import Path
from typing import IO

import pytest

from midway.gen.core import locks
from midway.gen.core.errors import DiskError, MidwayError, UsageError
from midway.gen.core.locks import LOCK, check_no_link, claimed, empty, lock, locked_inside, made


def is_locked(folder: Path) -> bool:
    """Whether a process that tries cannot lock it; two openings in one process are as good as two processes."""
    try:
        with lock(folder):
            return False
    except UsageError as error:
        assert "is being trained by another process" in str(error)
        return True


def test_one_holds_the_lock_until_its_block_ends(tmp_path: Path) -> None:
    with lock(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    with pytest.raises(ZeroDivisionError), lock(tmp_path):
        print(1 / 0)
    assert not is_locked(tmp_path)
    with pytest.raises(DiskError, match="cannot be written"), lock(tmp_path / "absent"):
        pass


def test_emptying_keeps_the_lock_and_what_is_behind_links(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine / "deep" / "er", other):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    (mine / "keep").write_text("x")
    for place in ("folder", "deep/folder"):
        (mine / place).symlink_to(other)
    (mine / "file").symlink_to(other / "file")
    (mine / "dangling").symlink_to(tmp_path / "absent")
    with lock(mine):
        empty(mine, "keep")
        assert is_locked(mine)
    assert sorted(path.name for path in mine.iterdir()) == [LOCK, "keep"]
    assert (other / "file").read_text() == "x"


def test_the_lock_of_a_folder_that_was_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder removed the folder, and it was made again, after the file was opened and before it was locked."""
    folder, take = tmp_path / "folder", locks._take
    folder.mkdir()

    def late(file: IO[str]) -> None:
        monkeypatch.setattr(locks, "_take", take)
        shutil.rmtree(folder)
        folder.mkdir()
        take(file)

    monkeypatch.setattr(locks, "_take", late)
    with lock(folder):
        assert is_locked(folder)


def test_folders_inside_are_locked_or_raise(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder in (tmp_path, inner):
        (folder / LOCK).touch()
    with lock(tmp_path), locked_inside(tmp_path):
        assert is_locked(inner)
    with lock(inner), pytest.raises(UsageError, match=f"{inner} is being used by another"), locked_inside(tmp_path):
        pass


def test_only_new_and_empty_folders_are_unmade(tmp_path: Path) -> None:
    for name in ("a", "a/b/c", "d/e"):
        with pytest.raises(KeyboardInterrupt), made(tmp_path / name):
            assert (tmp_path / name).is_dir()
            if name == "d/e":
                (tmp_path / "d" / "file").touch()
            raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["d", "file"]
    with pytest.raises(MidwayError, match="name too long"), made(tmp_path / "d" / "new" / ("n" * 300)):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["d", "file"]
    with made(tmp_path / "d"):
        pass


def test_a_claimed_folder_is_one_writer_s_and_gone_if_nothing_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with pytest.raises(KeyboardInterrupt), claimed(folder):
        with pytest.raises(UsageError, match="is being written by another process"), claimed(folder):
            raise AssertionError("two writers")
        raise KeyboardInterrupt
    assert not (tmp_path / "a").exists()
    with pytest.raises(KeyboardInterrupt), claimed(folder):
        (folder / "file").touch()
        raise KeyboardInterrupt
    assert {path.name for path in folder.iterdir()} == {"file", LOCK}
    with claimed(folder):
        pass


def test_a_link_raises_whether_or_not_it_leads_anywhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for name in ("link", "dangling"):
        with pytest.raises(UsageError, match="is a link"):
            check_no_link(tmp_path / name)
    check_no_link(tmp_path)
    check_no_link(tmp_path / "link" / "new")
