"""Batches that threads read ahead: the same samples in the same order, whatever reads them, stops, fails or goes back."""

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import regression
import torch
from accelerate import Accelerator
from multiprocess import together
from pipelines import Outcome, Script
from regression import Regression, assert_same_bits, samples
from resuming import DATA, TRAIN, VQ, Conditions, assert_same_run, start, steps_of
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.core.config import from_dict, to_dict
from midway.gen.core.errors import DataError, DivergedError, UsageError
from midway.gen.core.runs import Run
from midway.gen.flags import cli
from midway.gen.flags.tasks import TokenizerTask
from midway.gen.training import loading
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.batches import Context, ImageBatch, LatentBatch, RandomCrop
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.gen.training.interface import Items
from midway.gen.training.loading import AHEAD, MOST, WORTH_A_THREAD, Loader, each, on_device, threads_for

pytestmark = pytest.mark.usefixtures("on_the_cpu")

CONFIG = TrainConfig(steps=5, batch_size=8, lr=0.05, warmup=2, ema=0.5, workers=0)
WORKERS, CPU = (0, 1, 4), torch.device("cpu")
SIZE, SIDE, WINDOW = 30, 6, 4
IMAGES = torch.arange(SIZE * SIDE * SIDE, dtype=torch.int64).remainder(251).to(torch.uint8).view(SIZE, 1, SIDE, SIDE)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert reading_threads() == []


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


@dataclass(frozen=True)
class Place:
    """What a Loader asks an Accelerator for."""

    process_index: int = 0
    num_processes: int = 1
    device: torch.device = CPU


def loader(
    read: Callable[[Tensor], Any], config: TrainConfig, rank: int = 0, processes: int = 1, **more: Any
) -> Loader:
    return Loader(Items(read, SIZE, **more), config, cast(Accelerator, Place(rank, processes)))


def context_of(source: Loader, step: int, micro: int) -> Context:
    start = source.position(step, micro)
    return Context(source.order.seed, step, torch.arange(start, start + source.share))


def batches(source: Loader, config: TrainConfig) -> list[Any]:
    """All of a training, in its order."""
    wanted = [(step, micro) for step in range(config.steps) for micro in range(config.accumulation)]
    with source:
        return [source(step, micro, context_of(source, step, micro)) for step, micro in wanted]


def at_random_times(wanted: Tensor) -> Tensor:
    """The items themselves, read in a time that differs from batch to batch."""
    time.sleep(1e-4 * (int(wanted.sum()) % 17))
    return wanted


# ---- which samples ----


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("workers", WORKERS)
def test_every_position_of_the_stream_is_read_once_in_its_order(
    processes: int, accumulation: int, workers: int
) -> None:
    """Over epochs of 30 and steps of 12: the permutations laid end to end, whoever reads."""
    config = TrainConfig(steps=9, batch_size=12, accumulation=accumulation, seed=3, workers=workers)
    ranks = [batches(loader(at_random_times, config, rank, processes), config) for rank in range(processes)]
    found = torch.cat([torch.cat(parts) for parts in zip(*ranks, strict=True)])
    stream = torch.cat([randomness.permutation(3, "order", epoch, SIZE) for epoch in range(4)])
    assert found.tolist() == stream[: 9 * 12].tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_is_read_ahead_than_is_promised(workers: int) -> None:
    """Each call leaves AHEAD batches a thread, no more and in the end no fewer, and none beyond the last step."""
    config, started, lock = TrainConfig(steps=12, batch_size=4, workers=workers), list[int](), threading.Lock()

    def read(wanted: Tensor) -> Tensor:
        with lock:
            started.append(len(wanted))
        return wanted

    with loader(read, config) as source:
        for step in range(config.steps):
            source(step, 0, context_of(source, step, 0))
            allowed = min(step + 1 + AHEAD * workers, config.steps)
            deadline = time.monotonic() + 20
            while len(started) < allowed and time.monotonic() < deadline:
                time.sleep(1e-3)
            time.sleep(2e-3)
            assert len(started) == allowed


def test_going_back_begins_again_at_that_step() -> None:
    config = TrainConfig(steps=9, batch_size=12, workers=2)
    straight = batches(loader(at_random_times, config), config)
    with loader(at_random_times, config) as source:
        for step in (0, 1, 2, 3, 4, 2, 3, 8, 0, 1):
            assert torch.equal(source(step, 0, context_of(source, step, 0)), straight[step])


# ---- what is trained ----


def train(folder: Path, config: TrainConfig, model: Regression | None = None, resume: bool = False) -> Path:
    return regression.train(folder, config, model, None, resume).folder


@pytest.mark.parametrize("workers", WORKERS[1:])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_threads_change_no_bit(workers: int, accumulation: int, tmp_path: Path) -> None:
    config = replace(CONFIG, accumulation=accumulation)
    expected = train(tmp_path / "none", config)
    assert_same_bits(train(tmp_path / "some", replace(config, workers=workers)), expected)


def test_a_run_resumed_with_other_threads_is_one_that_was_not_stopped(tmp_path: Path) -> None:
    expected = train(tmp_path / "whole", CONFIG)
    for workers, stop in ((0, 2), (4, 2), (1, None)):
        train(tmp_path / "parts", replace(CONFIG, workers=workers, max_steps=stop), resume=True)
    assert_same_bits(tmp_path / "parts", expected)


def train_share(rank: int, folder: Path) -> None:
    for workers in (0, 4):
        train(folder / str(workers), replace(CONFIG, workers=workers))


def test_threads_change_no_bit_of_two_processes(tmp_path: Path) -> None:
    together(train_share, 2, tmp_path)
    assert_same_bits(tmp_path / "4", tmp_path / "0")


def test_a_run_that_is_reset_has_the_right_batches(tmp_path: Path) -> None:
    """Bad from step 5 to 7, then good from the checkpoint of step 4 on."""
    config = replace(CONFIG, steps=10, patience=3, save_every=4, batch_size=regression.BATCH)
    left = {5, 6, 7}

    def fault(context: Context) -> Tensor:
        bad = context.step in left
        left.discard(context.step)
        return torch.full_like(context.sample_ids, bad, dtype=torch.bool)

    model = Regression(fault)
    back = train(tmp_path / "fault", replace(config, workers=2), model)
    assert model.seen == [*range(8), *range(4, 10)]
    assert_same_bits(back, train(tmp_path / "good", config))


# ---- errors and ends ----


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_of_a_read_ends_the_step_that_needed_it(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same error after the same steps, as three lines and exit code 3; later ones are not seen."""
    config, model = replace(CONFIG, workers=workers, batch_size=4), Regression()
    bad = set(randomness.permutation(0, "order", 0, regression.SIZE)[8:10].tolist())  # read in step 2

    def read(wanted: Tensor) -> Tensor:
        if bad & set(wanted.tolist()):
            raise DataError("cat/7.jpg cannot be read", "it is truncated", "replace it")
        return samples(wanted)

    def command(_: list[str]) -> None:
        run = Run(tmp_path, "test", {"train": to_dict(config)})
        fit(model, Items(read, regression.SIZE), config, run, make_accelerator(config))

    assert cli.run(command, []) == 3
    assert model.seen == [0, 1]
    lines = capsys.readouterr().err.splitlines()[-3:]
    assert lines == ["error: cat/7.jpg cannot be read", "  why: it is truncated", "  fix: replace it"]
    assert reading_threads() == []


def test_no_thread_is_left_by_a_training_that_diverges(tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        train(tmp_path, replace(CONFIG, workers=4, patience=2), Regression(lambda c: torch.ones_like(c.sample_ids) > 0))
    assert reading_threads() == []


def tokenizer_task(out: Path, workers: int) -> TokenizerTask:
    return TokenizerTask(out, replace(DATA, crop=6), VQ, flip=True, resume="auto", train=killed(workers))


def killed(workers: int) -> TrainConfig:
    return replace(TRAIN, steps=24, save_every=3, save_seconds=0, workers=workers)


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_is_killed_goes_on_with_other_threads(tmp_path: Path) -> None:
    """Random windows of the images, mirrored at random, by SIGKILL, SIGTERM and three numbers of threads: the same bytes."""
    run, slow = tmp_path / "run", Conditions(pause=0.02)
    child = start(tokenizer_task(run, 4), slow)
    child.wait_for(lambda: steps_of(run))
    assert child.finish(signal.SIGKILL) == -signal.SIGKILL
    before = steps_of(run)[0]
    child = start(tokenizer_task(run, 1), slow)
    child.wait_for(lambda: steps_of(run)[0] > before)
    assert child.finish(signal.SIGTERM) == 143
    assert before < steps_of(run)[0] < 24
    assert start(tokenizer_task(run, 0)).finish() == 0
    whole = tmp_path / "whole"
    assert start(tokenizer_task(whole, 2)).finish() == 0
    assert_same_run(run, whole)


@pytest.mark.usefixtures("one_thread")
def test_threads_read_a_built_set_as_if_it_were_in_memory(script: Script, tmp_path: Path) -> None:
    """The same weights bit for bit; a shard that changes later ends the training with its name."""
    built, flags = (
        tmp_path / "built",
        ("--held-out", 0.9, "--crop", 4, "--batch-size", 32, "--decay", "constant", "--flip"),
    )
    assert script("data", "build", "digits", "--held-out", 0.9, "--out", built).code == 0

    def trained(name: str, source: object, workers: int, steps: int) -> Outcome:
        more = (
            "--workers",
            workers,
            "--steps",
            steps,
            "--out",
            tmp_path / name,
            "--resume",
            "auto",
            "--model.width",
            8,
        )
        return script("train_tokenizer", "digits-fsq", "--data", source, *flags, *more, "--model.downsample", 2)

    for name, source, workers in (("memory", "digits", 0), ("disk", built, 2)):
        done = trained(name, source, workers, 4)
        assert done.code == 0, done.err
    assert_same_bits(tmp_path / "disk", tmp_path / "memory")
    shard = built / "records-00000.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:128] + bytes(255 - byte for byte in content[128:]))
    done = trained("disk", built, 2, 8)
    assert done.code == 3
    what, why, fix = done.err.splitlines()[-3:]
    assert what == f"error: {shard} has changed" and "checksum" in why and "build it again" in fix


# ---- how many threads ----


def test_auto_reads_here_what_is_read_fast_and_starts_threads_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the faster of the first two reads, on a clock of our own."""
    now, said = [0.0], list[str]()
    monkeypatch.setattr(loading.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loading, "cores_of_this_process", lambda: 4)
    for seconds, threads in (((9.0, 1e-4), 0), ((1e-4, 9.0), 0), ((9.0, 5e-3), 3), ((5e-3, 9.0), 3)):
        times = iter((*seconds, *[0.0] * 9))

        def read(wanted: Tensor, times: Iterator[float] = times) -> Tensor:
            now[0] += next(times)
            return wanted

        config = TrainConfig(steps=4, batch_size=4)
        assert config.workers == "auto"
        source = Loader(Items(read, SIZE), config, cast(Accelerator, Place()), said.append)
        batches(source, config)
        assert source.workers == threads
    assert said == ["loading: a batch of 4 is read in 5.0 ms; 3 threads read ahead (--workers auto)"] * 2


def test_the_number_of_threads_follows_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [threads_for(1.0, cores) for cores in (1, 2, 3, 8, 64)] == [1, 1, 2, 7, MOST]
    assert threads_for(0.99 * WORTH_A_THREAD, 64) == 0
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for processes, cores in (("", 12), ("1", 12), ("4", 3), ("100", 1), ("0", 12), ("many", 12)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert loading.cores_of_this_process() == cores


def test_workers_are_a_number_or_auto() -> None:
    for value in ("auto", 0, 7):
        assert to_dict(from_dict(TrainConfig, {"workers": value}))["workers"] == value
    for value in ("fast", -1, 257, 1.5, None, True):
        with pytest.raises(UsageError):
            from_dict(TrainConfig, {"workers": value})


# ---- batches ----


def test_a_batch_is_placed_with_all_its_tensors() -> None:
    meta, context = torch.device("meta"), Context(0, 0, torch.arange(2))
    latents = LatentBatch(torch.zeros(2, 3), torch.zeros(2))
    for batch in (latents, (torch.ones(2), latents), torch.ones(2)):
        devices = list[str]()
        moved = on_device(Items(lambda items: items, 2), batch, context, meta)
        assert type(moved) is type(batch)
        each(moved, lambda tensor, devices=devices: devices.append(tensor.device.type) or tensor)
        assert devices and set(devices) == {"meta"}


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_threads_use_the_gpu_of_their_process(device: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's device of a single process has no number, which `set_device` needs."""
    chosen = list[Any]()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    config = TrainConfig(batch_size=4, workers=1)
    with Loader(
        Items(lambda wanted: wanted, SIZE), config, cast(Accelerator, Place(device=torch.device(device)))
    ) as source:
        assert source._threads(1).submit(lambda: 7).result() == 7
    assert chosen == [index]


# ---- random windows ----


def word(key: int, counter: int) -> int:
    """SplitMix64 in integers, as published: word `counter` (from 1) of `key`."""
    x = (key + counter * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def place_of(seed: int, step: int, position: int, places: int) -> tuple[int, int]:
    """Row and column of a window, of `places` in each direction."""
    key = 0
    for part in (seed, int.from_bytes(hashlib.sha256(b"crop").digest()[:8], "little"), step):
        key = word(key + part * 0x9E3779B97F4A7C15, 1)
    own = word(key + position * 0x9E3779B97F4A7C15, 0)
    top, left = (((word(own, j) >> 11) + 0.5) * 2.0**-53 * places for j in (1, 2))
    return int(top), int(left)


def test_a_window_is_where_its_draws_put_it() -> None:
    """One of 3 x 3 places for each sample; of 90 samples each place is taken."""
    images, ids = IMAGES.repeat(3, 3, 1, 1), torch.arange(100, 190)
    found = RandomCrop(WINDOW)(ImageBatch(images, ids), Context(5, 7, ids))
    assert torch.equal(found.labels, ids)
    places = [place_of(5, 7, position, SIDE - WINDOW + 1) for position in ids.tolist()]
    expected = [
        image[:, top : top + WINDOW, left : left + WINDOW] for image, (top, left) in zip(images, places, strict=True)
    ]
    assert torch.equal(found.images, torch.stack(expected))
    assert found.images.is_contiguous(), "convolutions of another layout add in another order"
    assert len(set(places)) == 9
    assert places[0] == (1, 2), "the first ever: seed 5, step 7, position 100"


def windows(workers: int, processes: int, accumulation: int, first: int = 0) -> Tensor:
    """All windows of a training, in the order of the stream, from step `first` on."""
    config = TrainConfig(steps=6, batch_size=12, accumulation=accumulation, workers=workers)
    found = list[Tensor]()
    sources = [
        loader(lambda wanted: ImageBatch(IMAGES[wanted], wanted), config, rank, processes, augment=RandomCrop(WINDOW))
        for rank in range(processes)
    ]
    for step in range(first, config.steps):
        for micro in range(accumulation):
            found += [source(step, micro, context_of(source, step, micro)).images for source in sources]
    for source in sources:
        source.__exit__()
    return torch.cat(found)


@pytest.mark.parametrize(
    ("workers", "processes", "accumulation"), [(0, 2, 1), (0, 1, 3), (1, 2, 2), (4, 1, 1), (4, 2, 3)]
)
def test_windows_depend_on_seed_step_and_position_alone(workers: int, processes: int, accumulation: int) -> None:
    expected = windows(0, 1, 1)
    assert torch.equal(windows(workers, processes, accumulation), expected)
    assert torch.equal(windows(workers, processes, accumulation, first=4), expected[4 * 12 :])
