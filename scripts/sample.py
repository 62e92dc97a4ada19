"""Draw samples: python scripts/sample.py --model runs/digits-dit --solver ddim --nfe 10 --n 64 --seed 0 --out grid.png"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from sampling_flags import SamplingFlags
from tile_flags import TileFlags

from cli import main, resolve
from midway.gen.core.errors import DivergedError, UsageError, raising
from midway.gen.core.processes import best_device
from midway.gen.core.ranges import COUNT, SEED, STEPS, WIDTH, check_flag_ranges
from midway.gen.core.text import echo
from midway.gen.data.pictures import save_grid
from midway.gen.diffusion.load import load_model
from midway.gen.diffusion.model import LatentModel
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.diffusion.sampling import decode, sample_latents
from midway.samplers.parallel import ParallelConfig, ParallelSampler
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class SampleTask(SamplingFlags, TileFlags):
    """Sample a grid of images; image k depends on seed + k alone."""

    model: Path
    """Run directory of the latent model."""
    out: Path = Path("grid.png")
    """PNG to write."""
    solver: str = "dpmpp2m"
    """A solver of samplers/solvers.py, rk45, or one learned for this model: table, amed, amed-plugin-..."""
    nfe: int = 10
    """Network evaluations per image (guidance doubles what the network runs)."""
    grid: str = "karras"
    """Spacing of the steps: uniform, logsnr, karras, shift, quadratic, vp, ays_sd, ays_sdxl or gits; learned ones have theirs."""
    n: int = 64
    """Number of images."""
    seed: int = 0
    """Seed of the first image; the others follow."""
    label: int | None = None
    """Number of one class for all images, of those that are printed with their names; otherwise the classes in turn."""
    parallel: Literal["no", "gaussian", "picard"] = "no"
    """Evaluate many times at once, in waves, until nothing changes (samplers/parallel.py); costs evaluations, saves waiting."""
    tolerance: float = 1e-3
    """With --parallel: a state has settled when it changes by less, in standard deviations."""
    window: int | None = None
    """With --parallel: evaluations of a wave, per image; by default the whole trajectory."""
    rtol: float = 1e-5
    """With --solver rk45, which has no budget and chooses its steps: greatest error of a step, relative to the state."""
    atol: float = 1e-5
    """The same, absolute."""

    def __post_init__(self) -> None:
        SamplingFlags.__post_init__(self)
        check_flag_ranges(self, n=COUNT, nfe=STEPS, seed=SEED, window=STEPS, tile=WIDTH)


def run(task: SampleTask) -> None:
    """Sample, decode, write."""
    if task.n < 1 or task.seed < 0 or task.batch_size < 1:
        raise UsageError(
            f"--n {task.n} --seed {task.seed} --batch-size {task.batch_size}",
            "there is nothing to draw",
            "use --n and --batch-size 1 or more, and --seed 0 or more",
        )
    if task.out.suffix.lower() != ".png":
        raise UsageError(f"--out {task.out}", "the grid is a PNG", "give a name that ends in .png")
    device = best_device()
    trained = load_model(task.model, device)
    task.apply_tiles(trained.tokenizer)
    check_label(task.label, trained.model)
    config = SamplerConfig((task.grid,), tolerances=(task.rtol, task.atol), **task.sampler_options(device))
    samplers = make_samplers(trained, task.solver, task.nfe, config)
    sampler = samplers.get(task.grid) or next(iter(samplers.values()))
    parallel = None if task.parallel == "no" else in_parallel(task, sampler, trained.model.schedule)
    seeds = torch.arange(task.seed, task.seed + task.n)
    labels = None if task.label is None else torch.full((task.n,), task.label)
    samples = sample_latents(trained, parallel or sampler, seeds, config.sampling(), labels)
    if not samples.latents.isfinite().all():
        raise DivergedError(
            "sampling diverged", "the latents stopped being finite", "use more --nfe or less --guidance"
        )
    save_grid(task.out, decode(trained, samples.latents), columns=math.ceil(math.sqrt(task.n)))
    waves = f" in {parallel.waves} waves" if parallel else ""
    echo(
        f"{task.n} images, {samples.nfe:g} evaluations each{waves}, {samples.seconds:.2f} s; "
        f"weights {trained.weights}; saved {task.out}"
    )
    if trained.model.classes:
        echo(f"classes: {numbered_classes(trained.model)}")


def check_label(label: int | None, model: LatentModel) -> None:
    """UsageError for a class that the model does not have, or that had no training image."""
    if label is None:
        return
    if not model.classes:
        raise UsageError(f"--label {label}", "this model was trained without classes", "drop --label")
    if not 0 <= label < model.classes or label in model.empty:
        why = f"the model has classes 0 to {model.classes - 1}"
        if label in model.empty:
            why = f"class {named(model, label)} had no training image"
        raise UsageError(f"--label {label}", why, f"choose one of them: {numbered_classes(model)}")


def numbered_classes(model: LatentModel) -> str:
    """`0: cat, 1: dog`: every class that --label takes; numbers alone of a run that does not hold the names."""
    trained = [label for label in range(model.classes) if label not in model.empty]
    return ", ".join(named(model, label) for label in trained)


def named(model: LatentModel, label: int) -> str:
    """A class as its number and its name."""
    return f"{label}: {model.class_names[label]}" if model.class_names else str(label)


def in_parallel(task: SampleTask, sampler: Sampler, schedule: Schedule) -> ParallelSampler:
    """The same in waves; UsageError for a solver without fixed rows."""
    if sampler.table is None:
        raise UsageError(
            f"--parallel with {task.solver}",
            "its steps follow from the network's features",
            "use its form without -predictor",
        )
    assert task.parallel != "no"
    with raising(UsageError, "--tolerance or --window", "change it"):
        return ParallelSampler(sampler.table, schedule, ParallelConfig(task.parallel, task.tolerance, task.window))


if __name__ == "__main__":
    main(lambda arguments: run(resolve(SampleTask, {}, arguments)), alone=True)
