"""A saved solver is a regular file of an honest size; nothing else is opened."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from endless import ENDLESS, guarded

from midway.samplers.artefacts import FILE_LIMIT
from midway.samplers.grids import uniform
from midway.samplers.interop import read_table
from midway.samplers.learned_solver import LearnedSolver
from midway.samplers.schedule import VP
from midway.samplers.solvers import ddim
from midway.samplers.table import Table

READERS: dict[str, Callable[[Path], object]] = {
    "table": Table.load,
    "learned": lambda path: LearnedSolver.load(path, VP()),
    "either": lambda path: read_table(path, VP()),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ENDLESS)
def test_what_is_no_regular_file_is_never_opened(reader: str, kind: str, tmp_path: Path) -> None:
    ENDLESS[kind][0](tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors is not a regular file"):
        guarded(lambda: READERS[reader](tmp_path / "x.safetensors"))


@pytest.mark.parametrize("reader", READERS)
def test_terabytes_are_no_solver(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.touch()
    os.truncate(path, 1 << 42)
    with pytest.raises(ValueError, match=f"{1 << 42:,} bytes, more than the limit of {FILE_LIMIT:,}"):
        READERS[reader](path)


def test_a_link_to_a_solver_is_read(tmp_path: Path) -> None:
    table = ddim(VP(), uniform(VP(), steps=3))
    table.save(tmp_path / "x.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "x.safetensors")
    assert Table.load(tmp_path / "link").hash == table.hash
