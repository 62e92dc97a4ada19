"""The script of the proving ground: its report, every flag, and what cannot be measured."""

import csv
import json
import math
from pathlib import Path

import pytest
from PIL import Image
from pipelines import Script
from tensors import normal

from midway.gen.proving.contest import EXACT_ROW, FLOOR, Cell
from midway.gen.proving.report import FILES, Result, figure_table, order_table, read_result

SMALL = "--axes 8 --components 3 --n 64 --blocks 2 --nfe"
NAMES = "euler,heun,dpm2,dpmpp3m,unipc3,ipndm4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 grey images of 8 x 8, too few to fit for long."""
    path = tmp_path_factory.mktemp("images")
    for number in range(40):
        pixels = normal(8, 8, seed=number).cumsum(0).mul(30).add(128).clamp(0, 255).byte().numpy()
        Image.fromarray(pixels).save(path / f"{number:02}.png")
    return path


def test_a_small_run_writes_a_report_that_reads_back(tmp_path: Path, succeed: Script) -> None:
    """On the photographs; floor, exact row, the published order, and a learned solver, whose cost is stated."""
    out = tmp_path / "prove"
    done = succeed(f"prove_solvers {SMALL} 5,6 --solvers {NAMES},ddpm,rk4 --learned amed --out", out)
    assert {path.name for path in out.iterdir()} - {".lock"} == set(FILES)
    result = read_result(out / "results.jsonl")
    costs = [cell.training_nfe for cell in result.cells if cell.solver == "amed"]
    assert f"training: amed {min(costs):,} to {max(costs):,} evaluations a budget" in done.out
    named = [cell.solver for cell in result.cells]
    assert named[:2] == [FLOOR, EXACT_ROW]
    assert [name for name in named if name == "rk4"] == []  # 5 and 6 are no budgets of it
    assert {cell.solver for cell in result.cells if cell.training_nfe} == {"amed"}
    assert {cell.solver for cell in result.cells if cell.nfe and "rmse" not in cell.blocks} == {"ddpm"}
    assert result.exact_error < 0.02
    order = order_table(result)
    (nfe6,) = [entry for head, entry in zip(order.heads[1:], order.lines[0].entries) if head == "NFE 6"]
    assert nfe6 is not None and float(nfe6.value) >= 0.7
    text = (out / "report.md").read_text()
    for words in ("floor (fresh data)", "exact solution", "network error", "Agreement with the published order"):
        assert words in text
        assert words in (out / "report.html").read_text()
    assert "Distance to data: fresh data" in done.out
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == len(result.cells)
    assert float(rows[2]["rmse"]) == result.cells[2].mean("rmse")
    again = succeed(f"prove_solvers {SMALL} 5,6 --solvers euler --learned none --title Again --out", out)  # replaces it
    assert "# Again" in (out / "report.md").read_text()
    euler = [cell for cell in result.cells if cell.solver == "euler"]
    assert [c for c in read_result(out / "results.jsonl").cells if c.nfe] == euler  # the same figures beside others
    assert "report:" in again.out


def test_every_flag_changes_what_is_measured(tmp_path: Path, folder: Path, succeed: Script) -> None:
    flags = [
        "",
        "--seed 1",
        "--first-seed 99",
        "--patch 4",
        "--patch 4 --axes 5",
        "--components 3",
        "--resize 6 --patch 6",
    ]
    flags += ["--channels 3", "--n 70", "--blocks 3"]
    found = set()
    for number, more in enumerate(flags):
        out = tmp_path / str(number)
        base = "--patch 8 --axes 6 --components 2 --n 64 --blocks 2 --nfe 3 --solvers ddim --learned none"
        succeed(f"prove_solvers {base} {more} --out", out, "--data", folder)
        found.add((out / "results.jsonl").read_text().splitlines()[-1])
    assert len(found) == len(flags)
    succeed(
        "prove_solvers --download --data digits --axes 6 --components 2 --n 64 --blocks 1 --nfe 3 --solvers ddim "
        "--learned none --out",
        tmp_path / "digits",
    )
    assert "digits@" in (tmp_path / "digits" / "report.md").read_text()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--solvers dimm", 2, "did you mean 'ddim'"),
        ("--learned tabel", 2, "did you mean 'table'"),
        ("--solvers none --learned none", 2, "no solver is measured"),
        ("--nfe x", 2, "positive whole numbers"),
        ("--n 8 --axes 8 --patch 0", 2, "needs more samples"),
        ("--blocks 0", 2, "1 to 1,000"),
        ("--axes 1", 2, "axes is 1"),
        ("--components 20", 3, "gives 40 vectors"),
        ("--patch 9", 3, "a side of 9"),
        ("--data nowhere.zip", 3, "does not exist"),
        ("--data digitz", 2, "unknown data source"),
    ],
)
def test_what_cannot_be_measured(
    tmp_path: Path, folder: Path, script: Script, flags: str, code: int, words: str
) -> None:
    out = tmp_path / "prove"
    where = [] if "--data" in flags else ["--data", folder]
    base = [] if "--components" in flags else ["--components", 2]
    done = script("prove_solvers", *flags.split(), *where, *base, "--out", out)
    assert done.code == code, done.err
    assert words in done.err
    assert "Traceback" not in done.err
    assert not out.exists()


def test_files_of_others_are_not_replaced(tmp_path: Path, folder: Path, script: Script) -> None:
    (tmp_path / "results.csv").write_text("mine\n")
    done = script("prove_solvers", "--data", folder, "--out", tmp_path)
    assert done.code == 2
    assert "is not of an earlier report of this kind" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def _result(values: dict[str, float], exact: float = 0.3) -> Result:
    cells = [
        Cell(name, 5, "vp", False, 0, {"to_data": (value, value), "rmse": (value,)}) for name, value in values.items()
    ]
    rows = [Cell(FLOOR, 0, "", False, 0, {"to_data": (0.29,)}), Cell(EXACT_ROW, 0, "", False, 0, {"to_data": (exact,)})]
    return Result((*rows, *cells), "patches@0", 64, "0-127", 1e-4)


def test_nothing_below_the_exact_row_is_better_than_it() -> None:
    table = figure_table(_result({"a": 0.1, "b": 0.299, "c": 0.31}), "to_data")
    assert [line.name for line in table.lines if line.entries[0] is not None and line.entries[0].best] == ["a", "b"]
    above = figure_table(_result({"a": 0.5, "b": 0.4, "c": math.inf}), "to_data")
    assert [line.name for line in above.lines if line.entries[0] is not None and line.entries[0].best] == ["b"]
    own = figure_table(_result({"a": 0.1, "b": 0.299, "c": 0.31}), "rmse")
    assert [line.name for line in own.lines if line.entries[0] is not None and line.entries[0].best] == ["a"]


def test_figures_that_are_not_finite_are_null_in_the_records(tmp_path: Path) -> None:
    from midway.gen.proving import report
    from midway.gen.report.table import ReportContext

    result = _result({"a": 0.1, "b": math.inf})
    report.write_prove_report(tmp_path, result, ReportContext("t", "m", "d"))
    last = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert last["rmse"] is None
    assert last["rmse_blocks"] == [None]
    assert report.read_result(tmp_path / "results.jsonl") == result
    assert "diverged" in (tmp_path / "report.md").read_text()
