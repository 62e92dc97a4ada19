"""benchmarks/model_ablation.py: what its variants are, how they are compared, and one run from tokenizer to JSON and table."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_modules import benchmark
from scipy import stats

from midway.gen.flags.tasks import LatentTask
from midway.gen.networks.presets import DIT2023, MODERN
from midway.gen.recipes.recipes import LATENT_RECIPES
from midway.gen.trainings import train_latent


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return benchmark("model_ablation")


def task_of(ablation: Any, folder: Path, name: str) -> LatentTask:
    task = ablation.Ablation(folder, folder / "x.json", variants=tuple(dict.fromkeys(("dit2023", "time", name))))
    return train_latent.resolve(LatentTask, LATENT_RECIPES, ablation.words_of(task, name))


def kinds(task: LatentTask) -> dict[str, Any]:
    """All that variants change."""
    model = task.model
    own = {name: getattr(model.dit, name) for name in DIT2023}
    times = {
        "time": model.time,
        "shift": model.time_shift,
        "target": model.target,
        "weight": model.weight,
        "direction": model.direction,
    }
    align = {
        "taught": task.align.teacher is not None,
        "projector": task.align.projector,
        "normalize": task.align.normalize,
    }
    return {**own, **times, **align, "optimizer": task.train.optimizer}


PLAIN = DIT2023 | {
    "time": "uniform",
    "shift": 1.0,
    "target": "velocity",
    "weight": "own",
    "direction": 0.0,
    "optimizer": "adamw",
}
PLAIN |= {"taught": False, "projector": "mlp", "normalize": "none"}
CHANGED: dict[str, dict[str, Any]] = {
    "dit2023": {},
    "time": {"time": "logit_normal"},
    "shift": {"time": "logit_normal", "shift": "auto"},
    "norm": {"norm": "rms"},
    "mlp": {"mlp": "swiglu"},
    "positions": {"positions": "both"},
    "qk-norm": {"qk_norm": True},
    "tokens": {"conditioning": "tokens"},
    "x0": {"target": "x0", "weight": "velocity"},
    "direction": {"direction": 1.0},
    "muon": {"optimizer": "muon"},
    "modern": MODERN | {"time": "logit_normal"},
    "modern-muon": MODERN | {"time": "logit_normal", "optimizer": "muon"},
    "align": {"taught": True},
    "align-conv": {"taught": True, "projector": "conv", "normalize": "spatial"},
}


def test_a_variant_differs_from_the_base_in_what_its_name_says_alone(ablation: Any, tmp_path: Path) -> None:
    assert list(ablation.VARIANTS) == list(CHANGED)
    assert set(CHANGED) - set(ablation.Ablation(tmp_path, tmp_path).variants) == {"align", "align-conv"}
    for name, changed in CHANGED.items():
        task = task_of(ablation, tmp_path, name)
        assert kinds(task) == PLAIN | changed, name
        assert task.train.decay == "constant"


def test_an_unknown_variant_and_one_without_what_it_is_compared_with_are_errors(ablation: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no variant x"):
        ablation.Ablation(tmp_path, tmp_path, variants=("dit2023", "x"))
    with pytest.raises(ValueError, match="shift is compared with time"):
        ablation.Ablation(tmp_path, tmp_path, variants=("dit2023", "shift"))


def test_changes_are_taken_seed_by_seed_and_the_variance_of_their_logarithms_is_pooled(ablation: Any) -> None:
    """Seeds that are far apart do not hide a change that all of them have; by hand for three variants and seeds."""
    base = [1.0, 5.0, 9.0]
    logs = {"norm": [-0.5, -0.6, -0.4], "mlp": [0.1, 0.0, -0.1], "muon": [1.0, 1.1, 0.9]}
    values = {name: [b * math.exp(each) for b, each in zip(base, own, strict=True)] for name, own in logs.items()}
    found = ablation.compare({"dit2023": base, **values})
    half = stats.t.ppf(0.975, 6) * math.sqrt(0.01 / 3)
    assert {name: cell["verdict"] for name, cell in found.items()} == {"norm": "better", "mlp": "=", "muon": "worse"}
    for name, own in logs.items():
        mean = sum(own) / 3
        assert found[name]["change"] == pytest.approx(math.expm1(mean), abs=1e-12)
        assert found[name]["interval"] == pytest.approx([math.expm1(mean - half), math.expm1(mean + half)])
    far = ablation.compare({"dit2023": base, **values, "x0": [40.0, 220.0, 325.0]})
    assert far["norm"]["interval"] == pytest.approx(found["norm"]["interval"], abs=0.02), (
        "what is far off widens no other"
    )
    assert ablation.compare({"dit2023": [1.0], "norm": [2.0]})["norm"] == {
        "change": 1.0,
        "interval": None,
        "verdict": "one seed",
    }


def test_a_variant_whose_steps_take_longer_has_fewer_in_equal_seconds(ablation: Any, tmp_path: Path) -> None:
    task = ablation.Ablation(tmp_path, tmp_path, steps=1000)
    found = ablation.stops(task, {"dit2023": 0.02, "muon": 0.05}, "muon")
    assert found == {"steps": 1000, "seconds": 400}


def test_stops_stay_when_a_variant_is_added(ablation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is twice as slow by then, which is no property of the new one."""
    timed: list[str] = []

    class Timed:
        def __init__(self, task: object, name: str) -> None:
            self.seconds = slower * {"dit2023": 0.02, "norm": 0.03, "mlp": 0.05}[name]
            timed.append(name)

        def turn(self) -> float:
            return self.seconds

    monkeypatch.setattr(ablation, "Timed", Timed)
    for slower, names in ((1, ("dit2023", "norm")), (2, ("dit2023", "norm", "mlp")), (5, ("dit2023", "mlp"))):
        found = ablation.step_seconds(ablation.Ablation(tmp_path, tmp_path / "x.json", variants=names))
        assert found == pytest.approx({"dit2023": 0.02, "norm": 0.03} | ({"mlp": 0.05} if slower > 1 else {}))
    assert timed == ["dit2023", "norm", "dit2023", "mlp"]


def test_the_checkpoint_of_an_early_stop_is_kept(
    ablation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(ablation.train_latent, "command", calls.append)
    ablation.train(ablation.Ablation(tmp_path, tmp_path / "x.json"), "muon", 0, {"steps": 2000, "seconds": 90})
    flags = dict(zip(calls[0], calls[0][1:], strict=False))
    steps, every, keep = (int(flags[name]) for name in ("--steps", "--save-every", "--keep"))
    assert (steps, every) == (2000, 90) and keep >= len({*range(every, steps + 1, every), steps})


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_ends_in_figures_and_a_table(ablation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stops of a variant are measured, each at its own step."""
    monkeypatch.setattr(ablation, "step_seconds", lambda task: {"dit2023": 0.02, "norm": 0.04})
    task = ablation.Ablation(
        tmp_path / "runs", tmp_path / "x.json", variants=("dit2023", "norm"), steps=20, seeds=(0, 1), n=40, nfe=2
    )
    ablation.main(task)
    found = json.loads(task.json.read_text())
    base, norm = found["rows"]
    assert (base["stops"], norm["stops"]) == ({"steps": 20, "seconds": 20}, {"steps": 20, "seconds": 10})
    cells = {name: cell["values"] for name, cell in norm["cells"].items()}
    assert cells["steps distance"] != cells["seconds distance"]
    assert base["cells"]["steps distance"]["values"] == base["cells"]["seconds distance"]["values"]
    assert (found["tokens"], found["n"], found["nfe"]) == (4, 40, 2)
