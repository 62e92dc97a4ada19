"""A sweep deletes and tidies under its lock, its own files only, and is disturbed by no other command."""

import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from multiprocess import together
from nobody import NOBODY
from pipelines import Pipeline, Script
from sweeps import sweep_in_parts, sweep_task

from midway.gen.commands import evaluate
from midway.gen.core.errors import UsageError
from midway.gen.core.files import MACHINE
from midway.gen.core.locks import lock
from midway.gen.sweep.store import CellStore, Part

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


@pytest.fixture(scope="module")
def done(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a sweep."""
    out = tmp_path_factory.mktemp("done")
    evaluate.run(sweep_task(pipeline, out))
    return out


@pytest.fixture
def out(done: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(done, tmp_path / "out"))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_running_sweep_loses_nothing_to_other_commands(pipeline: Pipeline, script: Script, tmp_path: Path) -> None:
    """Another sweep of the same folder, one that would forget, and a training that would delete the run around it."""
    model = Path(shutil.copytree(pipeline.model, tmp_path / "model"))
    cells, gate = model / "report" / "cells", tmp_path / "gate"
    cells.mkdir(parents=True)
    (cells / "0123456789abcdef.json").touch()
    process = multiprocessing.get_context("forkserver").Process(
        target=sweep_in_parts, args=(0, replace(sweep_task(pipeline, model), model=model, out=None), 0.0, gate)
    )
    process.start()
    try:
        patience = time.monotonic() + 120
        while not list(cells.glob("../reference/*.safetensors")):
            assert process.is_alive() and time.monotonic() < patience
            time.sleep(0.01)
        before = tree(model)
        flags = f"--model {model} --features {pipeline.features} --solvers ddim --nfe 4 --grids uniform --n 20 --exact-nfe 0"
        for call in (
            f"evaluate {flags} --fresh",
            f"evaluate {flags}",
            f"train_latent --config {model}/config.yaml --out {model} --overwrite",
        ):
            ended = script(*call.split())
            assert ended.code == 2 and "report/cells is being" in ended.err and "by another process" in ended.err
        assert tree(model) == before and process.is_alive()
    finally:
        gate.touch()
    process.join()
    assert process.exitcode == 0 and (model / "report/results.csv").exists()


def test_a_sweep_is_locked_until_its_report_is_written(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, met = evaluate.write_report, list[bool]()

    def write_report(*arguments: object) -> None:
        with pytest.raises(UsageError, match="is being written"), CellStore(tmp_path / "cells").claimed(fresh=True):
            pass
        met.append(True)
        write(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(evaluate, "write_report", write_report)
    evaluate.run(sweep_task(pipeline, tmp_path))
    assert met == [True]


def test_forgetting_removes_cells_alone_and_keeps_the_lock(out: Path) -> None:
    cells = out / "cells"
    mine = {".lock", "notes.txt", "0123456789abcdef.txt", "mine.json"}
    for name in mine - {".lock"}:
        (cells / name).write_text("mine")
    (cells / "0123456789abcdef.damaged").touch()
    (cells / "0123456789abcdef.parts").symlink_to(out)
    with CellStore(cells).claimed(fresh=True):
        assert {path.name for path in cells.iterdir()} == mine
        with pytest.raises(UsageError, match="being written"), lock(cells, "written"):
            pass
    assert (out / "results.csv").exists()


@pytest.mark.parametrize("link", ["out", "cells"])
def test_links_are_not_followed_to_forget(link: str, out: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    place = out if link == "out" else out / "cells"
    place.rename(there)
    place.symlink_to(there)
    before = tree(there)
    with pytest.raises(UsageError, match="is a link"), CellStore(out / "cells").claimed(fresh=True):
        pass
    assert tree(there) == before
    with CellStore(out / "cells").claimed():
        assert tree(there) == before, "without --fresh a link is as good as a folder"


def test_of_several_processes_one_forgets_and_the_others_wait(pipeline: Pipeline, out: Path) -> None:
    before = tree(out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("cells/*.json")}
    together(sweep_in_parts, 2, sweep_task(pipeline, out, fresh=True))
    assert times and all(path.stat().st_mtime_ns > time for path, time in times.items())
    assert [name for name in before if name.endswith(".json")] == [n for n in tree(out) if n.endswith(".json")]


def test_the_next_start_tidies_the_report(pipeline: Pipeline, out: Path) -> None:
    """Half-written files and the parts of a finished cell; not what a running process writes, nor parts still needed."""
    store, left = CellStore(out / "cells"), list[Path]()
    finished = min(out.glob("cells/*.json"))
    unfinished = store.cell({"a": 1})
    for cell in (finished.with_suffix(".parts"), out / f"cells/{unfinished.id}.parts"):
        cell.mkdir(exist_ok=True)
    unfinished.write(0, Part({}, {}))
    for folder in ("", "reference", "cells", f"cells/{unfinished.id}.parts"):
        left.append(out / folder / f".x.{MACHINE}-{NOBODY}.tmp")
        left[-1].write_text("half")
    alive = out / "reference" / f".y.{MACHINE}-1.tmp"
    alive.touch()
    evaluate.run(sweep_task(pipeline, out))
    assert not [path for path in (*left, finished.with_suffix(".parts")) if path.exists()]
    assert alive.exists() and unfinished.part(0) is not None


def test_a_folder_of_exports_is_tidied_of_archives(tmp_path: Path) -> None:
    for name in ("ddim-nfe4.npz", "heun-nfe4.zip", "notes"):
        (tmp_path / f".{name}.{NOBODY}.tmp").touch()
    (tmp_path / f".ddim-nfe6.npz.{MACHINE}-1.tmp").touch()
    evaluate.make_folders({"--export-npz": tmp_path, "--save-images": None})
    assert {path.name for path in tmp_path.iterdir()} == {
        f".notes.{NOBODY}.tmp",
        f".ddim-nfe6.npz.{MACHINE}-1.tmp",
    }


def test_the_parts_of_a_damaged_cell_stay(out: Path) -> None:
    finished = min(out.glob("cells/*.json"))
    parts = finished.with_suffix(".parts")
    parts.mkdir()
    finished.write_text(finished.read_text()[:-40])
    with CellStore(out / "cells").claimed():
        assert parts.exists()
