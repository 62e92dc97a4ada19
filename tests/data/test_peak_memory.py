"""Peak memory does not grow with the number of images: of a build, and of a training step on a built set."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "peak_memory.py"


def peaks(folder: Path, count: int) -> dict[str, int]:
    """KiB, of a process of its own."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(count)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(tmp_path: Path, few: int, many: int) -> None:
    """By at most 5 %; in memory the images of the larger set alone would be `many` * 0.19 MiB, half of it more in a split."""
    small, large = peaks(tmp_path / "few", few), peaks(tmp_path / "many", many)
    assert (many - few) * 192 > 0.3 * small["step"]  # a set in memory would be seen
    for what in ("build", "step"):
        assert large[what] <= 1.05 * small[what], (what, small, large)


@pytest.mark.skipif(sys.platform == "win32", reason="needs getrusage")
@pytest.mark.slow
def test_peak_memory_of_2000_images_is_that_of_200(tmp_path: Path) -> None:
    check(tmp_path, 200, 2000)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs getrusage")
def test_peak_memory_of_20000_images_is_that_of_2000(tmp_path: Path) -> None:
    """4 GB on the disk."""
    check(tmp_path, 2000, 20_000)
