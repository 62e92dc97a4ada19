"""Pairs of a model's own sampler: the line through its first and last state, what is stored, and training on them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from multiprocess import together
from pipelines import TINY, TINY_DIT, Pipeline
from tensors import normal

from midway.gen.core.errors import DataError, MidwayError, UsageError
from midway.gen.core.processes import device_and_process
from midway.gen.diffusion import pairs as pairs_module
from midway.gen.diffusion.field import start_state
from midway.gen.diffusion.load import CPU, TrainedModel, load_model, origin_of
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.diffusion.pairs import PairSource, ReflowConfig, draw_pairs, open_pairs, pair_of
from midway.gen.diffusion.sampling import noise_of, sample_latents
from midway.gen.flags.tasks import LatentTask
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.trainings import train_latent
from midway.gen.trainings.beginning import planned
from midway.samplers.grids import karras
from midway.samplers.prediction import NetworkField
from midway.samplers.sample import sample
from midway.samplers.schedule import SCHEDULES
from midway.samplers.solvers import euler

pytestmark = pytest.mark.usefixtures("on_the_cpu", "one_thread")
TRAIN = replace(TINY, steps=4, batch_size=32, lr=1e-2, warmup=0)
PAIRS: dict[str, Any] = {"pairs": 70, "nfe": 3, "batch_size": 16}


def task_of(pipeline: Pipeline, out: Path, **options: Any) -> LatentTask:
    """A tiny flow model on the pipeline's tokenizer."""
    model = LatentModelConfig(dit=TINY_DIT)
    return LatentTask(out, pipeline.tokenizer, model=model, **{"train": TRAIN, **options})


@pytest.fixture(scope="module")
def source(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A flow model that draws pairs."""
    run = train_latent.train(task_of(pipeline, tmp_path_factory.mktemp("source") / "run"))
    assert run is not None
    return load_model(run.path, CPU)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_line_of_a_pair_goes_through_the_first_and_the_last_state(name: str) -> None:
    schedule = SCHEDULES[name]()
    grid = karras(schedule, 3)
    noise, last = normal(5, 2, seed=1).double(), normal(5, 2, seed=2).double()
    x0, e = pair_of(schedule, (grid[0], grid[-1]), noise, last)
    t = torch.tensor([grid[0], grid[-1]], dtype=torch.float64)
    first, end = (a * x0 + s * e for a, s in zip(schedule.alpha(t), schedule.sigma(t), strict=True))
    torch.testing.assert_close(first, start_state(schedule, grid[0], noise), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end, last, rtol=1e-10, atol=1e-10)


def test_a_model_of_the_pairs_needs_one_step_where_its_source_needs_many() -> None:
    """Gaussian data: the pairs are an affine map, the straight velocity of them has no loss, and one step of Euler is exact."""
    schedule, std, mean = SCHEDULES["linear"](), 0.3, 1.2

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.view(-1, 1)
        g = (1 - t) ** 2 * std**2 + t**2
        return -mean + (t - (1 - t) * std**2) / g * (x - (1 - t) * mean)

    grid = karras(schedule, 400)
    noise = normal(64, 3).double()
    start = start_state(schedule, grid[0], noise)
    field = NetworkField(velocity, "velocity", schedule)
    last = sample(field, euler(schedule, grid), start)
    assert (sample(field, euler(schedule, (grid[0], grid[-1])), start) - last).abs().max() > 0.5
    x0, e = pair_of(schedule, (grid[0], grid[-1]), noise, last)
    (a, b), (c, d) = (line_of(noise, each) for each in (x0, e))  # x0 = a n + b, e = c n + d

    def straight(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.view(-1, 1)
        n = (z - (1 - t) * b - t * d) / ((1 - t) * a + t * c)
        return (c - a) * n + d - b

    t = torch.linspace(0.01, 0.98, 64, dtype=torch.float64)
    z = (1 - t)[:, None] * x0 + t[:, None] * e
    torch.testing.assert_close(
        straight(z, t), e - x0, rtol=1e-8, atol=1e-8
    )  # no error is left: a function of z and t alone
    assert (velocity(z, t) - (e - x0)).abs().max() > 0.1
    again = sample(NetworkField(straight, "velocity", schedule), euler(schedule, (grid[0], grid[-1])), start)
    torch.testing.assert_close(again, last, rtol=1e-8, atol=1e-8)


def line_of(n: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(slope, offset) of values that are a line of n; AssertionError if they are not."""
    slope = (values[0, 0] - values[1, 0]) / (n[0, 0] - n[1, 0])
    offset = values[0, 0] - slope * n[0, 0]
    torch.testing.assert_close(values, slope * n + offset, rtol=1e-8, atol=1e-8)
    return slope, offset


def test_pairs_are_the_samples_of_their_seeds_and_are_drawn_once(
    source: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where drawing was interrupted; a damaged or other folder is an error."""
    config = ReflowConfig(source.run.path, folder=tmp_path / "whole", **PAIRS)
    whole = draw_pairs(PairSource(source, config, None))
    items = torch.tensor([0, 3, 69])
    own = PairSource(source, config, None)
    seeds, sampler = items + config.seed, own.sampler
    drawn = sample_latents(source, sampler, seeds, own.settings.sampling(), whole.labels[items])
    batch = whole.read(items)
    x0, e = pair_of(
        source.model.schedule,
        (sampler.grid[0], sampler.grid[-1]),
        noise_of(seeds, source.model.latent_shape),
        drawn.latents,
    )
    torch.testing.assert_close(batch.latents, x0, rtol=1e-4, atol=1e-4)
    assert batch.noise is not None
    torch.testing.assert_close(batch.noise, e, rtol=1e-4, atol=1e-4)
    assert whole.evaluations == 70 * 3
    parted = replace(config, folder=tmp_path / "parted")
    calls, real = [0], pairs_module.sample_latents

    def stopping(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(pairs_module, "sample_latents", stopping)
    with pytest.raises(KeyboardInterrupt):
        draw_pairs(PairSource(source, parted, None))
    draw_pairs(PairSource(source, parted, None))
    assert calls[0] < 3 + 5  # what was drawn before is not drawn again
    kept = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.is_file()}
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "parted").iterdir() if path.is_file()}
    with pytest.raises(MidwayError, match="pairs of another source"):
        draw_pairs(PairSource(source, replace(config, nfe=4), None))
    with pytest.raises(MidwayError, match="pairs of another source"):
        draw_pairs(PairSource(replace(source, hash="0" * 12), config, None))  # trained on since
    monkeypatch.setattr(pairs_module, "IN_MEMORY", 0)
    from_disk = open_pairs(own)
    assert from_disk.kept is None and whole.kept is not None
    assert torch.equal(from_disk.read(items).latents, batch.latents)
    shard = max((tmp_path / "whole").glob("records-*.npy"))
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=shard.name) as raised:
        open_pairs(own).read(torch.arange(70))
    assert "draws the pairs again" in raised.value.fix


def _draw(_: int, run: Path, folder: Path) -> None:
    trained = load_model(run, CPU)
    draw_pairs(PairSource(trained, ReflowConfig(run, folder=folder, **PAIRS), None), device_and_process()[1])


@pytest.mark.slow  # latents are written by the same function, whose processes tests/tokenizer has
def test_two_processes_draw_the_pairs_of_one(source: TrainedModel, tmp_path: Path) -> None:
    one = ReflowConfig(source.run.path, folder=tmp_path / "one", **PAIRS)
    draw_pairs(PairSource(source, one, None))
    together(_draw, 2, source.run.path, tmp_path / "two")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("one", "two")
    )
    assert first == second


def test_a_batch_with_pairs_is_trained_on_their_line() -> None:
    """Its noise is the pair's, so the loss of a step depends on no other."""
    torch.manual_seed(0)
    model = LatentModel(LatentModelConfig(dit=TINY_DIT), (3, 4, 4), 10)
    latents, labels, context = normal(8, 3, 4, 4), torch.arange(8), Context(0, 0, torch.arange(8))
    drawn = context.normal("noise", (3, 4, 4))
    same = model.loss(LatentBatch(latents, labels, drawn), context)[0]
    assert torch.equal(same, model.loss(LatentBatch(latents, labels), context)[0])
    assert not torch.equal(same, model.loss(LatentBatch(latents, labels, -drawn), context)[0])


def test_a_training_on_pairs_resumes_bit_for_bit(source: TrainedModel, pipeline: Pipeline, tmp_path: Path) -> None:
    """From the source's weights; what the source and the pairs took is part of its cost."""
    reflow = ReflowConfig(source.run.path, folder=tmp_path / "pairs", **PAIRS)
    one = task_of(pipeline, tmp_path / "one", reflow=reflow, init=source.run.path)
    two = replace(one, out=tmp_path / "two", train=replace(TRAIN, max_steps=2))
    runs = [
        train_latent.train(one),
        train_latent.train(two),
        train_latent.train(replace(two, train=TRAIN, resume="auto")),
    ]
    ends = [load_model(run.path, CPU) for run in runs if run is not None]
    assert ends[0].hash == ends[2].hash
    before, now = origin_of(source), origin_of(ends[0])
    assert now.images == before.images + 4 * 32
    assert now.evaluations == before.evaluations + 4 * 32 + 70 * 3
    with pytest.raises(UsageError, match=r"reflow\.nfe"):
        train_latent.train(replace(two, train=TRAIN, resume="auto", reflow=replace(reflow, nfe=5, folder=None)))
    shutil.rmtree(tmp_path / "pairs")


def test_pairs_of_what_has_none(source: TrainedModel, pipeline: Pipeline, tmp_path: Path) -> None:
    own: dict[str, Any] = {"source": source.run.path, "folder": tmp_path / "pairs", **PAIRS}
    for words, changed in {
        "draws noise on the way": {"solver": "ddpm"},
        "errors of its own": {"solver": "table"},
        "unknown solver": {"solver": "hune"},
    }.items():
        task = task_of(pipeline, tmp_path / "run", reflow=ReflowConfig(**{**own, **changed}))
        with pytest.raises(UsageError) as error:
            train_latent.make_parts(planned(task), Accelerator(cpu=True))
        assert words in str(error.value) + error.value.why
