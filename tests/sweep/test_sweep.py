"""The sweep's store: nothing is measured twice, nothing is lost, and no number depends on kills, processes or batches."""

import csv
import json
import multiprocessing
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measurements import measurement
from multiprocess import together
from pipelines import Pipeline, Script
from safetensors.torch import save_file
from sweeps import measured, sweep_in_parts, sweep_task, watch_samples
from torch import Tensor

from midway.gen.baselines.registry import load_trained_baseline
from midway.gen.commands import evaluate
from midway.gen.core.errors import DataError
from midway.gen.core.files import read_tensors, state_hash
from midway.gen.core.processes import ProcessInfo
from midway.gen.core.runs import Run
from midway.gen.data.images import ImageData, to_uint8
from midway.gen.data.splits import load_splits
from midway.gen.evaluation.comparing import check_comparable, critical_t, shown
from midway.gen.evaluation.records import Measurement
from midway.gen.evaluation.sources import SampledBatch
from midway.gen.features import reference as references
from midway.gen.features.classifier import FeatureConfig, FeatureNetwork, load_features
from midway.gen.features.reference import make_reference
from midway.gen.metrics.frechet import frechet_distance, frechet_distance_of_features
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.report.sweep import markdown_tables, terminal_text
from midway.gen.report.sweep_page import report_html
from midway.gen.report.sweep_tables import difference_table, distance_table
from midway.gen.report.table import Entry, ReportContext
from midway.gen.sweep import measure, store
from midway.gen.sweep.run import Sweep
from midway.gen.sweep.store import Cell, CellStore, Part, Seeds

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
TIMES = ("seconds", "seconds_std", "seconds_blocks", "decode_seconds", "feature_seconds", "timing")


def task(pipeline: Pipeline, out: Path, **changes: Any) -> evaluate.EvaluateTask:
    return sweep_task(pipeline, out, **{"solvers": "ddim,euler", **changes})


def table(out: Path) -> list[dict[str, str]]:
    """results.csv without times."""
    with (out / "results.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 8 seeds: 3 a block of 20."""
    monkeypatch.setattr(store, "PART", 8)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First seeds of everything that solvers sample."""
    found: list[int] = []
    watch_samples(monkeypatch, lambda seeds, batch: found.append(int(seeds[0])))
    return found


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing disturbed, in parts of 8."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "PART", 8)
        evaluate.run(task(pipeline, out))
    return out


# ---- parts ----


def test_parts_cover_every_seed_once_and_no_part_spans_two_blocks(small_parts: None) -> None:
    seeds = Seeds(100, 20, 3)
    assert torch.cat([part for _, part in seeds.parts]).tolist() == seeds.all.tolist() == list(range(100, 160))
    assert all(set(((part - 100) // 20).tolist()) == {block} for block, part in seeds.parts)
    assert max(len(part) for _, part in seeds.parts) == 8


# ---- killed and resumed ----


class Killed(BaseException):
    """Nothing in the program catches it."""


@pytest.mark.parametrize(
    ("seed", "overlap"),
    [
        pytest.param(0, False, marks=pytest.mark.slow),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
        (3, True),
    ],
)
def test_a_sweep_that_was_killed_again_and_again_gives_the_same_table(
    seed: int,
    overlap: bool,
    pipeline: Pipeline,
    whole: Path,
    tmp_path: Path,
    small_parts: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(seed)
    real = store.write_atomically
    writes = {"left": 0, "made": 0}

    def write(path: Path, data: bytes) -> None:
        if path.parent.name != "cells" and path.parent.suffix != ".parts":
            return real(path, data)
        writes["left"] -= 1
        if writes["left"] < 0:
            raise Killed
        writes["made"] += 1
        return real(path, data)

    monkeypatch.setattr(store, "write_atomically", write)
    kills = 0
    while True:
        writes["left"] = int(generator.integers(1, 6))
        try:
            evaluate.run(task(pipeline, tmp_path, overlap=overlap))
            break
        except Killed:
            kills += 1
    assert kills >= 2
    assert table(tmp_path) == table(whole)
    parts, cells = 3 * 2 * 4 + 2, 3  # of two solvers, the exact solution and its row, in two blocks; and of the choice
    assert writes["made"] <= parts + (2 + 2) * cells + kills, "only what was in work when it was killed is made again"


def test_a_sweep_of_two_processes_is_ended_by_one(
    pipeline: Pipeline,
    whole: Path,
    tmp_path: Path,
    small_parts: None,
    drawn: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second of two processes made its parts of the first cell, the exact row; the first was killed at its start."""
    real, cut = measure._sample, pytest.MonkeyPatch()

    def second(source: Any, cell: Any, context: Any, fine: Any) -> None:
        real(source, cell, replace(context, process=ProcessInfo(1, 2)), fine)
        raise Killed

    cut.setattr(measure, "_sample", second)
    with pytest.raises(Killed):
        evaluate.run(task(pipeline, tmp_path))
    cut.undo()
    assert drawn == [40, 40, 0, 8, 16, 20, 28, 36], (
        "of the choice, and of the exact solution, which its row draws again from"
    )
    drawn.clear()
    evaluate.run(task(pipeline, tmp_path))
    assert table(tmp_path) == table(whole)
    assert drawn == 2 * [0, 8, 16, 20, 28, 36], "both solvers"


def test_kill_9_costs_the_part_in_work(
    pipeline: Pipeline, whole: Path, tmp_path: Path, small_parts: None, drawn: list[int]
) -> None:
    out = tmp_path / "out"
    process = multiprocessing.get_context("forkserver").Process(
        target=sweep_in_parts, args=(0, task(pipeline, out), 0.1)
    )
    process.start()
    patience = time.monotonic() + 120
    while len(list(out.glob("cells/*.parts/*.safetensors"))) < 8 and time.monotonic() < patience:
        time.sleep(0.002)
    process.kill()
    process.join()
    written = list(out.glob("cells/*.parts/*.safetensors"))
    assert written and not (out / "results.csv").exists(), "it was killed among its parts"
    evaluate.run(task(pipeline, out))
    (row,) = (row["record"] for row in table(whole) if row["solver"] == "exact")
    sampled = [path for path in written if path.parent.stem != row and int(path.stem.rpartition("-")[2]) < 6]
    assert len(drawn) == 3 * 6 + 2 - len(sampled), "of two solvers, the exact solution, and two of the choice"
    assert table(out) == table(whole)
    assert not list(out.glob("cells/*.parts/part-*.tmp"))


def test_a_second_run_samples_nothing_and_more_solvers_only_themselves(
    pipeline: Pipeline, whole: Path, small_parts: None, drawn: list[int]
) -> None:
    before = table(whole)
    evaluate.run(task(pipeline, whole))
    assert drawn == [] and table(whole) == before
    evaluate.run(task(pipeline, whole, solvers="ddim,euler,dpmpp2m"))
    assert sorted(drawn) == [0, 8, 16, 20, 28, 36], "the new cell alone"
    evaluate.run(task(pipeline, whole))
    assert table(whole) == before


@pytest.fixture(scope="module")
def one_solver(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    evaluate.run(sweep_task(pipeline, out))
    return out


def test_fresh_forgets(one_solver: Path, pipeline: Pipeline, tmp_path: Path, drawn: list[int]) -> None:
    out = Path(shutil.copytree(one_solver, tmp_path / "out"))
    evaluate.run(sweep_task(pipeline, out))
    assert drawn == []
    evaluate.run(sweep_task(pipeline, out, fresh=True))
    assert drawn == [40, 40, 0, 20, 0, 20], "the choice, the exact solution, ddim"


# ---- damage ----


@pytest.mark.parametrize("damage", ["flipped", "halved", "empty"])
def test_a_damaged_cell_is_kept_aside_and_measured_again(
    damage: str, one_solver: Path, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = sweep_task(pipeline, Path(shutil.copytree(one_solver, tmp_path / "out")))
    path = min((tmp_path / "out").glob("cells/*.json"))
    text = path.read_text()
    digit = text.index("distances") + 20
    flipped = text[:digit] + str((int(text[digit]) + 1) % 10 if text[digit].isdigit() else 1) + text[digit + 1 :]
    path.write_text({"flipped": flipped, "halved": text[: len(text) // 2], "empty": ""}[damage])
    evaluate.run(asked)
    assert "damaged" in capsys.readouterr().out
    assert list((tmp_path / "out").glob("cells/*.damaged"))
    assert table(tmp_path / "out") == table(one_solver)


def test_a_damaged_part_counts_as_not_there(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    cell = store.cell({"a": 1})
    cell.write(0, Part({"x": torch.arange(4.0)}, {"nfe": 1}))
    assert cell.part(0) is not None and len(cell.parts([0])) == 1
    (path,) = tmp_path.glob("*.parts/*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert cell.part(0) is None
    path.write_bytes(bytes(data[:-5]))
    assert cell.part(0) is None
    assert store.cell({"a": 2}).part(0) is None, "another cell's parts are not taken"
    with pytest.raises(RuntimeError, match="gone"):
        cell.parts([0])


def other_costs(tensors: dict[str, Tensor], costs: dict[str, Any]) -> None:
    name = min(costs)
    costs[f"other {name}"] = costs.pop(name)


def other_kind(tensors: dict[str, Tensor], costs: dict[str, Any]) -> None:
    name = "nfe" if "nfe" in costs else "figure"
    costs[name] = str(costs[name])


def fewer_rows(tensors: dict[str, Tensor], costs: dict[str, Any]) -> None:
    tensors |= {name: value[:-1].clone() for name, value in tensors.items() if len(value)}


def other_names(tensors: dict[str, Tensor], costs: dict[str, Any]) -> None:
    for name in {"features", "latents", "errors"} & tensors.keys():
        tensors[name.upper()] = tensors.pop(name)


@pytest.mark.parametrize("change", [other_costs, other_kind, fewer_rows, other_names])
def test_parts_that_hold_something_else_are_named_and_made_again(
    change: Callable[[dict[str, Tensor], dict[str, Any]], None],
    pipeline: Pipeline,
    whole: Path,
    tmp_path: Path,
    small_parts: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of samples, of blocks and of the fine solution, though their hashes fit."""
    with monkeypatch.context() as patch:
        patch.setattr(Cell, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(task(pipeline, tmp_path / "out"))
    files = sorted((tmp_path / "out/cells").glob("*.parts/part-*"))
    assert len(files) == 2 * 6 + 2 + 2, "of the exact solution and its row, the figures of two blocks, and the choice"
    unchanged = list[Path]()  # figures of blocks of the exact row have no errors
    for file in files:
        tensors, header = read_tensors(file)
        costs = json.loads(header["costs"])
        before = {name: value.shape for name, value in tensors.items()}
        change(tensors, costs)
        text = json.dumps(costs)
        after = {name: value.shape for name, value in tensors.items() if name != "shown"}
        if text == header["costs"] and after.items() <= before.items():
            unchanged.append(file)
        save_file(tensors, file, {"costs": text, "hash": state_hash(text, tensors)})
    capsys.readouterr()
    evaluate.run(task(pipeline, tmp_path / "out"))
    out = capsys.readouterr().out
    assert [file for file in files if f"{file.parent.name}/{file.name} is damaged" not in out] == unchanged
    assert table(tmp_path / "out") == table(whole)


def test_an_id_is_a_function_of_the_identity_alone() -> None:
    ids = [
        Cell(Path(), identity).id
        for identity in ({"a": 1, "b": [2, None]}, {"b": [2, None], "a": 1}, {"a": 1, "b": [2, 0]})
    ]
    assert ids[0] == ids[1] != ids[2]


# ---- processes, batches, overlap ----


def test_two_processes_give_the_table_of_one(pipeline: Pipeline, whole: Path, tmp_path: Path) -> None:
    """Three parts a block, which two processes share unequally."""
    together(sweep_in_parts, 2, task(pipeline, tmp_path / "out"))
    assert table(tmp_path / "out") == table(whole)
    texts = [(tmp_path / f"out.{rank}").read_text() for rank in range(2)]
    assert "".join(texts).count("report: ") == 1, "one process reports"


@pytest.fixture(scope="module")
def two_solvers(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return evaluate.run(task(pipeline, tmp_path_factory.mktemp("two"), solvers="ddim,heun"))


@pytest.mark.parametrize(
    "change", [{"batch_size": 7}, pytest.param({"batch_size": 64}, marks=pytest.mark.slow), {"overlap": True}], ids=str
)
def test_neither_batches_nor_overlap_change_a_distance(
    change: dict[str, Any], two_solvers: Sweep, pipeline: Pipeline, tmp_path: Path
) -> None:
    first, other = two_solvers, evaluate.run(task(pipeline, tmp_path, solvers="ddim,heun", **change))
    for a, b in zip(first.measurements, other.measurements, strict=True):
        assert (a.solver, a.nfe, a.distances, a.value("kid")) == (b.solver, b.nfe, b.distances, b.value("kid"))
        rmse = a.value("rmse")
        assert rmse is None or b.value("rmse") == pytest.approx(rmse, rel=1e-5)  # a matrix product's last bits


# ---- numbers ----


def test_a_cells_numbers_are_those_of_its_samples(pipeline: Pipeline, tmp_path: Path, small_parts: None) -> None:
    sweep = evaluate.run(sweep_task(pipeline, tmp_path, metrics="kid,precision,density,is", n=24))
    cell = measured(sweep)[0]
    assert len(cell.distances) == cell.blocks == 2
    assert cell.distance == pytest.approx(sum(cell.distances) / 2)
    bounds = {"precision": (0, 1), "coverage": (0, 1), "inception_score": (1, 10), "psnr": (5, 100)}
    assert all(least <= (cell.value(name) or -1) <= most for name, (least, most) in bounds.items())
    assert cell.std("kid") is not None
    assert cell.decode_seconds > 0 or cell.feature_seconds > 0


def test_without_a_fine_solution_there_is_no_rmse(pipeline: Pipeline, tmp_path: Path) -> None:
    sweep = evaluate.run(sweep_task(pipeline, tmp_path, exact_nfe=0))
    found, report = measured(sweep)[0], (tmp_path / "report.md").read_text()
    assert found.value("rmse") is None and found.value("psnr") is None and sweep.fine is None
    assert "Use of the codes" not in report and "RMSE compares" not in report


@pytest.mark.parametrize("nfe", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_sample_that_is_not_finite_is_reported(
    nfe: int, pipeline: Pipeline, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the solver: no distance, KID or PSNR. Of the fine solution: no error."""

    def spoil(seeds: torch.Tensor, batch: SampledBatch) -> None:
        if batch.nfe == nfe:
            batch.values[0, 0] = torch.nan

    watch_samples(monkeypatch, spoil)
    found = measured(evaluate.run(sweep_task(pipeline, tmp_path)))[0]
    report = (tmp_path / "report.md").read_text()
    if nfe == 4:
        assert found.distance == float("inf") and found.nonfinite == 6, "one in each part"
        assert found.value("kid") is None and found.value("psnr") is None and "diverged" in report
    else:
        assert found.value("rmse") is None and found.distance < float("inf")
        assert "exact solution diverged" in report


# ---- baselines ----


@pytest.fixture(scope="module")
def with_baseline(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep]:
    out = tmp_path_factory.mktemp("baselines")
    return out, evaluate.run(sweep_task(pipeline, out, baselines=(pipeline.baseline,)))


def test_a_baseline_is_measured_like_a_solver(with_baseline: tuple[Path, Sweep], pipeline: Pipeline) -> None:
    (cell,) = (cell for cell in with_baseline[1].measurements if cell.baseline)
    assert (cell.solver, cell.nfe, cell.n, cell.blocks, cell.value("rmse")) == ("baseline", 1, 20, 2, None)
    trained = load_trained_baseline(pipeline.baseline)
    file = Run.open(pipeline.features, "features").checkpoint / "features.safetensors"
    network = load_features(file)
    splits = load_splits(trained.data)
    reference = FeatureStatistics.of(network.features(splits.train.images[:]))
    for block, expected in enumerate(cell.distances):
        seeds = torch.arange(20 * block, 20 * block + 20)
        images = to_uint8(trained.model.sample(seeds, seeds % 10 if trained.model.classes else None))
        assert frechet_distance(FeatureStatistics.of(network.features(images)), reference) == pytest.approx(expected)


def test_a_baseline_is_a_row_of_every_table_but_not_a_solver(with_baseline: tuple[Path, Sweep]) -> None:
    out, sweep = with_baseline
    assert all(line.name != "baseline" for line in distance_table(sweep.measurements).lines)
    assert ("baseline", 1) not in shown(sweep.measurements)
    page = (out / "report.html").read_text()
    for text in (markdown_tables(sweep.measurements), terminal_text(sweep.measurements), page):
        assert "baseline" in text and "s / 1000 images" in text
    assert ("baseline", 1) in sweep.grids


# ---- what a table may hold ----


def line(solver: str, nfe: int, distances: tuple[float, ...], n: int = 100, features: str = "cnn@1") -> Measurement:
    mean = sum(distances) / len(distances)
    return measurement(
        solver, "uniform", nfe, mean, n=n, blocks=len(distances), features=features, distance_blocks=distances
    )


def to_best(cells: list[Measurement]) -> dict[str, Entry | None]:
    return {line.name: line.entries[0] for line in difference_table(cells).lines}


@pytest.mark.parametrize(
    "other", [line("b", 4, (1.0, 2.0), n=200), line("b", 4, (1.0, 2.0), features="cnn@2")], ids=str
)
def test_cells_that_do_not_compare_are_kept_out_of_one_table(other: Measurement) -> None:
    cells = [line("a", 4, (1.0, 2.0)), other]
    for show in (check_comparable, markdown_tables, terminal_text):
        with pytest.raises(ValueError, match="do not compare"):
            show(cells)
    check_comparable([cells[0], replace(other, solver="floor")])


def test_paired_differences_by_hand() -> None:
    """Of the three differences 0.5, 0.7, 0.3 the mean is 4.33 errors: Student's t of 2 degrees of freedom wants 4.30."""
    cells = [
        line("a", 4, (1.0, 3.0, 2.0)),
        line("b", 4, (1.5, 3.7, 2.3)),
        line("c", 4, (9.0,)),
        line("a", 8, (1.0, 1.0)),
    ]
    found = to_best(cells)
    assert found["a"] == Entry("best", "uniform", best=True, tied=True)
    assert found["b"] is not None
    mean, error = found["b"].value.removeprefix("+").split(" ± ")
    differences = np.array([0.5, 0.7, 0.3])
    assert float(mean) == pytest.approx(differences.mean(), abs=5e-3)
    assert float(error) == pytest.approx(differences.std(ddof=1) / 3**0.5, abs=5e-3)
    assert "c" not in found, "one block has no difference of blocks"


def test_differences_that_are_not_significant_are_marked() -> None:
    """Of 0.5, 0.71, 0.29 the mean is 4.12 errors, of 0.4 and 0.6 five: too few for 3 and 2 blocks."""
    assert [round(critical_t(blocks), 3) for blocks in (2, 3, 4)] == [12.706, 4.303, 3.182]
    cells = [line("a", 4, (1.0, 3.0, 2.0)), line("b", 4, (1.5, 3.71, 2.29)), line("c", 4, (3.0, 5.1, 4.05))]
    found = to_best(cells)
    assert found["b"] is not None and found["b"].value.startswith("≈ +0.50 ± 0.12")
    assert found["c"] is not None and "≈" not in found["c"].value
    assert "1 other at this budget not significantly worse" in report_html(
        cells, ReportContext("", "", "", "", "", {}, "")
    )
    two = to_best([line("a", 4, (1.0, 3.0)), line("b", 4, (1.4, 3.6))])
    assert two["b"] is not None and two["b"].value.startswith("≈")
    assert "12.7 errors" in difference_table([line("a", 4, (1.0, 3.0))]).note


# ---- the reference ----


@pytest.fixture
def images() -> Iterator[ImageData]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    yield ImageData(pixels, torch.arange(40) % 4, ("a", "b", "c", "d"), "toy", "f" * 64)


def test_statistics_of_a_reference_are_stored_and_those_of_another_raise(images: ImageData, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = FeatureNetwork(FeatureConfig(1, 8, 4, width=8, dim=4)).eval()
    made = make_reference(network, "cnn-toy@1", images, tmp_path)
    (path,) = tmp_path.iterdir()
    calls: list[int] = []
    network.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    again = make_reference(network, "cnn-toy@1", images, tmp_path)
    assert calls == [] and torch.equal(again.statistics.scatter, made.statistics.scatter)
    assert again.sample is not None and made.sample is not None and torch.equal(again.sample, made.sample)
    outdated = {"format": references.EARLIER[0], "data": images.fingerprint, "features": "cnn-toy@1", "n": "40"}
    save_file({"count": torch.tensor(40)}, path, outdated)
    recomputed = make_reference(network, "cnn-toy@1", images, tmp_path)
    assert len(calls) == 1 and torch.equal(recomputed.statistics.scatter, made.statistics.scatter)
    make_reference(network, "cnn-toy@2", images, tmp_path)
    (other,) = set(tmp_path.iterdir()) - {path}
    path.replace(other)  # a file under another's name
    with pytest.raises(DataError, match="cnn-toy@2"):
        make_reference(network, "cnn-toy@2", images, tmp_path)
    other.replace(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        make_reference(network, "cnn-toy@1", images, tmp_path)


def test_evaluate_runs_as_a_command_with_every_new_flag(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    flags = "--solvers ddim --nfe 4 --grids uniform --n 40 --exact-nfe 0 --metrics kid,infinity --overlap --fresh"
    runs = f"--model {pipeline.model} --features {pipeline.features} --baselines {pipeline.baseline}"
    succeed(f"evaluate {runs} --out {tmp_path} {flags}")
    record = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[1])
    assert record["fd_infinity"] is not None and record["kid"] is not None
    assert "overlapped" in (tmp_path / "report.md").read_text()
    pictures = re.findall(r'alt="(samples of ddim[^"]*)"', (tmp_path / "report.html").read_text())
    assert len(re.split("[,;] ", pictures[0])) == 1 + 16 == 1 + measure.SHOWN, "each image with its class"


def test_fewer_images_than_features_are_measured_without_a_covariance(images: ImageData) -> None:
    torch.manual_seed(0)
    network = FeatureNetwork(FeatureConfig(1, 8, 4, width=8, dim=16)).eval()
    reference = make_reference(network, "cnn-toy@1", images)
    few = network.features(images.images[:10])
    exact = frechet_distance_of_features(few, network.features(images.images[:]))
    assert reference.distance_of(few) == pytest.approx(exact, rel=1e-12)
    assert reference.distance_of(few) != frechet_distance(FeatureStatistics.of(few), reference.statistics)
    many = network.features(images.images[:17])
    assert reference.distance_of(many) == frechet_distance(FeatureStatistics.of(many), reference.statistics)
