"""Passes over all images of a stored set take the memory of a part of them, however many there are."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "memory_of_passes.py"
PART = 100.0
"""MB: two reads of 256 images of 256x256 and 3 bytes, of which one may be held while the next is made; 1,800 images are 354."""


def peaks(folder: Path, name: str, *counts: int) -> list[float]:
    """MB after a pass over so many images, one pass after another in a process of its own."""
    command = [sys.executable, str(SCRIPT), str(folder), name, *map(str, counts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line[0].isdigit()]


@pytest.mark.parametrize("name", ["encoding", pytest.param("reference", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_images(name: str, tmp_path: Path) -> None:
    """2,000 images of 256x256 are 393 MB, 200 of them 39 MB."""
    few, many = peaks(tmp_path, name, 200, 2000)
    assert many <= few + max(0.05 * few, PART)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoding", "reference", "statistics"])
def test_memory_does_not_grow_from_2000_to_20000_images(name: str, tmp_path: Path) -> None:
    """Of reconstructions, which take longest, from 2000 to 4000."""
    few, many = peaks(tmp_path, name, *((2000, 4000) if name == "statistics" else (2000, 20_000)))
    assert many <= 1.05 * few
