"""Steps that do not count, going back to a checkpoint, and what several processes decide together."""

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from multiprocess import together
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from midway.gen.core import randomness
from midway.gen.core.errors import DivergedError, MidwayError
from midway.gen.core.runs import Run
from midway.gen.tokenizer.objective import TokenizerObjective
from midway.gen.training import fit as fitting
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.batches import Context, ImageBatch
from midway.gen.training.config import TrainConfig, learning_rate
from midway.gen.training.ema import EMA
from midway.gen.training.fit import fit
from midway.gen.training.interface import FitResult, Items
from midway.gen.training.nonfinite import RECENT, NonFiniteGuard, StopFlags
from midway.gen.training.signals import Interrupted
from midway.tokenizers.tokenizer import ImageTokenizer

SIZE = 12
CONFIG = TrainConfig(
    steps=10, batch_size=4, lr=0.05, warmup=3, weight_decay=0.1, clip=0.5, ema=0.8, log_every=2, patience=3, keep=2
)
Fault = Callable[[Context], Tensor]
"""bool (B,): which samples of this micro-batch are bad."""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """float64 on the CPU; Accelerate keeps one state per process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class _Overflow(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.inf


class Tiny(nn.Module):
    """Linear regression in float64 on noisy inputs, with a buffer that learns. Samples of `fault` spoil the loss, or
    with `gradient` only its gradient."""

    average: Tensor

    def __init__(self, fault: Fault | None = None, gradient: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("average", torch.zeros(3, dtype=torch.float64))
        self.fault, self.gradient = fault, gradient
        self.seen: list[int] = []

    def loss(self, batch: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(context.step)
        x = batch + 0.3 * context.normal("noise", (3,)).double()
        errors = (x @ self.weight + self.bias - batch.sum(1).sin()).square()
        bad = torch.zeros(len(batch), dtype=torch.bool) if self.fault is None else self.fault(context)
        if bad.any():
            errors = _Overflow.apply(errors) if self.gradient else torch.where(bad, torch.nan, errors)
        half = context.uniform("half") < 0.5
        return errors.mean(), {"largest": errors.max(), "half": torch.stack([errors[half].sum(), half.sum()])}

    def after_step(self, step_ok: Tensor) -> None:
        self.average.lerp_(self.weight.detach(), 0.3 * step_ok)


def in_steps(*steps: int) -> Fault:
    """The last sample of these steps is bad: it belongs to the last process, and to its last micro-batch."""
    last = torch.tensor([(step + 1) * CONFIG.batch_size - 1 for step in steps])
    return lambda context: torch.isin(context.sample_ids, last)


def from_step(first: int) -> Fault:
    """As `in_steps`, and never again good."""
    return in_steps(*range(first, 1000))


class Once:
    """`in_steps`, but each step is bad only the first time it is trained."""

    def __init__(self, *steps: int) -> None:
        self.left = set(steps)

    def __call__(self, context: Context) -> Tensor:
        bad = in_steps(*self.left)(context)
        if bad.any():
            self.left.remove(context.step)
        return bad


def numbers() -> Tensor:
    return torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass
class Trained:
    """A run after fit()."""

    model: Tiny
    result: FitResult
    run: Run

    @property
    def records(self) -> list[dict[str, float]]:
        return records_of(self.run.path)


def records_of(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def train(folder: Path, model: Tiny, config: TrainConfig = CONFIG, resume: bool = False) -> Trained:
    folder.mkdir(parents=True, exist_ok=True)
    run, items = Run(folder, "test"), Items(numbers().__getitem__, SIZE)
    return Trained(model, fit(model, items, config, run, make_accelerator(config), None, resume), run)


def saved(folder: Path, step: int | None = None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, the newest by default, as file/name."""
    steps = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")]
    path = folder / "checkpoints" / f"step-{max(steps) if step is None else step}"
    return {
        f"{file.stem}/{name}": value for file in path.glob("*.safetensors") for name, value in load_file(file).items()
    }


def assert_all_finite(folder: Path) -> None:
    """No checkpoint of the run holds a value that is not finite."""
    found = list((folder / "checkpoints").glob("*/*.safetensors"))
    assert found
    for file in found:
        for name, value in load_file(file).items():
            assert bool(torch.isfinite(value.double()).all()), f"{file}: {name}"


# ---- one bad step ----


def loop_without(skipped: set[int], config: TrainConfig = CONFIG) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """What fit() should do, in plain torch: in a skipped step the optimizer does not step and nothing is logged, but order,
    noise and rate go by the number of the step, and the weight average averages the unchanged weights once more."""
    model, images = Tiny(), numbers()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    stream = torch.cat([randomness.permutation(config.seed, "order", epoch, SIZE) for epoch in range(10)])
    average, sums, intervals = EMA(model, config.ema), [], []
    for step in range(config.steps):
        if step not in skipped:
            ids = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
            optimizer.param_groups[0]["lr"] = learning_rate(config, step)
            optimizer.zero_grad()
            loss, logs = model.loss(images[stream[ids]], Context(config.seed, step, ids))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            model.after_step(torch.tensor(True))
            sums.append((loss.detach(), logs["largest"].detach(), norm, *logs["half"].detach()))
        average.update(model, step)
        if (step + 1) % config.log_every == 0:
            loss, largest, norm, half, count = torch.tensor(sums).view(-1, 5).sum(0).tolist() if sums else [0.0] * 5
            means = {"loss": loss, "largest": largest, "gradient_norm": norm} if sums else {}
            means = {name: value / len(sums) for name, value in means.items()}
            intervals.append(means | ({"half": half / count} if count else {}))
            sums = []
    state = {f"model/{name}": value.detach() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return state | {f"ema/{name}": value for name, value in average.shadow.items()}, intervals


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("skipped", [{4}, {0}, {9}, {2, 3}], ids=str)
def test_a_bad_step_is_as_if_it_had_not_been(
    tmp_path: Path, gradient: bool, accumulation: int, skipped: set[int]
) -> None:
    """Weights, moments, buffers and logged means are those of a loop that leaves the step out; the average goes on."""
    trained = train(tmp_path, Tiny(in_steps(*skipped), gradient), replace(CONFIG, accumulation=accumulation))
    state, intervals = loop_without(skipped)
    found = saved(tmp_path)
    for name, value in state.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=0, atol=1e-11)
    assert_all_finite(tmp_path)
    for record, means in zip(trained.records, intervals, strict=True):
        names = {"loss", "half", "gradient_norm"} | ({"largest"} if accumulation == 1 else set())
        assert means.keys() & names == record.keys() & names
        for name in means.keys() & names:
            assert record[name] == pytest.approx(means[name], rel=1e-5)
    assert f"{len(skipped)} of 10 steps were skipped" in (tmp_path / "log.txt").read_text()


def test_a_bad_step_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, buffers and moments before and after it are equal; the average is not."""
    model = Tiny()
    states: dict[int, dict[str, Tensor]] = {}
    optimizers: list[torch.optim.Optimizer] = []
    really = fitting.make_optimizers
    monkeypatch.setattr(fitting, "make_optimizers", lambda *a: optimizers.extend(really(*a)) or optimizers)

    def note(context: Context) -> Tensor:
        moments = [v for o in optimizers for state in o.state.values() for v in state.values()]
        everything = [*model.state_dict().values(), *moments]
        states[context.step] = {str(i): value.detach().clone() for i, value in enumerate(everything)}
        return in_steps(4)(context)

    model.fault = note
    train(tmp_path, model)
    assert states[4].keys() == states[5].keys()
    assert len(states[4]) == 3 + 2 * 3
    assert all(torch.equal(value, states[5][name]) for name, value in states[4].items())
    assert not all(torch.equal(value, states[6][name]) for name, value in states[5].items())


def test_skipped_steps_are_counted_and_said(tmp_path: Path) -> None:
    trained = train(tmp_path, Tiny(in_steps(2, 5, 6)))
    assert [record.get("skipped") for record in trained.records] == [None, 1, 2, 3, 3]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in lines if "skipped" in line][-1] == (
        "3 of 10 steps were skipped: their loss or gradient was not finite"
    )
    train(tmp_path / "good", Tiny())
    assert "skipped" not in (tmp_path / "good" / "log.txt").read_text()


def test_the_count_of_skipped_steps_goes_on_with_a_resumed_run(tmp_path: Path) -> None:
    train(tmp_path, Tiny(in_steps(1)), replace(CONFIG, max_steps=5))
    assert train(tmp_path, Tiny(in_steps(1, 7)), resume=True).records[-1]["skipped"] == 2


def pictures() -> Tensor:
    return torch.randint(0, 256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Tokenizing(TokenizerObjective):
    """A small VQ tokenizer; in the steps of `bad` one reconstruction is NaN, after its codes have been gathered."""

    def __init__(self, bad: set[int]) -> None:
        torch.manual_seed(0)
        quantizer = {"type": "vq", "codebook_size": 8, "dim": 4, "decay": 0.5}
        super().__init__(ImageTokenizer(width=8, blocks=1, quantizer=quantizer))
        self.bad = bad

    def loss(self, batch: ImageBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = super().loss(batch, context)
        return (loss * math.nan if context.step in self.bad else loss), logs


def images(wanted: Tensor) -> ImageBatch:
    return ImageBatch(pictures()[wanted], torch.zeros(len(wanted), dtype=torch.int64))


def codebooks_without(skipped: set[int], config: TrainConfig) -> Tokenizing:
    """The plain loop for the tokenizer: nothing at all happens in a skipped step."""
    model = Tokenizing(set()).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)
    stream = torch.cat([randomness.permutation(config.seed, "order", epoch, 16) for epoch in range(10)])
    model.start(images(stream[:8]), Context(config.seed, 0, torch.arange(8)))
    for step in sorted(set(range(config.steps)) - skipped):
        ids = torch.arange(step * 8, step * 8 + 8)
        optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        optimizer.zero_grad()
        model.loss(images(stream[ids]), Context(config.seed, step, ids))[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        model.after_step(torch.tensor(True))
    return model


def test_a_codebook_learns_nothing_from_a_bad_step(tmp_path: Path) -> None:
    """Its statistics were gathered in forward, and have to be forgotten: the next update is that of the next step alone."""
    config = replace(CONFIG, steps=6, batch_size=8, lr=1e-3)
    model, run = Tokenizing({2, 3}), Run(tmp_path, "test")
    fit(model, Items(images, 16), config, run, make_accelerator(config))
    expected = codebooks_without({2, 3}, config)
    assert_all_finite(tmp_path)
    for name, value in expected.state_dict().items():
        if name.endswith("bottleneck.step"):  # counts forgotten updates too
            assert model.state_dict()[name] == value + 2
        else:
            torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=2e-6)
    with_them = codebooks_without(set(), config).tokenizer.quantizer
    assert not torch.allclose(with_them.state_dict()["codebook"], expected.tokenizer.quantizer.state_dict()["codebook"])


# ---- too many bad steps ----


def test_a_fault_that_stays_ends_the_run_after_going_back_once(tmp_path: Path) -> None:
    model = Tiny(from_step(5))
    config = replace(CONFIG, save_every=4)
    with pytest.raises(DivergedError, match="it was reset once already") as caught:
        train(tmp_path, model, config)
    assert caught.value.exit_code == 4
    assert model.seen == [*range(8), *range(4, 8)], "patience, back to step 4, patience again"
    assert caught.value.why.count("nan") == 3
    assert caught.value.why.endswith(", nan, nan, nan")
    log = (tmp_path / "log.txt").read_text()
    assert log.count("back to step 4") == 1
    assert "step 8: 3 bad steps in a row" in log
    assert_all_finite(tmp_path)
    assert {"model/weight", "ema/weight"} <= saved(tmp_path).keys()
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-4"]


def test_the_last_losses_are_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as caught:
        train(tmp_path, Tiny(from_step(4)), replace(CONFIG, log_every=1))
    losses = [f"{record['loss']:.4g}" for record in records_of(tmp_path) if "loss" in record]
    assert len(losses) == 4
    assert f"the last losses were {', '.join(losses)}, nan, nan, nan" in caught.value.why


def test_without_a_checkpoint_the_run_ends_at_once(tmp_path: Path) -> None:
    model = Tiny(from_step(2))
    with pytest.raises(DivergedError, match="there is no checkpoint to return to") as caught:
        train(tmp_path, model)
    assert caught.value.exit_code == 4
    assert model.seen == list(range(5))
    assert not list(tmp_path.glob("checkpoints/*"))


def test_fewer_bad_steps_than_patience_never_go_back(tmp_path: Path) -> None:
    """Two bad, one good, two bad: the good one starts the count again."""
    model = Tiny(in_steps(3, 4, 6, 7))
    assert train(tmp_path, model, replace(CONFIG, save_every=2)).result.finished
    assert model.seen == list(range(10))


def test_a_fault_that_passes_leaves_the_run_as_it_would_have_been(tmp_path: Path) -> None:
    """Bad for `patience` steps, good after going back: every tensor and every line of metrics of a run without a fault."""
    config = replace(CONFIG, save_every=4, posthoc=(0.1,))
    model = Tiny(Once(5, 6, 7))
    recovered = train(tmp_path / "fault", model, config)
    assert model.seen == [*range(8), *range(4, 10)]
    good = train(tmp_path / "good", Tiny(), config)
    assert recovered.records == good.records
    mine, theirs = saved(tmp_path / "fault"), saved(tmp_path / "good")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert json.loads((tmp_path / "fault/checkpoints/step-10/state.json").read_text())["rolled_back"] is True


def test_a_resumed_run_remembers_that_it_went_back(tmp_path: Path) -> None:
    """Else a run that diverges and is started again by a scheduler would never end."""
    config = replace(CONFIG, save_every=4)
    train(tmp_path, Tiny(Once(5, 6, 7)), replace(config, max_steps=9))
    model = Tiny(in_steps(9, 10, 11))
    with pytest.raises(DivergedError, match="reset once already"):
        train(tmp_path, model, replace(config, steps=20), resume=True)
    assert model.seen == [9, 10, 11]


def test_a_run_of_bad_steps_alone_is_diverged_even_if_it_is_short(tmp_path: Path) -> None:
    """Fewer steps than patience: there is nothing worth saving."""
    with pytest.raises(DivergedError, match="every loss so far") as caught:
        train(tmp_path, Tiny(from_step(0)), replace(CONFIG, steps=2))
    assert caught.value.exit_code == 4
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("config", [replace(CONFIG, save_every=1), replace(CONFIG, save_seconds=1e-9)])
def test_a_bad_first_step_does_not_end_a_run_that_saves_often(tmp_path: Path, config: TrainConfig) -> None:
    """There is nothing to save yet; whether to go on is for `patience` to say."""
    assert train(tmp_path, Tiny(in_steps(0)), config).result.finished


def test_going_back_is_to_before_the_bad_steps(tmp_path: Path) -> None:
    """However often the run saves: what the last good step left is never replaced by copies of itself."""
    model = Tiny(Once(5, 6, 7))
    recovered = train(tmp_path / "fault", model, replace(CONFIG, save_every=1))
    assert model.seen == [*range(8), *range(5, 10)]
    assert recovered.records == train(tmp_path / "good", Tiny(), replace(CONFIG, save_every=1)).records
    assert "skipped" not in recovered.records[-1]


def test_a_run_that_is_stopped_after_bad_steps_alone_goes_on_later(tmp_path: Path) -> None:
    """Whoever stops it wants it saved; that nothing was learned is for the end to say."""
    assert train(tmp_path, Tiny(in_steps(0)), replace(CONFIG, max_steps=1)).result.steps == 1
    resumed = train(tmp_path, Tiny(in_steps(0)), resume=True)
    whole = train(tmp_path / "whole", Tiny(in_steps(0)))
    assert resumed.records == whole.records
    assert all(torch.equal(value, whole.model.state_dict()[k]) for k, value in resumed.model.state_dict().items())


class Spoiled(Tiny):
    """Finite loss and gradient, but a buffer becomes infinite."""

    def after_step(self, step_ok: Tensor) -> None:
        super().after_step(step_ok)
        self.average[1] = math.inf


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """Whatever the reason: the message names the tensor, and the checkpoint before it stays."""
    train(tmp_path, Tiny(), replace(CONFIG, max_steps=4))
    with pytest.raises(DivergedError, match="model: average") as caught:
        train(tmp_path, Spoiled(), resume=True)
    assert caught.value.exit_code == 4
    assert_all_finite(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-4"]


def test_the_guard_gives_the_last_losses_in_their_order() -> None:
    """Oldest first, the last 20; the norm where that is what was not finite."""
    guard = NonFiniteGuard(make_accelerator(CONFIG))
    for step in range(RECENT + 7):
        norm = torch.tensor(math.inf if step == RECENT else 1.0)
        guard.judge(torch.tensor(float(step)), norm, StopFlags())
        if step == 2:
            assert guard.losses() == [0.0, 1.0, 2.0]
    expected = [float(step) for step in range(7, RECENT + 7)]
    expected[RECENT - 7] = math.inf
    assert guard.losses() == expected
    assert guard.skipped == 1


@pytest.mark.parametrize("loss", [1.0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", [1.0, math.nan, math.inf])
def test_a_step_counts_when_loss_and_norm_are_finite(loss: float, norm: float) -> None:
    guard, stop_flags = NonFiniteGuard(make_accelerator(CONFIG)), StopFlags(late=True)
    kept = guard.judge(torch.tensor(loss), torch.tensor(norm), stop_flags)
    assert kept.item() is (math.isfinite(loss) and math.isfinite(norm))
    decision = guard.read()
    assert (decision.streak, guard.skipped, decision.stop_flags) == (int(not kept), int(not kept), stop_flags)


def test_bad_steps_in_a_row_are_counted_until_a_good_one() -> None:
    guard, streaks = NonFiniteGuard(make_accelerator(CONFIG)), []
    for loss in (1.0, math.nan, math.inf, 1.0, math.nan, 2.0):
        guard.judge(torch.tensor(loss), torch.tensor(1.0), StopFlags())
        streaks.append(guard.read().streak)
    assert streaks == [0, 1, 2, 0, 1, 0]
    assert guard.skipped == 3


# ---- two processes ----


@dataclass(frozen=True)
class Scenario:
    """What one of two processes does: its model and its configuration."""

    model: Callable[[int], Tiny]
    config: Callable[[int], TrainConfig] = field(default=lambda rank: CONFIG)


def signalled(rank: int) -> Tiny:
    """Process 1 alone hears SIGTERM, in step 3."""

    def fault(context: Context) -> Tensor:
        if rank == 1 and context.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.zeros(len(context.sample_ids), dtype=torch.bool)

    return Tiny(fault)


SAVING = replace(CONFIG, save_every=4)
SCENARIOS = {
    "loss": Scenario(lambda rank: Tiny(in_steps(2, 5))),
    "gradient": Scenario(lambda rank: Tiny(in_steps(2, 5), gradient=True)),
    "accumulation": Scenario(lambda rank: Tiny(in_steps(2, 5)), lambda rank: replace(CONFIG, accumulation=2)),
    "forever": Scenario(lambda rank: Tiny(from_step(5)), lambda rank: SAVING),
    "transient": Scenario(lambda rank: Tiny(Once(5, 6, 7)), lambda rank: SAVING),
    "signal": Scenario(signalled),
    "late": Scenario(lambda rank: Tiny(), lambda rank: replace(CONFIG, max_seconds=0.0 if rank == 1 else None)),
}


def one_of_two(rank: int, folder: Path) -> None:
    """Train every scenario in this process; leave the model and what became of it."""
    for name, scenario in SCENARIOS.items():
        model, outcome = scenario.model(rank), {}
        try:
            result = train(folder / name, model, scenario.config(rank)).result
            outcome = {"steps": result.steps, "exit": 0, "last": result.last}
        except MidwayError as error:
            outcome = {"exit": error.exit_code, "error": str(error)}
        save_file(model.state_dict(), folder / f"{name}-{rank}.safetensors")
        (folder / f"{name}-{rank}.json").write_text(json.dumps({**outcome, "seen": model.seen}))


@dataclass(frozen=True)
class Pair:
    """What two processes left of one scenario."""

    folder: Path
    states: list[dict[str, Tensor]]
    outcomes: list[dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """`two("loss")`: that scenario on two processes, all trained in one launch."""
    folder = tmp_path_factory.mktemp("two")
    together(one_of_two, 2, folder)

    def pair(name: str) -> Pair:
        states = [load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1)]
        outcomes = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()), "equal on both"
        return Pair(folder / name, states, outcomes)

    return pair


@pytest.mark.parametrize("name", ["loss", "gradient", "accumulation"])
def test_a_fault_of_one_process_is_skipped_by_all(name: str, two: Callable[[str], Pair]) -> None:
    """Only the second process sees the bad sample; both go on, with the weights of a loop that leaves the steps out."""
    pair = two(name)
    expected, intervals = loop_without({2, 5})
    for key, value in pair.states[0].items():
        torch.testing.assert_close(value, expected[f"model/{key}"], rtol=0, atol=1e-11)
    per_step = 2 if name == "accumulation" else 1
    assert pair.outcomes[0]["seen"] == pair.outcomes[1]["seen"] == [s for s in range(10) for _ in range(per_step)]
    records = records_of(pair.folder)
    assert [record.get("skipped") for record in records] == [None, 1, 2, 2, 2]
    for record, means in zip(records, intervals, strict=True):
        assert record["loss"] == pytest.approx(means["loss"], rel=1e-5)
        assert record.get("half") == pytest.approx(means.get("half"), rel=1e-5)
    assert_all_finite(pair.folder)


def test_two_processes_go_back_and_end_together(tmp_path: Path, two: Callable[[str], Pair]) -> None:
    """With the words of one process that trains alone: the losses in them are means over all."""
    pair = two("forever")
    with pytest.raises(DivergedError) as alone:
        train(tmp_path, Tiny(from_step(5)), SAVING)
    assert [outcome["exit"] for outcome in pair.outcomes] == [4, 4]
    assert [outcome["seen"] for outcome in pair.outcomes] == [[*range(8), *range(4, 8)]] * 2
    assert [outcome["error"] for outcome in pair.outcomes] == [str(alone.value)] * 2
    assert (pair.folder / "log.txt").read_text().count("back to step 4") == 1
    assert_all_finite(pair.folder)


def test_two_processes_recover_from_a_fault_of_one(tmp_path: Path, two: Callable[[str], Pair]) -> None:
    pair, good = two("transient"), train(tmp_path, Tiny(), SAVING)
    assert [outcome["seen"] for outcome in pair.outcomes] == [[*range(8), *range(4, 10)]] * 2
    for key, value in good.model.state_dict().items():
        torch.testing.assert_close(pair.states[0][key], value, rtol=0, atol=1e-11)


def test_a_signal_to_one_process_stops_both_after_the_same_step(two: Callable[[str], Pair]) -> None:
    """Exit code 128 + 15 for both, and the step in which it came is in the checkpoint."""
    pair = two("signal")
    for outcome in pair.outcomes:
        assert outcome["exit"] == 143
        assert "stopped by SIGTERM at step" in outcome["error"]
    assert pair.outcomes[0]["error"] == pair.outcomes[1]["error"]
    steps = [len(outcome["seen"]) for outcome in pair.outcomes]
    assert steps[0] == steps[1] in (4, 5), "the wish is heard in the step it came in, or in the next"
    newest = saved(pair.folder, steps[0])
    assert all(torch.equal(newest[f"model/{key}"], value) for key, value in pair.states[0].items())


def test_the_time_of_one_process_stops_both(two: Callable[[str], Pair]) -> None:
    pair = two("late")
    assert [(outcome["exit"], outcome["steps"]) for outcome in pair.outcomes] == [(0, 1), (0, 1)]
    assert saved(pair.folder).keys()


def test_a_signal_to_a_single_process_is_an_exit_code_too(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="SIGTERM at step") as caught:
        train(tmp_path, signalled(1))
    assert caught.value.exit_code == 143
    assert saved(tmp_path).keys()
    resumed = train(tmp_path, Tiny(), resume=True)
    whole = train(tmp_path / "whole", Tiny())
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in resumed.model.state_dict().items())
