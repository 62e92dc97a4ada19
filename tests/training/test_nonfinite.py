"""Steps that do not count, going back to a checkpoint, and what several processes decide together."""

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import regression
import torch
from multiprocess import together
from regression import (
    BATCH,
    Fault,
    Regression,
    Trained,
    assert_near,
    assert_same_bits,
    in_steps,
    plain_loop,
    records,
    saved,
)
from safetensors.torch import load_file, save_file
from tensors import pixels
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.core.errors import DivergedError, MidwayError
from midway.gen.core.runs import Run
from midway.gen.core.signals import Interrupted
from midway.gen.tokenizer.objective import TokenizerObjective
from midway.gen.training import fit as fitting
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.batches import Context, ImageBatch
from midway.gen.training.config import TrainConfig, learning_rate
from midway.gen.training.fit import fit
from midway.gen.training.interface import Items
from midway.gen.training.nonfinite import RECENT, NonFiniteGuard, StopFlags
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("on_the_cpu")

CONFIG = TrainConfig(
    steps=10, batch_size=BATCH, lr=0.05, warmup=3, weight_decay=0.1, clip=0.5, ema=0.8, log_every=2, patience=3, keep=2
)


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


def train(folder: Path, model: Regression, config: TrainConfig = CONFIG, resume: bool = False) -> Trained:
    return regression.train(folder, config, model, resume=resume)


def assert_all_finite(folder: Path) -> None:
    """No checkpoint of the run holds a value that is not finite."""
    found = list((folder / "checkpoints").glob("*/*.safetensors"))
    assert found
    for file in found:
        for name, value in load_file(file).items():
            assert bool(torch.isfinite(value.double()).all()), f"{file}: {name}"


# ---- one bad step ----


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("skipped", [{4}, {0}, {9}, {2, 3}], ids=str)
def test_a_bad_step_is_as_if_it_had_not_been(
    tmp_path: Path, gradient: bool, accumulation: int, skipped: set[int]
) -> None:
    """Weights, moments, buffers and logged means are those of a loop that leaves the step out; the average goes on."""
    trained = train(tmp_path, Regression(in_steps(*skipped), gradient), replace(CONFIG, accumulation=accumulation))
    expected = plain_loop(CONFIG, skipped)
    assert_near(saved(tmp_path), expected.state, atol=1e-11)
    assert_all_finite(tmp_path)
    for record, means in zip(trained.records, expected.intervals, strict=True):
        names = {"loss", "loss_time_0", "gradient_norm"} | ({"largest"} if accumulation == 1 else set())
        assert means.keys() & names == record.keys() & names
        for name in means.keys() & names:
            assert record[name] == pytest.approx(means[name], rel=1e-5)
    assert f"{len(skipped)} of 10 steps were skipped" in (tmp_path / "log.txt").read_text()


def test_a_bad_step_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, buffers and moments before and after it are equal; the average is not."""
    model = Regression()
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
    assert len(states[4]) == 4 + 2 * 3
    assert all(torch.equal(value, states[5][name]) for name, value in states[4].items())
    assert not all(torch.equal(value, states[6][name]) for name, value in states[5].items())


def test_skipped_steps_are_counted_and_logged(tmp_path: Path) -> None:
    trained = train(tmp_path, Regression(in_steps(2, 5, 6)))
    assert [record.get("skipped") for record in trained.records] == [None, 1, 2, 3, 3]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in lines if "skipped" in line][-1] == (
        "3 of 10 steps were skipped: their loss or gradient was not finite"
    )
    train(tmp_path / "good", Regression())
    assert "skipped" not in (tmp_path / "good" / "log.txt").read_text()


def test_a_resumed_run_continues_the_count_of_skipped_steps(tmp_path: Path) -> None:
    train(tmp_path, Regression(in_steps(1)), replace(CONFIG, max_steps=5))
    assert train(tmp_path, Regression(in_steps(1, 7)), resume=True).records[-1]["skipped"] == 2


class Tokenizing(TokenizerObjective):
    """A small VQ tokenizer; in the steps of `bad` the loss is NaN, after the statistics of codes have been gathered."""

    def __init__(self, bad: set[int]) -> None:
        torch.manual_seed(0)
        quantizer = {"type": "vq", "codebook_size": 8, "dim": 4, "decay": 0.5}
        super().__init__(ImageTokenizer(width=8, blocks=1, quantizer=quantizer))
        self.bad = bad

    def loss(self, batch: ImageBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = super().loss(batch, context)
        return (loss * math.nan if context.step in self.bad else loss), logs


def images(wanted: Tensor) -> ImageBatch:
    return ImageBatch(pixels(16)[wanted], torch.zeros(len(wanted), dtype=torch.int64))


def tokenizer_without(skipped: set[int], config: TrainConfig) -> dict[str, Tensor]:
    """The plain loop, in which nothing at all happens in a skipped step."""
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
    return model.state_dict()


def test_a_codebook_learns_nothing_from_a_bad_step(tmp_path: Path) -> None:
    """Its statistics were gathered in forward, and have to be forgotten: the next update is that of the next step alone."""
    config = replace(CONFIG, steps=6, batch_size=8, lr=1e-3)
    model = Tokenizing({2, 3})
    fit(model, Items(images, 16), config, Run(tmp_path, "test"), make_accelerator(config))
    assert_all_finite(tmp_path)
    expected, with_them = tokenizer_without({2, 3}, config), tokenizer_without(set(), config)
    for name, value in model.state_dict().items():
        counts = name.endswith("bottleneck.step")  # forgotten updates too
        torch.testing.assert_close(value, expected[name] + 2 if counts else expected[name], rtol=0, atol=2e-6)
    (codebook,) = (name for name in expected if name.endswith("codebook"))
    assert not torch.allclose(with_them[codebook], expected[codebook])


# ---- too many bad steps ----


def test_a_fault_that_stays_ends_the_run_after_going_back_once(tmp_path: Path) -> None:
    model = Regression(from_step(5))
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
        train(tmp_path, Regression(from_step(4)), replace(CONFIG, log_every=1))
    losses = [f"{record['loss']:.4g}" for record in records(tmp_path) if "loss" in record]
    assert len(losses) == 4
    assert f"the last losses were {', '.join(losses)}, nan, nan, nan" in caught.value.why


def test_without_a_checkpoint_the_run_ends_at_once(tmp_path: Path) -> None:
    model = Regression(from_step(2))
    with pytest.raises(DivergedError, match="there is no checkpoint to return to") as caught:
        train(tmp_path, model)
    assert caught.value.exit_code == 4
    assert model.seen == list(range(5))
    assert not list(tmp_path.glob("checkpoints/*"))


def test_fewer_bad_steps_than_patience_never_go_back(tmp_path: Path) -> None:
    """Two bad, one good, two bad: the good one starts the count again."""
    model = Regression(in_steps(3, 4, 6, 7))
    assert train(tmp_path, model, replace(CONFIG, save_every=2)).result.finished
    assert model.seen == list(range(10))


@pytest.mark.parametrize(("save_every", "back"), [(4, 4), (1, 5)])
def test_a_fault_that_passes_leaves_the_run_as_it_would_have_been(tmp_path: Path, save_every: int, back: int) -> None:
    """Bad for `patience` steps, good after going back: every tensor and every line of metrics of a run without a fault. However
    often the run saves, it goes back to before the bad steps: what the last good step left is not replaced by copies of it."""
    config = replace(CONFIG, save_every=save_every, posthoc=(0.1,))
    model = Regression(Once(5, 6, 7))
    recovered = train(tmp_path / "fault", model, config)
    assert model.seen == [*range(8), *range(back, 10)]
    assert_same_bits(recovered.folder, train(tmp_path / "good", Regression(), config).folder)
    assert "skipped" not in recovered.records[-1]
    assert json.loads((tmp_path / "fault/checkpoints/step-10/state.json").read_text())["rolled_back"] is True


def test_a_resumed_run_remembers_that_it_went_back(tmp_path: Path) -> None:
    """Else a run that diverges and is started again by a scheduler would never end."""
    config = replace(CONFIG, save_every=4)
    train(tmp_path, Regression(Once(5, 6, 7)), replace(config, max_steps=9))
    model = Regression(in_steps(9, 10, 11))
    with pytest.raises(DivergedError, match="reset once already"):
        train(tmp_path, model, replace(config, steps=20), resume=True)
    assert model.seen == [9, 10, 11]


def test_a_run_of_bad_steps_alone_is_diverged_even_if_it_is_short(tmp_path: Path) -> None:
    """Fewer steps than patience: there is nothing worth saving."""
    with pytest.raises(DivergedError, match="every loss so far") as caught:
        train(tmp_path, Regression(from_step(0)), replace(CONFIG, steps=2))
    assert caught.value.exit_code == 4
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("config", [replace(CONFIG, save_every=1), replace(CONFIG, save_seconds=1e-9)])
def test_a_bad_first_step_does_not_end_a_run_that_saves_often(tmp_path: Path, config: TrainConfig) -> None:
    """There is nothing to save yet; whether to go on is for `patience` to say."""
    assert train(tmp_path, Regression(in_steps(0)), config).result.finished


def test_a_run_stopped_after_bad_steps_alone_can_be_resumed(tmp_path: Path) -> None:
    """Whoever stops it wants it saved; that nothing was learned is for the end to say."""
    assert train(tmp_path, Regression(in_steps(0)), replace(CONFIG, max_steps=1)).result.steps == 1
    resumed = train(tmp_path, Regression(in_steps(0)), resume=True)
    whole = train(tmp_path / "whole", Regression(in_steps(0)))
    assert records(resumed.folder) == records(whole.folder)
    assert all(torch.equal(value, whole.model.state_dict()[k]) for k, value in resumed.model.state_dict().items())


class Spoiled(Regression):
    """Finite loss and gradient, but a buffer becomes infinite."""

    def after_step(self, step_ok: Tensor) -> None:
        super().after_step(step_ok)
        self.average[1] = math.inf


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """Whatever the reason: the message names the tensor, and the checkpoint before it stays."""
    train(tmp_path, Regression(), replace(CONFIG, max_steps=4))
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

    model: Callable[[int], Regression]
    config: Callable[[int], TrainConfig] = field(default=lambda rank: CONFIG)


def signalled(rank: int) -> Regression:
    """Process 1 alone hears SIGTERM, in step 3."""

    def fault(context: Context) -> Tensor:
        if rank == 1 and context.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.zeros(len(context.sample_ids), dtype=torch.bool)

    return Regression(fault)


SAVING = replace(CONFIG, save_every=4)
SCENARIOS = {
    "loss": Scenario(lambda rank: Regression(in_steps(2, 5))),
    "gradient": Scenario(lambda rank: Regression(in_steps(2, 5), gradient=True)),
    "accumulation": Scenario(lambda rank: Regression(in_steps(2, 5)), lambda rank: replace(CONFIG, accumulation=2)),
    "forever": Scenario(lambda rank: Regression(from_step(5)), lambda rank: SAVING),
    "transient": Scenario(lambda rank: Regression(Once(5, 6, 7)), lambda rank: SAVING),
    "signal": Scenario(signalled),
    "late": Scenario(lambda rank: Regression(), lambda rank: replace(CONFIG, max_seconds=0.0 if rank == 1 else None)),
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
    expected = plain_loop(CONFIG, {2, 5})
    for key, value in pair.states[0].items():
        torch.testing.assert_close(value, expected.state[f"model/{key}"], rtol=0, atol=1e-11)
    per_step = 2 if name == "accumulation" else 1
    assert pair.outcomes[0]["seen"] == pair.outcomes[1]["seen"] == [s for s in range(10) for _ in range(per_step)]
    logged = records(pair.folder)
    assert [record.get("skipped") for record in logged] == [None, 1, 2, 2, 2]
    for record, means in zip(logged, expected.intervals, strict=True):
        found, wanted = ({k: v for k, v in r.items() if k in ("loss", "loss_time_0")} for r in (record, means))
        assert found == pytest.approx(wanted, rel=1e-5)
    assert_all_finite(pair.folder)


def test_two_processes_go_back_and_end_together(tmp_path: Path, two: Callable[[str], Pair]) -> None:
    """With the words of one process that trains alone: the losses in them are means over all."""
    pair = two("forever")
    with pytest.raises(DivergedError) as alone:
        train(tmp_path, Regression(from_step(5)), SAVING)
    assert [outcome["exit"] for outcome in pair.outcomes] == [4, 4]
    assert [outcome["seen"] for outcome in pair.outcomes] == [[*range(8), *range(4, 8)]] * 2
    assert [outcome["error"] for outcome in pair.outcomes] == [str(alone.value)] * 2
    assert (pair.folder / "log.txt").read_text().count("back to step 4") == 1
    assert_all_finite(pair.folder)


def test_two_processes_recover_from_a_fault_of_one(tmp_path: Path, two: Callable[[str], Pair]) -> None:
    pair, good = two("transient"), train(tmp_path, Regression(), SAVING)
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
    resumed = train(tmp_path, Regression(), resume=True)
    whole = train(tmp_path / "whole", Regression())
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in resumed.model.state_dict().items())
