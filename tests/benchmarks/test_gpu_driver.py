"""`make gpu`: whatever its parts do, the report is valid, and nothing is left running."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_modules import BENCHMARKS, as_before, benchmark

ROOT = BENCHMARKS.parent
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
BEGIN = "import sys, time, json, os\nrows = open(sys.argv[sys.argv.index('--rows') + 1], 'a')\n"
ROW = "rows.write(json.dumps({'status': 'measured', 'name': 'a', 'ours': 1.0}) + '\\n'); rows.flush()\n"
CHILD = "import subprocess; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with as_before():
        yield


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return benchmark("gpu")


@pytest.fixture
def driver(gpu: ModuleType) -> ModuleType:
    return sys.modules[gpu.run_parts.__module__]


def fake(driver: ModuleType, name: str, code: str, limit: float = 60.0, least: float = 0.0) -> Any:
    """A part that runs this code."""
    return driver.Part(name, f"about {name}", (sys.executable, "-c", BEGIN + code), limit, least)


def run(
    driver: ModuleType, parts: list[Any], out: Path, budget: float = 1e9, hangs: str = "", hours: float = 1.0
) -> dict[str, Any]:
    """The report, which is what was returned; every row was shown. Hours go by once the part that `hangs` has shown a row."""
    shown: list[tuple[str, dict[str, Any]]] = []

    def now() -> float:
        later = any(name == hangs and "limit_s" not in row for name, row in shown)
        return time.monotonic() + 3600 * hours * later

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "now", now)
        entries, stopped = driver.run_parts(
            parts, out, budget, lambda name, row: shown.append((name, row)), {"head": 1}
        )
    report = json.loads(out.read_text())
    assert stopped is None
    assert [entry.status for entry in entries] == [part["status"] for part in report["parts"]]
    rows = [(part["name"], row) for part in report["parts"] for row in part["rows"]]
    assert [pair for pair in shown if "limit_s" not in pair[1]] == rows
    return report


def gone(process: int) -> bool:
    """Whether a process has ended, if need be within some seconds."""
    for _ in range(100):
        try:
            os.kill(process, 0)
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


def test_parts_that_pass_fail_hang_or_lack_a_package_are_entries(driver: ModuleType, tmp_path: Path) -> None:
    child = tmp_path / "child"
    hanging = f"{CHILD}open({str(child)!r}, 'w').write(str(child.pid))\n{ROW}import signal\n"
    hanging += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
    parts = [
        fake(driver, "passes", ROW + ROW),
        fake(driver, "fails", ROW + "print('no\\nluck')\nsys.exit(7)"),
        fake(driver, "hangs", hanging, limit=600.0),
        fake(driver, "writes rubbish", "rows.write('{not json\\n'); rows.flush()"),
        fake(driver, "half a row", ROW + "rows.write('{\\\"name\\\": '); rows.flush()"),
        driver.Part("is not there", "", (str(tmp_path / "nothing"),), 60.0, 0.0),
        fake(driver, "has a head", "rows.write(json.dumps({'header': {'gpu': 'none'}}) + '\\n')"),
    ]
    report = run(driver, parts, tmp_path / "made" / "gpu.json", hangs="hangs")
    found = {part["name"]: part for part in report["parts"]}
    assert {name: (part["status"], len(part["rows"])) for name, part in found.items()} == {
        "passes": ("done", 2),
        "fails": ("failed", 1),
        "hangs": ("timeout", 1),
        "writes rubbish": ("failed", 0),
        "half a row": ("done", 1),
        "is not there": ("failed", 0),
        "has a head": ("done", 0),
    }
    assert found["passes"]["reason"] == ""
    assert found["fails"]["reason"] == "exit code 7: no luck"
    assert "after 600 s" in found["hangs"]["reason"] and found["hangs"]["seconds"] > 3600
    assert "JSONDecodeError" in found["writes rubbish"]["reason"]
    assert "FileNotFoundError" in found["is not there"]["reason"]
    assert report["complete"] and report["gpu"] == "none" and report["head"] == 1
    assert gone(int(child.read_text())), "what a part has started ends with it"


def test_what_the_budget_does_not_reach_is_skipped(driver: ModuleType, tmp_path: Path) -> None:
    """The report is replaced after every part; a limit is never more than what is left."""
    out = tmp_path / "gpu.json"
    seen = f"rows.write(json.dumps({{'name': open({str(out)!r}).read()}}) + '\\n')"
    parts = [
        fake(driver, "first", ROW),
        fake(driver, "second", seen),
        fake(driver, "third", f"{ROW}time.sleep(600)", limit=5000.0),
        fake(driver, "fourth", ROW, least=5.0),
    ]
    report = run(driver, parts, out, budget=driver.GRACE + 3000.0, hangs="third", hours=0.9)
    first, second, third, fourth = report["parts"]
    between = json.loads(second["rows"][0]["name"])
    assert [part["name"] for part in between["parts"]] == ["first"] and not between["complete"]
    assert (third["status"], fourth["status"]) == ("timeout", "skipped")
    assert 2000 < third["limit_s"] < 3000
    assert fourth["reason"] == "0 s of the budget are left, it needs 5" and fourth["rows"] == []
    assert report["complete"] and (report["budget_s"], first["limit_s"]) == (driver.GRACE + 3000.0, 60.0)


DRIVER = """
import sys
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from gpu_parts.driver import Part, run_parts
child = "import subprocess, sys, time, os\\nprocess = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\\n"
child += "{more}open({child!r}, 'w').write(f'{{process.pid}} {{os.getpid()}}')\\ntime.sleep(600)\\n"
done = "import sys; open(sys.argv[2], 'a').write('{{\\"name\\": \\"a\\"}}\\\\n')"
parts = [Part(name, "", (sys.executable, "-c", code), 600.0, 0.0) for name, code in (("passes", done), ("hangs", child))]
print("ready", flush=True)
entries, stopped = run_parts(parts, Path({out!r}), 900.0, lambda name, row: None, {{}})
sys.exit(128 + stopped)
"""


def started(tmp_path: Path, more: str = "") -> tuple[subprocess.Popen[bytes], list[int]]:
    """A driver in the middle of its second part, and the processes of that part."""
    child, out = tmp_path / "child", tmp_path / "gpu.json"
    code = DRIVER.format(benchmarks=str(BENCHMARKS), child=str(child), out=str(out), more=more)
    process = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(600):
        if child.exists() and len(child.read_text().split()) == 2:
            return process, [int(word) for word in child.read_text().split()]
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("the second part did not begin")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_driver_that_is_stopped_leaves_a_valid_report_and_no_process(number: int, tmp_path: Path) -> None:
    process, children = started(tmp_path)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert all(map(gone, children))
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [(part["name"], part["status"], len(part["rows"])) for part in report["parts"]] == [
        ("passes", "done", 1),
        ("hangs", "interrupted", 0),
    ]
    assert not report["complete"]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_driver_that_is_killed_leaves_the_parts_before_and_no_process(tmp_path: Path) -> None:
    """The part itself watches its parent."""
    watch = f"sys.path.insert(0, {str(BENCHMARKS)!r}); from gpu_parts.watch import end_with_parent; end_with_parent()"
    process, children = started(tmp_path, more=f"{watch}\\n")
    process.kill()
    process.wait(30)
    assert all(map(gone, children))
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [(part["name"], part["status"]) for part in report["parts"]] == [("passes", "done")]


# ---- the program ----


@WITHOUT_CUDA
def test_without_cuda_one_line_and_nothing_written(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 0
    done = capsys.readouterr()
    assert done.out.count("\n") == 1 and "no CUDA" in done.out and done.err == ""
    assert list(tmp_path.iterdir()) == []


def test_the_program_runs_its_parts_and_judges_their_rows(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two real ones; a package that is not installed is no failure."""
    out = tmp_path / "gpu.json"
    code = gpu.main(
        ["--device", "cpu", "--tiny", "--only", "machine", "cifar", "--data", "nowhere.zip", "--out", str(out)]
    )
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert code == 0
    assert [part["status"] for part in report["parts"]] == ["done", "done"]
    machine, cifar = report["parts"]
    assert report["hardware"]["device"] == "cpu"
    assert report["environment"]["packages"]["torch"] == torch.__version__.split("+")[0]
    assert [row["name"] for row in machine["rows"]][:2] == ["copy", "matrix product, bf16"]
    assert [(row["status"], row["name"]) for row in cifar["rows"]] == [("skipped", "cifar")]
    assert "pass --data" in printed and "machine: done" in printed and "copy: ours" in printed


def test_a_line_has_the_figures_of_its_row(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.show(
        "a",
        {"status": "measured", "name": "x", "ours": 2.0, "peer": 4.0, "peer_name": "y", "unit": "ms", "held": False},
    )
    gpu.show("a", {"status": "measured", "name": "z", "step": 3, "psnr": 1.5})
    gpu.show("a", {"status": "skipped", "name": "w", "reason": "no images"})
    gpu.show("a", {"status": "done", "name": "a", "seconds": 1.0, "reason": "", "limit_s": 3.0})
    assert capsys.readouterr().out.splitlines() == [
        "    x beside y: ours 2.0 peer 4.0 unit ms MISSED",
        "    z: step 3 psnr 1.5",
        "    w: skipped: no images",
        "a: done in 1 s",
    ]


@pytest.mark.parametrize(
    ("status", "rows", "code"),
    [
        ("done", [{"status": "measured", "held": True}, {"status": "skipped", "held": None}], 0),
        ("skipped", [], 0),
        ("done", [{"status": "measured", "held": False}], 1),
        ("done", [{"status": "failed"}], 1),
        ("timeout", [], 1),
        ("failed", [], 1),
    ],
)
def test_the_exit_code_tells_failures_and_missed_targets(
    status: str, rows: list[dict[str, Any]], code: int, gpu: ModuleType
) -> None:
    assert gpu.wrong([gpu.Entry("a", "", status, rows=rows)]) == code


def test_the_limits_of_the_first_parts_leave_time_for_the_long_one(gpu: ModuleType) -> None:
    names = list(gpu.LIMITS)
    before = sum(gpu.LIMITS[name][0] for name in names[: names.index("cifar") + 1])
    assert before <= gpu.BUDGET
    assert gpu.BUDGET <= 540


@WITHOUT_CUDA
def test_make_gpu_needs_neither_an_environment_nor_a_network(tmp_path: Path) -> None:
    """In a checkout without `.venv`, by a Python that has torch: here one that is on PYTHONPATH, which stays there."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("gen", "samplers", "tokenizers"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(BENCHMARKS, tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    (tmp_path / "stub").mkdir()
    cuda = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
    (tmp_path / "stub" / "torch.py").write_text(f"__version__ = 'of the stub'\n{cuda}class Tensor: ...\n")
    (tmp_path / "stub" / "safetensors.py").write_text("class SafetensorError(Exception): ...\nsafe_open = None\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "stub"), "MAKEFLAGS": ""}
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "no CUDA device, nothing to measure and nothing written (torch of the stub)\n"
    assert (tmp_path / ".imports" / "midway" / "gen" / "core").is_dir()
    assert not (tmp_path / ".venv").exists()


def test_tests_that_need_cuda_are_where_they_are_run_from() -> None:
    """All of them are below tests/cuda with the mark, so that `make gpu` has them."""
    words = "needs a CUDA" + " device"
    holding = {
        path.relative_to(ROOT / "tests").as_posix()
        for path in (ROOT / "tests").rglob("*.py")
        if words in path.read_text()
    }
    assert holding == {"support/devices.py"}
