"""Draw samples: midway sample --model runs/digits-dit --solver ddim --nfe 10 --n 64 --seed 0 --out grid.png"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from midway.gen.core.errors import UsageError, raising
from midway.gen.core.files import check_path
from midway.gen.core.processes import device_and_process
from midway.gen.core.ranges import COUNT, SEED, STEPS, WIDTH, check_flag_ranges
from midway.gen.core.text import echo, printable
from midway.gen.data.external import fingerprint
from midway.gen.diffusion.inversion import (
    SavedNoise,
    from_latents,
    from_noise,
    inverse,
    noise_of_state,
    rest_of,
)
from midway.gen.diffusion.jump_config import own_solver
from midway.gen.diffusion.load import TrainedModel, load_model
from midway.gen.diffusion.model import LatentModel
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.diffusion.sampling import Start, decode, encode, sample_latents
from midway.gen.evaluation.sources import SolverSource
from midway.gen.flags.cli import resolve
from midway.gen.flags.sample_inputs import (
    InputImages,
    LabelOf,
    chosen_labels,
    label_rule,
    numbered_classes,
    read_images,
)
from midway.gen.flags.sample_outputs import Drawing, check_finite, draw_grid, draw_set, kind_of
from midway.gen.flags.sampling_flags import SamplingFlags
from midway.gen.flags.tile_flags import TileFlags
from midway.gen.metrics.psnr_ssim import psnr
from midway.gen.progress.finished import unfinished
from midway.samplers.parallel import ParallelConfig, ParallelSampler
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """What is drawn."""

    model: Path
    """Run directory of the latent model."""
    out: Path = Path("grid.png")
    """grid.png: a grid. A folder, .zip or .npz: single images. With --invert: noise, .safetensors."""
    solver: str = ""
    """euler, ddim, heun, dpmpp2m, ... (docs/solvers.md), rk45, or one learned for this model: table, amed, amed-plugin-...; of a
    model that jumps: jump, consistency. By default dpmpp2m, or what the model was trained for."""
    nfe: int = 10
    """Network evaluations per image (guidance doubles what the network runs)."""
    grid: str = ""
    """Spacing of the steps: uniform, logsnr, karras, shift, quadratic, vp, ays_sd, ays_sdxl or gits; learned ones have theirs. By
    default karras, of jumps uniform."""
    n: int | None = None
    """Number of images: 64, or as many as --init, --noise or --invert has."""
    seed: int = 0
    """Seed of the first image; the others follow."""
    labels: str | None = None
    """Classes, by number or name: 3, or cat,dog. Seed s has number s mod N of these N; otherwise all classes in turn."""
    init: str | None = None
    """Image to image: an image, a folder, a zip, an .npz or a named source. Seed s begins at image number s mod N."""
    strength: float | None = None
    """With --init: the share of the steps that run, in (0, 1]; 1 begins at the noise of the first step. 0.6 by default."""
    invert: str | None = None
    """Find the noise that gives these images (as --init names them), and write it to --out."""
    noise: Path | None = None
    """Begin at the noise that --invert has written; its classes unless --labels names others."""
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


@dataclass(frozen=True, kw_only=True)
class SampleTask(TileFlags, SamplingFlags, SampleFlags):
    """Draw samples of a model; an image depends on its seed alone.

    A grid: --out grid.png. Single images named by seed and class: --out FOLDER, x.zip or x.npz, with any --n; after a kill
    the same command draws what is missing, and processes share it: accelerate launch --num_processes 4 -m midway sample ...

    Image to image: --init photos --strength 0.6. Inversion: --invert photos --out n.safetensors, then --noise n.safetensors.
    """

    def __post_init__(self) -> None:
        SamplingFlags.__post_init__(self)
        check_flag_ranges(self, n=COUNT, nfe=STEPS, seed=SEED, window=STEPS, tile=WIDTH)
        given = [f"--{name}" for name in ("init", "noise", "invert") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(" and ".join(given), "images begin at one of them", "drop all but one")
        if self.strength is not None and self.init is None:
            raise UsageError("--strength without --init", "there are no images to begin at", "give --init, or drop it")
        if self.invert is not None and (self.analytic_first or self.parallel != "no"):
            flag = "--analytic-first" if self.analytic_first else "--parallel"
            raise UsageError(f"--invert with {flag}", "the reversed grid begins at data, row by row", f"drop {flag}")


def run(task: SampleTask) -> None:
    """Sample, decode, write."""
    kind = kind_of(check_path(task.out), task.invert is not None)
    device, process = device_and_process()
    trained = load_model(task.model, device)
    if process.rank == 0:
        for line in unfinished(trained.run):
            print(f"warning: {printable(line)}", file=sys.stderr)
    task = with_solver(task, trained.model)
    task.apply_tiles(trained.tokenizer)
    config = SamplerConfig((task.grid,), tolerances=(task.rtol, task.atol), **task.sampler_options(device))
    labels = () if task.labels is None else chosen_labels(task.labels, trained.model)
    samplers = make_samplers(trained, task.solver, task.nfe, config)
    sampler = samplers.get(task.grid) or next(iter(samplers.values()))
    if task.invert is not None:
        return invert(task, trained, sampler, config, labels)
    begun = beginning(task, trained, sampler, labels)
    parallel = None if task.parallel == "no" else in_parallel(task, begun.sampler, trained.model.schedule)
    seeds = torch.arange(task.seed, task.seed + begun.count)
    used, sampling = parallel or begun.sampler, config.sampling()
    settings = settings_of(task, SolverSource(trained, used, sampling).identity, labels, begun.about)
    drawing = Drawing(trained, used, seeds, sampling, begun.label_of, begun.start, settings)
    made = draw_grid(drawing, task.out) if kind == "grid" else draw_set(drawing, task.out, kind, process)
    if process.rank > 0:
        return None
    waves = f" in {parallel.waves} waves" if parallel and made.images else ""
    drawn = (
        f"{made.nfe:g} evaluations each{waves}, {made.seconds:.2f} s" if made.images else "all of them there already"
    )
    own = f" ({made.images} drawn here)" if process.world_size > 1 else ""
    echo(f"{begun.count} images{own}, {drawn}; weights {trained.weights}; saved {task.out}")
    if trained.model.classes:
        echo(f"classes: {numbered_classes(trained.model)}")
    return None


def with_solver(task: SampleTask, model: LatentModel) -> SampleTask:
    """With the solver and the grid that the model is sampled by where none is given."""
    solver, grid = own_solver(model.config.objective, model.config.jump)
    return replace(task, solver=task.solver or solver, grid=task.grid or grid)


# ---- where images begin ----


@dataclass(frozen=True)
class Beginning:
    """By which sampler images are drawn, from which states, of which classes, how many of them."""

    sampler: Sampler
    start: Start | None
    label_of: LabelOf
    count: int
    about: dict[str, Any]
    """What the images depend on."""


def beginning(task: SampleTask, trained: TrainedModel, sampler: Sampler, labels: tuple[int, ...]) -> Beginning:
    """Of --init, of --noise, or of fresh noise; errors as `rest_of` and `read_images`."""
    model, schedule = trained.model, trained.model.schedule
    if task.noise is not None:
        found = SavedNoise.load(task.noise, model.latent_shape, model.classes)
        if found.about.get("model") != trained.hash:
            echo(f"note: {task.noise} was found for other weights than {trained.hash}")
        own = labels or tuple(found.labels.tolist())
        start, about = from_noise(found.noise, schedule, sampler.grid[0]), {"--noise": found.hash}
        return Beginning(sampler, start, label_rule(own, model), task.n or len(found.noise), about)
    if task.init is None:
        return Beginning(sampler, None, label_rule(labels, model), task.n or 64, {})
    strength = 0.6 if task.strength is None else task.strength
    rest = rest_of(sampler, task.solver, schedule, strength, task.eta)
    images = read_images(task.init, trained.tokenizer.image_shape, "--init")
    echo(*(f"--init: {note}" for note in images.notes))
    t = torch.tensor(rest.grid[0], dtype=torch.float64)
    steps = f"{len(rest.grid) - 1} of {len(sampler.grid) - 1} steps"
    echo(f"--init: {len(images.pixels)} images, noised to sigma / alpha = {schedule.rho(t).item():.3g}, then {steps}")
    pixels = images.pixels
    start = from_latents(lambda seeds: encode(trained, pixels[seeds % len(pixels)]), schedule, rest.grid[0])
    about = {"--init": fingerprint(pixels), "--strength": steps}
    return Beginning(rest, start, label_rule(labels, model), task.n or len(pixels), about)


def invert(
    task: SampleTask, trained: TrainedModel, sampler: Sampler, config: SamplerConfig, labels: tuple[int, ...]
) -> None:
    """Write the noise of images, and print how near sampling from it comes to them."""
    model, sampling = trained.model, config.sampling()
    table = inverse(sampler, task.solver, model.schedule, task.eta)
    images: InputImages = read_images(task.invert or "", trained.tokenizer.image_shape, "--invert")
    echo(*(f"--invert: {note}" for note in images.notes))
    pixels = images.pixels[: task.n]
    seeds, latents = torch.arange(len(pixels)), encode(trained, pixels)
    classes = label_rule(labels or images.labels(model), model)(seeds)
    found = sample_latents(trained, table, seeds, sampling, classes, lambda some, _: latents[some])
    check_finite(found.latents)
    noise = noise_of_state(found.latents, model.schedule, sampler.grid[0])
    about = {"model": trained.hash, "solver": task.solver, "grid": task.grid, "nfe": table.nfe, "plan": table.hash}
    SavedNoise(noise, classes, about).save(task.out)
    start = from_noise(noise, model.schedule, sampler.grid[0])
    again = sample_latents(trained, sampler, seeds, sampling, classes, start).latents
    error = (again - latents).square().mean().sqrt().item()
    reached, best = (psnr(decode(trained, one), pixels).mean().item() for one in (again, latents))
    cost = f"{found.nfe:g} evaluations each, {found.seconds:.2f} s"
    near = f"RMSE of latents {error:.3g}, PSNR {reached:.2f} dB (of the tokenizer alone {best:.2f} dB)"
    echo(
        f"{len(pixels)} images, {cost}; weights {trained.weights}; saved {task.out}",
        f"reconstruction from this noise: {near}",
        f"noise: mean {noise.mean():.3f}, standard deviation {noise.std():.3f} (of normal noise 0 and 1)",
    )


def settings_of(
    task: SampleTask, identity: dict[str, Any], labels: tuple[int, ...], about: dict[str, Any]
) -> dict[str, Any]:
    """What images depend on, beside their seeds; by the flags' names where they have one."""
    flags = {f"--{name}": getattr(task, name) for name in ("solver", "grid", "nfe", "parallel")}
    tiles = {} if task.tile is None else {"--tile": [task.tile, task.tile_margin]}
    waves = {} if task.parallel == "no" else {"--tolerance": task.tolerance, "--window": task.window}
    return {**flags, **tiles, **waves, **about, "--labels": list(labels) or "in turn", **identity}


def in_parallel(task: SampleTask, sampler: Sampler, schedule: Schedule) -> ParallelSampler:
    """The same in waves; UsageError for a solver without fixed rows, and for jumps."""
    if sampler.table is None:
        raise UsageError(
            f"--parallel with {task.solver}",
            "its steps follow from the network's features",
            "use its form without -predictor",
        )
    if sampler.table.ends:
        raise UsageError(
            f"--parallel with {task.solver}",
            "waves evaluate at one time, and it jumps in few evaluations",
            "drop --parallel",
        )
    assert task.parallel != "no"
    with raising(UsageError, "--tolerance or --window", "change it"):
        return ParallelSampler(sampler.table, schedule, ParallelConfig(task.parallel, task.tolerance, task.window))


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    run(resolve(SampleTask, {}, arguments))
