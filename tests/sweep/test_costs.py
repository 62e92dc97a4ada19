"""Times of a sweep by a clock that is moved by hand, what it says it will cost, and how long it says the rest takes."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pipelines import Pipeline
from sweeps import sweep_task
from torch import Tensor

from midway.gen.commands import evaluate
from midway.gen.core.processes import ProcessInfo
from midway.gen.evaluation.metrics import Features
from midway.gen.evaluation.records import from_record, to_records
from midway.gen.evaluation.sources import SampledBatch, SolverSource
from midway.gen.sweep import measure, run, store, tally
from midway.gen.sweep.figures import Seconds
from midway.gen.sweep.jobs import Job
from midway.gen.sweep.measure import EvaluationContext
from midway.gen.sweep.run import seconds_of_blocks
from midway.gen.sweep.store import Cell, CellStore, Numbers, Seeds
from midway.gen.sweep.tally import Tally, Work

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


class Clock:
    """Moved by what is measured."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Costly:
    """Sampling a seed takes 1 s, in the second block 3 s, and 1000 s more when so many are sampled for the first time; decoding
    takes a quarter, and 500 s more."""

    def __init__(self, clock: Clock, kind: str = "toy") -> None:
        self.clock, self.kind = clock, kind
        self.identity: dict[str, Any] = {"of": kind}
        self.sizes, self.decoded, self.calls = set[int](), set[int](), list[int]()

    def sample(self, seeds: Tensor) -> SampledBatch:
        seconds = len(seeds) * (3.0 if 20 <= seeds[0] < 40 else 1.0) + 1000 * (len(seeds) not in self.sizes)
        self.sizes.add(len(seeds))
        self.calls.append(len(seeds))
        self.clock.now += seconds
        return SampledBatch(seeds.float().view(-1, 1, 1, 1), 4, seconds)

    def images(self, raw: SampledBatch) -> Tensor:
        self.clock.now += len(raw.values) / 4 + 500 * (len(raw.values) not in self.decoded)
        self.decoded.add(len(raw.values))
        return raw.values.byte()


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluationContext:
    """Three blocks of 20 seeds in parts of 8, 8 and 4; features take an eighth of a second, and 50 s more the first time."""
    clock = Clock()
    seen = set[int]()

    def extract(_: object, images: Tensor) -> dict[str, Features]:
        clock.now += len(images) / 8 + 50 * (len(images) not in seen)
        seen.add(len(images))
        return {"": Features(images.float().flatten(1), None)}

    monkeypatch.setattr(store, "PART", 8)
    monkeypatch.setattr(measure, "distances_and_metrics", lambda *_: {"distance": 1.0})
    monkeypatch.setattr(measure, "extract", extract)
    monkeypatch.setattr(tally, "extract", extract)
    space: Any = {"": SimpleNamespace(features="a", id="b", root="eigen", name="c")}
    return EvaluationContext(space, Seeds(0, 20, 3), CellStore(tmp_path), ProcessInfo(), tally=Tally(clock))


def test_what_only_a_first_call_costs_is_in_no_time(context: EvaluationContext) -> None:
    source = Costly(context.tally.clock)  # pyright: ignore[reportArgumentType]
    cell = measure.measure(source, context)
    numbers = cell.numbers()
    assert numbers is not None
    assert numbers.block_seconds == (Seconds(20, 5, 2.5), Seconds(60, 5, 2.5), Seconds(20, 5, 2.5))
    assert numbers.nfe == 4 and source.calls == [8, 8, 8, 4, 4, 8, 8, 4, 8, 8, 4], "one of each size more than is kept"
    other = Costly(context.tally.clock)  # pyright: ignore[reportArgumentType]
    other.sizes, other.decoded, other.identity = {8, 4}, {8, 4}, {"another": "solver"}
    measure.measure(other, context)
    assert other.calls == [8, 8, 4] * 3, "of a kind that has run"
    third = Costly(context.tally.clock, "of another network")  # pyright: ignore[reportArgumentType]
    found = measure.measure(third, context).numbers()
    assert found is not None and found.block_seconds == numbers.block_seconds


def test_seconds_are_the_median_of_blocks_with_their_spread(context: EvaluationContext) -> None:
    """A block that another program disturbed does not count; files hold each block, and are read again."""
    source = Costly(context.tally.clock)  # pyright: ignore[reportArgumentType]
    cell = measure.measure(source, context)
    found = run._measurement(Job("toy", "", source), cell, context)
    assert (found.seconds, found.decode_seconds, found.feature_seconds) == (20.0, 5.0, 2.5)
    assert found.seconds_blocks == (20.0, 60.0, 20.0)
    assert found.seconds_std == pytest.approx(torch.tensor([20.0, 60.0, 20.0]).std().item())
    (record,) = to_records([found])
    again = from_record(json.loads(json.dumps(record)))
    assert (again.seconds, again.seconds_blocks) == (20.0, (20.0, 60.0, 20.0))
    assert from_record({**record, "seconds_blocks": "20.0 60.0 20.0"}) == again, "as CSV has it"


def test_cells_and_results_of_earlier_versions_are_read(context: EvaluationContext) -> None:
    """They hold the sum over blocks alone, whose mean is taken."""
    numbers = Numbers(4, (1.0, 1.0, 1.0), 0, {}, Seconds(30.0, 15.0, 6.0), "a machine")
    cell = Cell(context.store.folder, {"a": 1})
    cell.finish(numbers, None)
    path = context.store.folder / f"{cell.id}.json"
    content = json.loads(path.read_text())
    del content["numbers"]["block_seconds"]
    body = {name: content[name] for name in ("identity", "numbers")}
    content["sha256"] = store._hash(body)
    path.write_text(json.dumps(content))
    found = cell.numbers()
    assert found == numbers
    assert [seconds_of_blocks(numbers, 3, name) for name in measure.TIMES] == [(10.0, ()), (5.0, ()), (2.0, ())]
    (record,) = to_records([run._measurement(Job("toy", "", Costly(Clock())), cell, context)])
    older = {name: value for name, value in record.items() if name not in ("seconds_std", "seconds_blocks")}
    assert from_record(older).seconds == 10.0 and from_record(older).seconds_std is None


# ---- the time left ----


def test_the_time_left_counts_evaluations_and_images_apart() -> None:
    clock = Clock()
    mine = Tally(clock)
    mine.expect(Work(1000, 500))
    assert mine.left() is None
    clock.now = 30.0  # what came before sampling is not in it
    clock.now += 12.0
    mine.spend(Work(100, 0), 10.0, 0.0)
    assert mine.left() == pytest.approx(900 * 0.1)
    clock.now += 30.0
    mine.spend(Work(100, 100), 10.0, 20.0)
    assert mine.left() == pytest.approx(800 * 0.1 + 400 * 0.2)
    clock.now += 7.0
    assert mine.left() == pytest.approx(800 * 0.1 + 400 * 0.2 - 7)
    mine.spend(Work(5000, 5000), 500.0, 1000.0)
    assert mine.left() == 0
    cells = Tally(clock)
    cells.expect(Work(0, 0, 10), 2)
    clock.now += 8.0
    cells.spend(Work(blocks=2), 0.0, 0.0, 6.0)
    assert cells.left() == pytest.approx(3 * 3.0), "of this process"


# ---- the line before a sweep ----


def numbers_of(line: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def test_a_sweep_begins_with_its_cost_which_is_what_it_then_spends(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counted at the sampler, untimed first runs left out; the second time nothing is left, and with another solver its part."""
    spent, real = [0, 0], SolverSource.sample
    monkeypatch.setattr(Tally, "warm_up", lambda *_: None)

    def sample(self: SolverSource, seeds: Tensor) -> SampledBatch:
        batch = real(self, seeds)
        spent[0] += round(batch.nfe * len(seeds))
        return batch

    decode = SolverSource.images

    def images(self: SolverSource, raw: SampledBatch) -> Tensor:
        spent[1] += len(raw.values)
        return decode(self, raw)

    monkeypatch.setattr(SolverSource, "sample", sample)
    monkeypatch.setattr(SolverSource, "images", images)
    task = sweep_task(pipeline, tmp_path, solvers="ddim,euler", grids="uniform,karras", metrics="")
    expected = []
    for changed in (task, task, dataclasses.replace(task, solvers="ddim,heun")):
        spent[:] = 0, 0
        evaluate.run(changed)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("to measure: "))
        expected.append(line)
        if "nothing is left" not in line:
            assert numbers_of(line.split(": ", 2)[2])[0] == spent[0]
            assert numbers_of(line.rsplit("), ", 1)[1])[0] == spent[1]
        else:
            assert spent == [0, 0]
    each = 2 * 20
    cells, exact, choice = 2 * 4 * each, 8 * each, 8 * (8 + 16 + 4 * 4)
    assert expected == [
        f"to measure: 2 cells of 2 x 20 images, 0 of them stored already: {cells + exact + choice} network evaluations "
        f"(cells {cells}, exact solution {exact}, choice {choice}), {2 * each + 2 * each + 8} images through 1 "
        "feature network",
        "to measure: 2 cells of 2 x 20 images, 2 of them stored already: nothing is left to sample",
        f"to measure: 2 cells of 2 x 20 images, 1 of them stored already: {4 * each + 8 * 8} network evaluations (cells "
        f"{4 * each}, choice {8 * 8}), {each} images through 1 feature network",
    ]


def test_a_sweep_ends_with_its_time_and_memory(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.run(sweep_task(pipeline, tmp_path, metrics="", exact_nfe=0))
    printed = capsys.readouterr().out
    assert re.search(r"\nmeasured in \d+ s; peak memory of this process: [\d.]+ GiB resident\nreport: ", printed)
