"""The parts of `make gpu` on the CPU, at sizes that show that they run: their rows, and what they do without other packages."""

import importlib
import json
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from benchmark_modules import BENCHMARKS, as_before, benchmark
from PIL import Image

CPU = torch.device("cpu")
ABSENT = ("diffusers", "tyro", "accelerate", "torchdiffeq", "vector_quantize_pytorch", "torch_fidelity", "torchmetrics")


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    """Parts import their neighbours by name."""
    with pytest.MonkeyPatch.context() as patch, as_before():
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with as_before():
        torch.set_num_threads(1)
        yield


@pytest.fixture
def part() -> ModuleType:
    return importlib.import_module("gpu_parts.part")


@pytest.fixture
def setting(part: ModuleType, tmp_path: Path) -> Any:
    return part.Setting(CPU, 1.0, tmp_path, tiny=True)


def rows(name: str, setting: Any, *wanted: str) -> list[dict[str, Any]]:
    """The rows of a part, or of those makers whose names begin so; each can be written, and is what it has to be."""
    module, shared = importlib.import_module(f"gpu_parts.{name}"), importlib.import_module("gpu_parts.part")
    makers = module.makers(setting)
    chosen = {key: make for key, make in makers.items() if not wanted or key.startswith(wanted)}
    assert chosen
    found = list(shared.rows_of(chosen))
    assert [row for row in found if row["status"] == "failed"] == []
    for row in found:
        assert row["name"] or row["header"]
        json.dumps(row)
        if row.get("peer_name"):
            assert row["ours"] > 0 or row["unit"] not in ("ms", "MiB")
            assert len(row["quartiles"]) == 2 if row["unit"] == "ms" else True
    return found


def by_name(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{row['name']} beside {row['peer_name']}" if row.get("peer_name") else row["name"]: row for row in found}


# ---- rows ----


def test_rows_that_cannot_be_measured_have_their_reasons(part: ModuleType) -> None:
    def passes() -> Iterator[dict[str, Any]]:
        yield {"name": "a", "ours": 1}

    def breaks() -> Iterator[dict[str, Any]]:
        yield {"name": "b", "ours": 2}
        raise ValueError("two\nlines")

    def lacks() -> Iterator[dict[str, Any]]:
        importlib.import_module("a_package_of_nobody.inner")
        yield {}

    def is_wrong() -> Iterator[dict[str, Any]]:
        importlib.import_module("midway.gen.no_such_module")
        yield {}

    def skips() -> Iterator[dict[str, Any]]:
        raise part.Skipped("no images")
        yield {}

    makers = {"passes": passes, "breaks": breaks, "lacks": lacks, "is wrong": is_wrong, "skips": skips}
    found = [(row["status"], row["name"], row.get("reason", "").split(" (")[0]) for row in part.rows_of(makers)]
    assert found == [
        ("measured", "a", ""),
        ("measured", "b", ""),
        ("failed", "breaks", "ValueError: two lines"),
        ("skipped", "lacks", "the package a_package_of_nobody is not installed"),
        ("failed", "is wrong", "ModuleNotFoundError: No module named 'midway.gen.no_such_module'"),
        ("skipped", "skips", "no images"),
    ]


def test_targets_are_judged_at_full_size_only(
    part: ModuleType, setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("gpu_parts.missed")
    module.makers = lambda setting: {"a": lambda: [part.compared("a", "ms", 2.0, "b", 1.0, 3.0)]}  # pyright: ignore
    monkeypatch.setitem(sys.modules, "gpu_parts.missed", module)
    monkeypatch.setattr(part, "end_with_parent", lambda: None)  # this process has no driver
    for tiny, held in ((True, None), (False, False)):
        assert part.run_part("missed", replace(setting, tiny=tiny), tmp_path / f"{tiny}") == 0
        (row,) = map(json.loads, (tmp_path / f"{tiny}").read_text().splitlines())
        assert (row["held"], row["ratio"]) == (held, 0.5)


def test_sides_take_turns_after_a_warm_up(part: ModuleType, setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(part, "wall_seconds", lambda work: (work(), {"a": 1.0, "b": 3.0}[done[-1]])[1])
    sides = {"a": lambda: done.append("a"), "b": lambda: done.append("b")}
    taken = part.turns(sides, setting, 0.0, warm_up=1, calls=2)
    assert done == ["a", "b", *["a", "a", "b", "b"] * 2]
    assert taken == {"a": [0.5, 0.5], "b": [1.5, 1.5]}
    (row,) = part.time_rows("x", taken, {"b": {"d": 0.1}}, {"b": 2.9})
    assert (row.name, row.ours, row.peer, row.ratio, row.held, row.turns) == ("x, a", 500.0, 1500.0, 3.0, True, 2)
    assert (row.quartiles, row.differences) == ((3.0, 3.0), {"d": 0.1})
    (row,) = part.time_rows("x", taken, None, {"b": 3.1})
    assert row.held is False
    assert len(part.turns(sides, replace(setting, tiny=False), 0.0, least=4)["a"]) == 4


def test_synchronisations_are_counted(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By CUDA's warnings, of the second call."""
    syncs, modes, calls = importlib.import_module("gpu_parts.syncs"), [], []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work() -> None:
        calls.append(modes[-1] if modes else None)
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("the mode does not yet detect all synchronizing operations", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert syncs.synchronisations(work, torch.device("cuda")) == 2
        assert syncs.synchronisations(work, CPU) == 0
    assert calls == [None, "warn", "default", "default"]
    assert modes == ["warn", "default"]
    judged = [syncs.row("a", count, replace(setting, device=torch.device("cuda")), ours=True).held for count in (0, 1)]
    assert judged == [True, False]
    assert syncs.row("a", 1, setting, ours=True).held is None


# ---- the parts ----


def test_graph_eager_and_diffusers_are_side_by_side(setting: Any) -> None:
    pytest.importorskip("diffusers")
    found = by_name(rows("graph", setting, "ddim, B = 1", "dpmpp2m, B = 2", "overhead, B = 1"))
    assert list(found) == [
        "ddim, 10 steps, B = 1, graph beside eager",
        "ddim, 10 steps, B = 1, graph beside diffusers' DDIMScheduler",
        "dpmpp2m, 10 steps, B = 2, graph beside eager",
        "dpmpp2m, 10 steps, B = 2, graph beside diffusers' DPMSolverMultistepScheduler",
        "overhead, graph, B = 1",
        "overhead, eager, B = 1",
    ]
    assert found["ddim, 10 steps, B = 1, graph beside eager"]["differences"] == {"x, relative": 0.0}


def test_waits_have_a_row_for_every_solver(setting: Any) -> None:
    from midway.samplers.solvers import ALIASES, SOLVERS

    makers = importlib.import_module("gpu_parts.syncs").makers(setting)
    assert set(SOLVERS) - set(ALIASES) < set(makers)
    found = rows("syncs", setting, "ddpm", "heun", "guided", "training", "diffusers' UniPC")
    assert [row["name"].removeprefix("waits of ") for row in found] == [
        "heun",
        "ddpm",
        "a field made anew, guided",
        "a field made anew, guided in an interval",
        "a step of fit()",
        "diffusers' UniPCMultistepScheduler",
    ]
    assert all(row["ours"] == 0 for row in found)


def test_precisions_are_compared_with_float64(setting: Any) -> None:
    found = by_name(rows("precision", setting))
    error = found["sampling, 10 steps, B = 1, bf16, error against float64 beside float32"]
    assert 0 < error["peer"] < 1e-5 < error["ours"] < 0.1
    assert {"training step, bf16 beside TF32", "training step, bf16 beside float32"} < set(found)
    assert found["training step, memory, bf16 beside float32"]["unit"] == "MiB"


def test_the_distances_of_both_roots_agree(setting: Any) -> None:
    found = by_name(rows("frechet", setting))
    assert found["Fréchet distance, D = 24, Newton-Schulz, relative difference from the CPU's"]["ours"] < 1e-9
    assert "Fréchet distance, D = 24, Newton-Schulz beside eigenvalues, same device" in found


def test_parallel_sampling_is_beside_both_loops(setting: Any) -> None:
    found = by_name(rows("parallel", setting, "N = 6, tolerance 0.001"))
    name = "parallel in time, N = 6, tolerance 0.001"
    beside = f"{name}, parallel beside sequential"
    waves, graph, eager = f"{name}, waves", f"{beside}, graph", f"{beside}, eager"
    assert set(found) == {waves, graph, eager}
    assert 1 <= found[waves]["ours"] <= 6
    assert found[graph]["differences"]["x, relative"] < 1e-2


def test_the_dit_is_beside_that_of_diffusers(setting: Any) -> None:
    pytest.importorskip("diffusers")
    found = rows("dit", setting)
    assert [row["name"] for row in found] == [
        f"{kind}, tiny, batch 2, {way}" for way in ("float32", "bf16") for kind in ("training", "sampling")
    ]
    assert all(row["peer_name"] == "diffusers" and row["turns"] == 3 for row in found)


@pytest.mark.slow
def test_compiled_networks_are_beside_eager_ones(setting: Any) -> None:
    """Marked for compilation only: that takes a C++ compiler minutes."""
    with torch.compiler.set_stance("force_eager"):
        found = by_name(rows("compiled", setting))
    assert "training step, bf16, compiled beside eager" in found
    assert found["sampling, 10 steps, B = 1, compiled, graph beside eager"]["differences"]["x, relative"] < 1e-5


@pytest.mark.slow
def test_fit_is_beside_a_bare_loop_and_the_loop_of_diffusers_example(setting: Any) -> None:
    found = rows("training", setting, "DiT-S, bf16, recipe", "DiT-S, no, bare loop")
    assert [(row["name"], row["peer_name"], row["unit"]) for row in found] == [
        ("DiT-S, batch 8, bf16, fit()", "the loop of diffusers' example", "images/s"),
        ("DiT-S, batch 8, no, fit()", "bare loop", "images/s"),
    ]
    assert all(min(row["ours"], row["peer"]) > 0 and row["turns"] == 3 for row in found)
    assert not any("held" in row for row in found), "sizes like these are not judged"


def test_the_recipe_takes_a_step_at_a_time_and_lowers_the_loss(setting: Any) -> None:
    training = importlib.import_module("gpu_parts.training")
    row, losses = training.training_row(setting, "no"), list[float]()

    def loss(net: torch.nn.Module, items: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        value = training.loss_of(row)(net, items)
        losses.append(value.item())
        return value

    steps = training.recipe_loop(row.model, loss, row.items.size, replace(row.config, lr=1e-2), CPU)
    before = [p.clone() for p in row.model.parameters()]
    for step in range(1, 17):  # two epochs
        next(steps)
        assert len(losses) == step
    assert losses[-1] < 0.98 * losses[0]
    assert all(map(torch.equal, row.model.parameters(), before)), "it trains a copy"


@pytest.mark.slow
def test_a_unet_is_trained_by_both(setting: Any) -> None:
    pytest.importorskip("diffusers")
    (row,) = rows("training", setting, "UNet2DModel")
    assert (row["name"], row["peer_name"], row["batch"]) == ("UNet2DModel bf16, fit()", "diffusers recipe", 2)


def test_quantizers_are_beside_their_peers(setting: Any) -> None:
    pytest.importorskip("vector_quantize_pytorch")
    found = by_name(rows("quantizers", setting, "vq", "fsq"))
    assert "VQ step, N = 18, K = 16 beside vector-quantize-pytorch" in found
    assert "FSQ step, N = 18, 5,4, memory beside vector-quantize-pytorch" in found


# ---- the suite's own tests ----


def test_tests_that_need_cuda_are_rows(setting: Any) -> None:
    """pytest's own report of a few tests, one that passes, one that fails, and one that is skipped."""
    tests = importlib.import_module("gpu_parts.cuda_tests")
    file = setting.folder / "test_few.py"
    mark = "@pytest.mark.cuda\n"
    file.write_text(
        f"import pytest\n{mark}def test_a(): pass\n{mark}def test_b(): assert 1 == 2, 'not equal'\n"
        f"{mark}def test_c(): pytest.skip('no GPU')\ndef test_d(): assert False\n"
    )
    listed = list(tests.outcomes(setting, file))
    found = [(row["name"].split("::")[1], row.get("status"), row.get("held")) for row in listed]
    assert found == [("test_a", None, True), ("test_c", "skipped", None), ("test_b", "failed", None)]
    case = ElementTree.fromstring("<testcase classname='a' name='b'><error message='m'>t</error></testcase>")
    assert tests.failed_row(case) == {"name": "a::b", "status": "failed", "reason": "m t"}
    assert tests.failed_row(ElementTree.fromstring("<testcase classname='a' name='b'/>")) is None
    file.write_text("def test_d(): assert False\n")
    with pytest.raises(RuntimeError, match="no test that is marked"):
        list(tests.outcomes(setting, file))


@pytest.mark.slow
def test_the_tests_that_need_cuda_can_be_collected_without_the_fixtures_of_the_suite(
    setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = importlib.import_module("gpu_parts.cuda_tests")
    assert "--noconftest" not in tests.command(tests.TESTS, setting.folder)
    monkeypatch.setattr(tests, "CONFTEST_NEEDS", ("a_package_of_nobody",))
    assert "--noconftest" in tests.command(tests.TESTS, setting.folder)
    found = list(tests.outcomes(setting, tests.TESTS))
    assert {Path(row["name"].split("::")[0]).name for row in found} == {
        path.name for path in tests.TESTS.glob("test_*.py")
    }
    wanted = "measured" if torch.cuda.is_available() else "skipped"
    assert {row.get("status", "measured") for row in found} == {wanted}


# ---- CIFAR-10 ----


def test_stages_after_one_that_failed_are_skipped(
    part: ModuleType, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar = importlib.import_module("gpu_parts.cifar")

    def good(setting: Any, data: Path) -> Iterator[dict[str, Any]]:
        yield {"name": f"of {data.name}"}

    def bad(setting: Any, data: Path) -> Iterator[dict[str, Any]]:
        yield {"name": "begun"}
        raise OSError("no space")

    with pytest.raises(part.Skipped, match="pass --data"):
        cifar.makers(replace(setting, data=setting.folder / "nowhere.zip"))
    (setting.folder / "few.zip").touch()
    monkeypatch.setattr(cifar, "STAGES", {"first": good, "second": bad, "third": good})
    found = part.rows_of(cifar.makers(replace(setting, data=setting.folder / "few.zip")))
    assert [(row["status"], row["name"]) for row in found] == [
        ("measured", "of few.zip"),
        ("measured", "first, all of the stage"),
        ("measured", "begun"),
        ("failed", "second"),
        ("skipped", "third"),
    ]


@pytest.mark.slow
def test_the_whole_path_on_a_few_images(setting: Any) -> None:
    pytest.importorskip("diffusers")
    generator = torch.Generator().manual_seed(0)
    data = setting.folder / "few.zip"
    with zipfile.ZipFile(data, "w") as archive:
        for number in range(160):
            file = BytesIO()
            pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(file, "jpeg")
            archive.writestr(f"class{number % 10}/{number:04d}.jpg", file.getvalue())
    found = by_name(rows("cifar", replace(setting, data=data, seconds=100.0)))
    assert found["tokenizer"]["step"] == found["latent model"]["step"] == 3
    assert found["tokenizer"]["held_out_psnr"] > 0
    assert {"sweep, floor", "sweep, ddim 4 uniform"} < set(found)
    (learned,) = (row for name, row in found.items() if name.startswith("sweep, amed 4"))
    assert learned["rmse"] > 0


# ---- without other packages ----

BLOCKED = """
import importlib, json, sys, tempfile, warnings
from pathlib import Path
absent, names, folder = sys.argv[1].split(","), sys.argv[2].split(","), Path(sys.argv[3])
sys.path[:0] = [sys.argv[4], sys.argv[5]]
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import torch
torch.set_num_threads(1)
torch.compiler.set_stance("force_eager")
from gpu_parts.part import Setting, rows_of, without
found = {}
for name in names:
    try:
        makers = importlib.import_module(f"gpu_parts.{name}").makers(Setting(torch.device("cpu"), 1.0, folder, tiny=True))
    except ModuleNotFoundError as error:
        found[name] = [without(name, error)]
        continue
    few = dict(list(makers.items())[:1] + list(makers.items())[-2:])
    found[name] = [{k: row.get(k) for k in ("status", "name", "reason")} for row in rows_of(few)]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_parts_without_diffusers_tyro_and_accelerate_skip_what_needs_them(tmp_path: Path) -> None:
    """Solvers, graphs, kernels, the matrix root and parallel sampling need torch alone; the nearest code needs no tokenizer."""
    names = ("machine", "graph", "syncs", "precision", "frechet", "parallel", "compiled", "training", "quantizers")
    support = Path(__file__).parents[1] / "support"
    command = [sys.executable, "-c", BLOCKED, ",".join(ABSENT), ",".join(names), tmp_path, BENCHMARKS, support]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row for part in found.values() for row in part if row["status"] == "failed"] == []
    reasons = {name: {row["reason"] for row in part if row["status"] == "skipped"} for name, part in found.items()}
    measured = {name for name, part in found.items() if any(row["status"] == "measured" for row in part)}
    package = "the package {} is not installed".format
    assert measured >= {"machine", "graph", "syncs", "precision", "frechet", "parallel", "compiled"}
    assert reasons["training"] == {package("accelerate")}
    assert reasons["graph"] == reasons["syncs"] == {package("diffusers")}
    assert reasons["quantizers"] >= {package("vector_quantize_pytorch")}
    assert reasons["machine"] == reasons["frechet"] == reasons["parallel"] == set()


def test_the_kernels_part_runs_by_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own, as the program starts it on a CPU."""
    pytest.importorskip("triton")
    program = [sys.executable, BENCHMARKS / "gpu.py", "--part", "kernels", "--device", "cpu", "--tiny"]
    command = [*program, "--rows", tmp_path / "rows.jsonl", "--seconds", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = by_name([json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()])
    assert {row["status"] for row in found.values()} == {"measured"}
    assert found["the row sum's kernel is used"]["ours"] == found["the nearest-code kernel is used"]["ours"] == 1
    assert found["sum of 17 terms, 64 Mi numbers, float32, error beside torch"]["ours"] < 1e-6
    searched = found["nearest code, N = 70, K = 33, D = 3, kernel beside torch by the chunk"]
    assert searched["differences"] == {"indices": 0.0}


def test_every_part_of_the_program_is_a_module() -> None:
    for name in benchmark("gpu").LIMITS:
        assert callable(importlib.import_module(f"gpu_parts.{name}").makers)
