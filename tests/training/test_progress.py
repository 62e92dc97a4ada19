"""The output of a training: means, plain lines, the bar, trackers, env.json; writing it does not hold up the device."""

import importlib.util
import io
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import regression
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from regression import SIZE, Regression, Trained
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from midway.gen.core.errors import UsageError
from midway.gen.progress import bar
from midway.gen.progress.memory import PeakMemory
from midway.gen.training import optim, progress
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.config import TrainConfig, learning_rate
from midway.gen.training.progress import Averages

pytestmark = pytest.mark.usefixtures("on_the_cpu")

CONFIG = TrainConfig(steps=6, batch_size=4, lr=0.05, warmup=2, ema=0.5, log_every=2)
LINE = re.compile(r"test step (\d+)/6 (.*)loss (\S+) .*?(\d+) images/s eta (\d+) s")


def train(folder: Path, config: TrainConfig = CONFIG, resume: bool = False) -> Trained:
    return regression.train(folder, config, resume=resume)


# ---- means ----


@dataclass
class Share:
    """As much of an Accelerator as averages ask for: this process's place, and the tables of the others."""

    process_index: int
    num_processes: int
    others: tuple[Tensor, ...] = ()
    device: torch.device = field(default=torch.device("cpu"))

    def reduce(self, table: Tensor, _: str) -> Tensor:
        return table + sum(self.others)

    def gather(self, table: Tensor) -> Tensor:
        return torch.cat([table, *(other[None] for other in self.others)])


def share(index: int = 0, processes: int = 1, others: tuple[Tensor, ...] = ()) -> Accelerator:
    return cast(Accelerator, Share(index, processes, others))


def tensors(**logs: float | tuple[float, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in logs.items()}


YES, NO = torch.tensor(True), torch.tensor(False)


def test_scalars_are_means_over_steps_and_micro_batches() -> None:
    averages = Averages()
    averages.add([tensors(a=1.0, b=10.0), tensors(a=2.0, b=20.0)], YES)
    averages.add([tensors(a=6.0, b=60.0), tensors(a=7.0, b=70.0)], YES)
    assert averages.read(share()) == {"a": 4.0, "b": 40.0}


def test_pairs_are_added_before_dividing() -> None:
    """The mean over samples, not the mean of the batches' means; what has no sample has no mean."""
    averages = Averages()
    averages.add([tensors(hit=(1.0, 1.0), never=(0.0, 0.0)), tensors(hit=(9.0, 4.0), never=(0.0, 0.0))], YES)
    assert averages.read(share()) == {"hit": 2.0}


def test_all_steps_weigh_the_same_however_they_are_divided() -> None:
    """As in an interval that was begun with other micro-batches, or by another number of processes."""
    averages = Averages()
    averages.add([tensors(a=1.0)], YES)
    averages.add([tensors(a=2.0), tensors(a=4.0)], YES)
    assert averages.read(share()) == {"a": 2.0}
    averages.add([tensors(a=4.0)], YES, 2)
    there = torch.tensor([[0.5 * 8.0, 0.5]])  # what a second process has of the third step
    assert averages.read(share(0, 2, (there,))) == {"a": (1 + 3 + 6) / 3}


def test_means_are_over_all_processes() -> None:
    averages = Averages()
    averages.add([tensors(a=1.0, hit=(1.0, 1.0))], YES)
    there = torch.tensor([[3.0, 1.0], [9.0, 3.0]])
    assert averages.read(share(0, 2, (there,))) == {"a": 2.0, "hit": 2.5}


def test_a_table_of_pairs_is_named_by_its_rows() -> None:
    """(n, 2): one name with a number for each; the rows add up as single pairs do."""
    averages, table = Averages(), torch.tensor([[1.0, 1.0], [0.0, 0.0], [6.0, 2.0]])
    averages.add([{"time": table, "a": torch.tensor(1.0)}, {"time": 2 * table, "a": torch.tensor(2.0)}], YES)
    assert averages.read(share()) == {"a": 1.5, "time_0": 1.0, "time_2": 3.0}


def test_names_that_come_later_are_averaged_over_what_they_came_with() -> None:
    averages = Averages()
    averages.add([tensors(a=1.0)], YES)
    averages.add([tensors(a=2.0, late=5.0)], YES)
    averages.add([tensors(a=6.0, late=7.0)], YES)
    assert averages.read(share()) == {"a": 3.0, "late": 6.0}


def test_a_skipped_step_adds_nothing_whatever_it_logged() -> None:
    averages = Averages()
    averages.add([tensors(a=float("nan"), hit=(float("inf"), 1.0))], NO)
    assert averages.read(share()) == {}
    averages.add([tensors(a=2.0, hit=(1.0, 4.0))], YES)
    averages.add([tensors(a=float("nan"), hit=(float("inf"), float("nan")))], NO)
    assert averages.read(share()) == {"a": 2.0, "hit": 0.25}


def test_reading_changes_nothing_and_clearing_begins_anew() -> None:
    averages = Averages()
    averages.add([tensors(a=1.0)], YES)
    assert averages.read(share()) == averages.read(share()) == {"a": 1.0}
    averages.clear()
    assert averages.read(share()) == {}
    averages.add([tensors(a=3.0)], YES)
    assert averages.read(share()) == {"a": 3.0}


def open_interval() -> dict[str, Tensor]:
    """Saved by two processes, which logged a = 1 and a = 5, and hits (1, 1) and (9, 3)."""
    averages = Averages()
    averages.add([tensors(a=1.0, hit=(1.0, 1.0))], YES)
    return averages.state(share(0, 2, (torch.tensor([[[5.0, 1.0], [9.0, 3.0]]]),)))


def loaded(index: int, processes: int) -> Averages:
    averages = Averages()
    averages.add([tensors(a=100.0)], YES)  # forgotten by loading
    averages.load(open_interval(), share(index, processes))
    return averages


def test_an_open_interval_is_restored_on_each_process() -> None:
    """So that the sums are added up in the same order, and stay equal to the last bit."""
    assert open_interval()["a hit"].shape == (2, 1, 2, 2)
    assert loaded(0, 2).read(share()) == {"a": 1.0, "hit": 1.0}
    assert loaded(1, 2).read(share()) == {"a": 5.0, "hit": 3.0}


@pytest.mark.parametrize("processes", [1, 3, 4])
def test_an_open_interval_is_restored_on_another_number_of_processes(processes: int) -> None:
    """One takes all, the others nothing: together they are what was saved."""
    first, *others = (loaded(index, processes) for index in range(processes))
    assert first.read(share()) == {"a": 3.0, "hit": 2.5}
    assert all(other.read(share()) == {} for other in others)
    first.add([tensors(a=6.0, hit=(0.0, 6.0))], YES)
    assert first.read(share()) == {"a": 4.0, "hit": 1.0}


@pytest.mark.parametrize("waiting", [1, 2, 3, 100])
def test_when_logs_are_put_into_tables_changes_no_bit(monkeypatch: pytest.MonkeyPatch, waiting: int) -> None:
    """A checkpoint does it at any step."""

    def fill(size: int) -> Averages:
        monkeypatch.setattr(progress, "WAITING_LOGS", size)
        averages, values = Averages(), torch.randn(41, 3, generator=torch.Generator().manual_seed(0))
        for i, (a, x, y) in enumerate(values):
            log = {"hit": torch.stack([x, y.abs()]), "a": a} | ({"late": x} if i > 20 else {})
            averages.add([log, {name: 2 * value for name, value in log.items()}], NO if i % 5 == 3 else YES)
            if i == 7 and size < 3:
                averages.state(share())
        return averages

    one, other = fill(waiting), fill(1000)
    assert one.read(share()) == other.read(share())
    mine, theirs = one.state(share()), other.state(share())
    assert mine.keys() == theirs.keys() == {"a hit", "a late hit"}
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("stop", [3, 4])
def test_a_run_that_stopped_within_an_interval_logs_what_an_unbroken_one_does(tmp_path: Path, stop: int) -> None:
    config = replace(CONFIG, log_every=5, steps=10)
    whole = train(tmp_path / "whole", config)
    train(tmp_path / "parts", replace(config, max_steps=stop))
    parts = train(tmp_path / "parts", config, resume=True)
    assert [record["step"] for record in parts.records] == [5, 10]
    for mine, theirs in zip(parts.records, whole.records, strict=True):
        for name in ("loss", "largest", "gradient_norm", "loss_time_0", "lr"):
            assert mine.get(name) == theirs.get(name)


# ---- lines and the bar ----


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is due at every step, and none comes between two."""
    for name, value in (("FIRST", 0.0), ("SHARE", 0.0), ("LONGEST", 60.0), ("BEAT", math.inf)):
        monkeypatch.setattr(bar, name, value)


def plain(trained: Trained) -> list[re.Match[str]]:
    """The plain lines of log.txt."""
    return [match for line in trained.lines if (match := LINE.search(line))]


def test_without_a_terminal_a_plain_line_comes_when_the_last_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step, loss of the last interval, images per second, time left; also on standard output."""
    always(monkeypatch)
    trained = train(tmp_path)
    found = plain(trained)
    assert [int(match[1]) for match in found] == [2, 3, 4, 5, 6]
    losses = [f"{record['loss']:.4g}" for record in trained.records]
    assert [match[3] for match in found] == [losses[0], losses[0], losses[1], losses[1], losses[2]]
    assert all(int(match[4]) > 0 for match in found)
    assert found[-1][5] == "0"
    assert not any("loss_time" in match[0] for match in found), "too many for a line"
    printed = capsys.readouterr().out
    assert all(match[0] in printed for match in found)


def test_lines_come_less_and_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 10 s a step: every step to 50 s, then after a fifth of the time so far, and one at the end; the time left is what the
    rest takes at that rate."""
    now = [0.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    class Slow(Regression):
        def after_step(self, step_ok: Tensor) -> None:
            now[0] += 10

    for name, value in (("FIRST", 5.0), ("LONGEST", 60.0), ("BEAT", math.inf)):
        monkeypatch.setattr(bar, name, value)
    monkeypatch.setattr(progress, "time", Clock)
    trained = regression.train(tmp_path, replace(CONFIG, steps=8), Slow())
    found = [re.search(r"step (\d+)/8 .* (\d+) images/s eta (\d+) s", line) for line in trained.lines]
    assert [match.groups() for match in found if match] == [
        *((str(step), "0", str(10 * (8 - step))) for step in (2, 3, 4, 5, 7)),
        ("8", "0", "0"),
    ]
    assert [record["images_per_second"] for record in trained.records] == [0.4] * 4
    assert trained.result.seconds == 80


class Terminal(io.StringIO):
    """Somebody is watching."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar_and_no_plain_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    always(monkeypatch)
    trained = train(tmp_path)
    assert plain(trained) == []
    assert re.search(r"test: .*%\|.*\| \d/6 ", terminal.getvalue())
    assert "loss=" in terminal.getvalue()
    assert [record["step"] for record in trained.records] == [2, 4, 6], "metrics.jsonl is written all the same"


def test_without_a_terminal_there_is_no_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bar, "FIRST", 1e9)
    monkeypatch.setattr(bar, "LONGEST", 1e9)
    trained = train(tmp_path)
    assert "%|" not in capsys.readouterr().err
    assert [int(match[1]) for match in plain(trained)] == [6], "the end is always written"


def test_every_interval_is_a_line_of_metrics(tmp_path: Path) -> None:
    """The last one may be short; a run that stops within one logs it, and drops it when it goes on."""
    config = replace(CONFIG, steps=5, decay="cosine")
    stopped = train(tmp_path, replace(config, max_steps=3))
    assert [(record["step"], record.get("partial")) for record in stopped.records] == [(2, None), (3, True)]
    records = train(tmp_path, config, resume=True).records
    assert [(record["step"], record.get("partial")) for record in records] == [(2, None), (4, None), (5, None)]
    assert [record["lr"] for record in records] == [learning_rate(config, s) for s in (1, 3, 4)]
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    assert all(record["images_per_second"] > 0 for record in records)


def test_an_interval_is_of_its_own_steps_alone(tmp_path: Path) -> None:
    single = train(tmp_path / "1", replace(CONFIG, log_every=1)).records
    double = train(tmp_path / "2").records
    for record, one, other in zip(double, single[::2], single[1::2], strict=True):
        for name in ("loss", "largest", "gradient_norm"):
            assert record[name] == pytest.approx((one[name] + other[name]) / 2, rel=1e-6)


# ---- trackers ----


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_the_numbers_of_metrics_below_the_run_directory(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained = train(tmp_path / "run", replace(CONFIG, log_with=("tensorboard",)))
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert all(path.is_relative_to(tmp_path / "run") for path in files)
    logs = [EventAccumulator(str(path)).Reload() for path in files]
    (events,) = (log for log in logs if "loss" in log.Tags()["scalars"])  # another one holds the configuration
    for name in ("loss", "largest", "lr", "gradient_norm"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in trained.records]
    assert "step" not in events.Tags()["scalars"]


def test_a_tracker_that_is_not_installed_raises_with_the_command_to_install_it(tmp_path: Path) -> None:
    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    absent = sorted({str(getattr(name, "value", name)) for name in LOGGER_TYPE_TO_CLASS} - available)
    if not absent:
        pytest.skip("every tracker of Accelerate is installed")
    with pytest.raises(UsageError, match="not installed") as caught:
        make_accelerator(replace(CONFIG, log_with=(absent[0],)), tmp_path)
    assert f"pip install {absent[0]}" in caught.value.fix
    assert caught.value.exit_code == 2


def test_an_unknown_tracker_raises_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tensorboard") as caught:
        make_accelerator(replace(CONFIG, log_with=("telegraph",)), tmp_path)
    assert "telegraph" in str(caught.value)
    assert "--log-with" in caught.value.fix


# ---- env.json ----


def test_env_json_describes_the_run(tmp_path: Path) -> None:
    train(tmp_path, replace(CONFIG, accumulation=2))
    known = json.loads((tmp_path / "env.json").read_text())
    assert {"git", "packages", "hardware", "python", "command"} <= known.keys()
    assert known["packages"]["torch"].startswith("2.")
    (start,) = known["starts"]
    expected = {
        "step": 0,
        "effective_batch": 4,
        "per_process_micro_batch": 2,
        "accumulation": 2,
        "processes": 1,
        "data_fingerprint": "ten samples",
        "items": SIZE,
        "parameters": 4,
        "device": "cpu",
        "precision": "no",
    }
    assert {name: start[name] for name in expected} == expected
    assert start["peak_resident_bytes"] > 2**26
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert last.endswith(f"; {PeakMemory(start['peak_resident_bytes'])}") and last.startswith("6 steps in ")


def test_every_start_adds_to_env_json(tmp_path: Path) -> None:
    """The later ones with the environment of their own day."""
    train(tmp_path, replace(CONFIG, max_steps=2))
    train(tmp_path, replace(CONFIG, max_steps=2), resume=True)
    train(tmp_path, replace(CONFIG, accumulation=2), resume=True)
    first, *later = json.loads((tmp_path / "env.json").read_text())["starts"]
    assert [start["step"] for start in (first, *later)] == [0, 2, 4]
    assert [start["accumulation"] for start in (first, *later)] == [1, 1, 2]
    assert all({"git", "packages", "hardware"} <= start.keys() for start in later)
    log = (tmp_path / "log.txt").read_text()
    assert "resuming from step 4 on cpu: 4 samples a step" in log
    assert "note: train.accumulation changed" in log


# ---- waiting for the device ----


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: .item(), int(), bool() and float() of a tensor, .tolist()."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        really = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.counts["tolist"] += 1
            return really(tensor)

        monkeypatch.setattr(Tensor, "tolist", tolist)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.counts["item"] += 1
        return func(*args, **(kwargs or {}))


def waits(folder: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    with monkeypatch.context() as patched, Waits(patched) as mode:
        train(folder, config)
    return mode.counts


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_waits_for_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int) -> None:
    """The difference between 20 and 40 steps is one reading of the guard per step, however many micro-batches it has;
    logging, saving and ending the run wait as often in both. (As on a device; what a CPU holds may be read at any time.)"""
    monkeypatch.setattr(optim, "is_on_host", lambda tensor: False)
    config = replace(CONFIG, log_every=100, accumulation=accumulation)
    short = waits(tmp_path / "20", replace(config, steps=20), monkeypatch)
    long = waits(tmp_path / "40", replace(config, steps=40), monkeypatch)
    assert long - short == Counter(tolist=20)


def test_an_interval_waits_for_the_device_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reading of all means together, and the count of skipped steps, whatever the number of logs."""
    config = replace(CONFIG, steps=20)
    few = waits(tmp_path / "few", replace(config, log_every=10), monkeypatch)
    many = waits(tmp_path / "many", replace(config, log_every=2), monkeypatch)
    assert many - few == Counter(tolist=8, item=8)
