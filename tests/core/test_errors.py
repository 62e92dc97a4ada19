"""Every failure is three lines with a remedy that fits it, and an exit code."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipelines import Script

from midway.gen.core.errors import DataError, DiskError, MidwayError, UsageError, raising
from midway.gen.core.files import write_atomically
from midway.gen.flags.cli import run

USAGE, DATA, DISK = 2, 3, 5


def system_error(code: int) -> OSError:
    return OSError(code, os.strerror(code), "a/file")


@pytest.mark.parametrize(
    ("code", "exit_code", "word"),
    [
        (errno.EACCES, DISK, "permissions"),
        (errno.EPERM, DISK, "permissions"),
        (errno.EROFS, DISK, "read-only"),
        (errno.ENOSPC, DISK, "free disk space"),
        (errno.EDQUOT, DISK, "quota"),
        (errno.EIO, DISK, "check the disk"),
        (errno.ENAMETOOLONG, USAGE, "shorter"),
        (errno.EISDIR, USAGE, "folder"),
        (errno.ENOTDIR, USAGE, "folder"),
        (errno.EEXIST, USAGE, "no folder"),
        (errno.ELOOP, USAGE, "link"),
        (errno.ENOENT, DATA, "is there"),
        (errno.EMFILE, DATA, "ulimit"),
        (errno.ENOMEM, 1, "--batch-size"),
    ],
)
def test_an_error_of_the_system_has_its_own_remedy(
    code: int, exit_code: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(arguments: list[str]) -> None:
        raise system_error(code)

    assert run(command, []) == exit_code
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line[:7] for line in lines] == ["error: ", "  why: ", "  fix: "] and word in lines[2]


@pytest.mark.parametrize("kind", [DiskError, DataError])
def test_a_remedy_that_fits_takes_the_place_of_the_usual_one(kind: type[MidwayError]) -> None:
    with pytest.raises(kind, match="change the permissions"), raising(kind, "x", "free space", OSError):
        raise system_error(errno.EACCES)
    with pytest.raises(kind, match="fix: train again"), raising(kind, "x", "train again", OSError):
        raise system_error(errno.ENOENT)
    with pytest.raises(UsageError if kind is DiskError else kind, match="shorter"), raising(kind, "x", "y", OSError):
        raise system_error(errno.ENAMETOOLONG)
    with pytest.raises(kind, match="then resume" if kind is DiskError else "another disk"):  # noqa: SIM117
        with raising(kind, "x", "free space, then resume", OSError):
            raise system_error(errno.ENOSPC)


def too_large() -> object:
    return torch.empty(2**50, dtype=torch.uint8)


def overflowing() -> object:
    return torch.empty(2**40, 2**40)


def of_python() -> object:
    raise MemoryError("1 TB")


@pytest.mark.parametrize("fill", [too_large, overflowing, of_python])
def test_memory_that_runs_out_is_no_traceback(fill: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda arguments: fill(), []) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and "memory ran out" in lines[0] and "--batch-size" in lines[2]


def test_an_unexpected_error_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def command(arguments: list[str]) -> None:
        raise ZeroDivisionError("by\nzero")

    assert run(command, []) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and "ZeroDivisionError: by zero" in lines[1]
    stored = Path(lines[2].split()[-1])
    assert "raise ZeroDivisionError" in stored.read_text()
    stored.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="/sys is Linux's, and lets not even root make a folder")
@pytest.mark.parametrize("line", ["train_tokenizer --steps 1 --out /sys/midway", "data check digits --out /sys/midway"])
def test_a_place_that_is_not_ours(line: str, script: Script) -> None:
    done = script(*line.split())
    assert done.code == DISK and len(done.err.strip().splitlines()) == 3
    assert any(word in done.err for word in ("permissions", "read-only"))


def test_a_folder_where_a_file_belongs(tmp_path: Path) -> None:
    (tmp_path / "a.json" / "b").mkdir(parents=True)
    with pytest.raises(UsageError, match="this is a folder"):
        write_atomically(tmp_path / "a.json", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
