"""A training is resumed from exactly the tensors that it has, or not at all."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import regression
import torch
from damages import DAMAGES, Tensors, damage, read, with_all, with_one
from regression import Regression, Trained
from resuming import assert_same_run, newest, seal, unchanged
from safetensors.torch import save_file
from torch import nn

from midway.gen.core.errors import DataError
from midway.gen.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("on_the_cpu", "one_thread")

CONFIG = TrainConfig(steps=6, batch_size=4, lr=0.05, warmup=0, ema=0.5, posthoc=(0.1,), max_steps=4, log_every=3)
FILES = ("model", "ema", "posthoc-0.100", "optimizer")
MISFITS: dict[str, Callable[[Tensors], Tensors]] = {
    **{name: change for name, change in DAMAGES.items() if "float64" not in name},
    "one of float32": with_one(lambda v: v.float()),
    "all of float32": with_all(torch.float32),
}
"""The regression is in float64."""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after four of six steps, within an interval of the log."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    regression.train(folder, CONFIG)
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def resume(run: Path, model: Regression | None = None, config: TrainConfig = CONFIG) -> Trained:
    return regression.train(run, replace(config, max_steps=None), model, resume=True)


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Other tensors, in a checkpoint whose manifest agrees with them."""
    tensors, _ = read(file)
    save_file(change(tensors), file)
    seal(file.parent)


@pytest.mark.parametrize(("state", "value"), [("step", -1.0), ("step", 5.0), ("exp_avg_sq", -1.0)])
def test_states_that_no_optimizer_has_raise(state: str, value: float, run: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {name: torch.full_like(v, value) if name == f"weight/{state}" else v for name, v in tensors.items()}

    rewrite(newest(run) / "optimizer.safetensors", change)
    with (
        unchanged(run),
        pytest.raises(DataError, match=rf"optimizer\.safetensors does not fit(?s:.)*weight/{state} is"),
    ):
        resume(run)


def test_an_undamaged_one_is_resumed(run: Path) -> None:
    assert resume(run).result.steps == 6


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("file", FILES)
def test_other_tensors_raise_and_nothing_changes(file: str, name: str, run: Path) -> None:
    path = newest(run) / f"{file}.safetensors"
    rewrite(path, MISFITS[name])
    with unchanged(run), pytest.raises(DataError, match="does not fit this training") as caught:
        resume(run)
    assert str(path) in caught.value.what and caught.value.exit_code == 3


def validated(step: int, since: int, value: float = 0.5) -> Tensors:
    """The state of `Validation`."""
    return {
        "validation/value": torch.tensor(value, dtype=torch.float64),
        "validation/steps": torch.tensor([step, since]),
    }


PROGRESS: dict[str, Callable[[Tensors], Tensors]] = {
    "no tensor": lambda tensors: {},
    "no counter": lambda tensors: {name: v for name, v in tensors.items() if not name.startswith("guard/")},
    "another part": lambda tensors: {**tensors, "x/y": torch.zeros(1)},
    "counters below 0": lambda tensors: {**tensors, "guard/counts": torch.tensor([-1, 0])},
    "more bad steps than steps": lambda tensors: {**tensors, "guard/counts": torch.tensor([0, 5])},
    "more in a row than at all": lambda tensors: {**tensors, "guard/counts": torch.tensor([2, 1])},
    "a validation to come": lambda tensors: {**tensors, **validated(5, 0)},
    "a validation before the first": lambda tensors: {**tensors, **validated(-2, 0)},
    "validations below 0": lambda tensors: {**tensors, **validated(3, -1)},
    "a best that is not finite": lambda tensors: {**tensors, **validated(3, 0, float("inf"))},
    "a counter of floats": lambda tensors: {**tensors, "guard/counts": torch.zeros(2)},
    "three counters": lambda tensors: {**tensors, "guard/counts": torch.zeros(3, dtype=torch.int64)},
    "half a validation": lambda tensors: {**tensors, "validation/value": torch.zeros((), dtype=torch.float64)},
    "sums of another shape": lambda tensors: {
        n: v[..., :1].clone() if n.startswith("interval/") else v for n, v in tensors.items()
    },
    "sums of integers": lambda tensors: {n: v.long() if n.startswith("interval/") else v for n, v in tensors.items()},
}


@pytest.mark.parametrize("change", PROGRESS.values(), ids=PROGRESS)
def test_other_counters_raise(change: Callable[[Tensors], Tensors], run: Path) -> None:
    assert any(name.startswith("interval/") for name in read(newest(run) / "progress.safetensors")[0])
    rewrite(newest(run) / "progress.safetensors", change)
    with unchanged(run), pytest.raises(DataError, match=r"progress\.safetensors does not fit"):
        resume(run)


@pytest.mark.parametrize(
    "change",
    [
        *({key: None} for key in ("step", "steps", "seconds", "rolled_back", "processes", "config")),
        *({"step": 3}, {"step": "4"}, {"seconds": "1"}, {"rolled_back": 0}, {"config": []}, {"stateless": "weight"}),
        *({"stateless": ["weight"]}, {"processes": 1.5}, {"stepp": 4}),
        *({"steps": 3}, {"seconds": -1.0}, {"seconds": float("inf")}, {"processes": 0}),
    ],
    ids=str,
)
def test_another_state_raises(change: dict[str, object], run: Path) -> None:
    file = newest(run) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    seal(file.parent)
    with unchanged(run), pytest.raises(DataError):
        resume(run)


def test_the_one_before_is_resumed_where_the_newest_is_damaged(tmp_path: Path) -> None:
    """Its manifest too, whatever it holds; what was passed over is named."""
    regression.train(tmp_path / "run", replace(CONFIG, save_every=1))
    manifest = newest(tmp_path / "run") / "manifest.json"
    assert manifest.parent.name == "step-4"
    for text in (
        "[]",
        "null",
        '{"files": null}',
        "[" * 100_000,
        manifest.read_text().replace('"files": {', '"files": {"x": 3,'),
    ):
        copy = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
        (copy / "checkpoints/step-4/manifest.json").write_text(text)
        trained = resume(copy)
        assert trained.result.steps == 6 and len(trained.items) == 3
        assert any("skipped step-4: its manifest" in line for line in trained.lines)
        shutil.rmtree(copy)


def test_a_file_that_was_not_written_with_the_others_raises(run: Path) -> None:
    """Or an average that a run never had would be used."""
    shutil.copy(newest(run) / "model.safetensors", newest(run) / "posthoc-0.200.safetensors")
    with pytest.raises(DataError, match=r"posthoc-0\.200\.safetensors was not written with it"):
        newest(run)


class Unused(Regression):
    """With a parameter that has no gradient until the third step."""

    def __init__(self) -> None:
        super().__init__()
        self.later = nn.Parameter(torch.ones((), dtype=torch.float64))

    def loss(self, batch: torch.Tensor, context: regression.Context) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, logs = super().loss(batch, context)
        return (loss + self.later.square() if context.step > 2 else loss), logs


def test_a_parameter_without_a_gradient_so_far_is_resumed(tmp_path: Path) -> None:
    """And only then its state may be missing."""
    short = replace(CONFIG, max_steps=2)
    regression.train(tmp_path / "run", short, Unused())
    file = newest(tmp_path / "run") / "state.json"
    assert json.loads(file.read_text())["stateless"] == ["later"]
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert resume(tmp_path / "run", Unused()).result.steps == 6
    assert json.loads((newest(tmp_path / "run") / "state.json").read_text())["stateless"] == []
    file = newest(tmp_path / "run") / "optimizer.safetensors"
    damage(file, "half the tensors")
    seal(file.parent)
    with pytest.raises(DataError, match="missing"):
        resume(tmp_path / "run", Unused())
    file = newest(tmp_path / "other") / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "stateless": []}))
    seal(file.parent)
    with pytest.raises(DataError, match="missing"):
        resume(tmp_path / "other", Unused())


class Adversarial(Unused):
    """`later` is a discriminator, which begins at the third step."""

    discriminator_prefix = "later"
    discriminator_rate = 1.0


def test_files_of_earlier_versions_do_not_list_parameters_without_a_state(tmp_path: Path) -> None:
    """Those of a discriminator that has not begun may lack theirs, and no others."""
    regression.train(tmp_path / "run", replace(CONFIG, max_steps=2), Adversarial())
    file = newest(tmp_path / "run") / "state.json"
    found = json.loads(file.read_text())
    assert found.pop("stateless") == ["later"]
    file.write_text(json.dumps(found))
    seal(file.parent)
    emptied = Path(shutil.copytree(tmp_path / "run", tmp_path / "emptied"))
    expected = regression.train(tmp_path / "expected", replace(CONFIG, max_steps=None), Adversarial())
    assert resume(tmp_path / "run", Adversarial()).result.steps == expected.result.steps == 6
    assert_same_run(tmp_path / "run", tmp_path / "expected")
    rewrite(newest(emptied) / "optimizer.safetensors", lambda tensors: {})
    with pytest.raises(DataError, match="missing"):
        resume(emptied, Adversarial())
