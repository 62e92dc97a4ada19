"""Draw samples: midway sample --model runs/digits-dit --solver ddim --nfe 10 --n 64 --seed 0 --out grid.png

Of a prior over codes: midway sample --model runs/digits-masked --solver halton --nfe 4
"""

import sys
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from midway.gen.core.errors import UsageError, raising
from midway.gen.core.files import check_path
from midway.gen.core.processes import ProcessInfo, device_and_process
from midway.gen.core.runs import kind_of as run_kind
from midway.gen.core.text import echo, printable
from midway.gen.data.external import fingerprint
from midway.gen.diffusion.adapters import load_adapted
from midway.gen.diffusion.inversion import (
    SavedNoise,
    from_latents,
    from_noise,
    inverse,
    noise_of_state,
    rest_of,
)
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.model import LatentModel
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.diffusion.sampling import Start, decode, encode, sample_latents
from midway.gen.evaluation.sources import SolverSource
from midway.gen.flags.cli import resolve
from midway.gen.flags.sample_flags import SampleTask
from midway.gen.flags.sample_inputs import (
    InputImages,
    LabelOf,
    chosen_labels,
    label_rule,
    numbered_classes,
    read_images,
    read_prompt,
)
from midway.gen.flags.sample_outputs import (
    Drawing,
    Kind,
    by_prior,
    by_sampler,
    check_finite,
    draw_grid,
    draw_set,
    kind_of,
)
from midway.gen.metrics.psnr_ssim import psnr
from midway.gen.objectives.jump_config import own_solver
from midway.gen.priors.load import KIND, TrainedPrior, load_prior
from midway.gen.priors.rules import DecodingFlags, check_solver, decoding_for, draw_warnings, head_for
from midway.gen.priors.sampling import CodeSampling, identity_of
from midway.gen.progress.finished import unfinished
from midway.samplers.parallel import ParallelConfig, ParallelSampler
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule

NFE = 10
"""Of a latent model where none is given."""


def run(task: SampleTask) -> None:
    """Sample, decode, write."""
    kind = kind_of(check_path(task.out), task.invert is not None)
    device, process = device_and_process()
    if run_kind(task.model) == KIND:
        prior = load_prior(task.model, device)
        drawing, warnings = prior_drawing(task, prior)
        warn(process, *unfinished(prior.run), *warnings)
        return write(task, drawing, kind, process, prior.weights)
    trained = load_adapted(task.model, task.adapter, device)
    warn(process, *unfinished(task.model, trained.run))
    check_latent(task)
    task = with_solver(task, trained.model)
    task.apply_tiles(trained.tokenizer)
    config = SamplerConfig((task.grid,), tolerances=(task.rtol, task.atol), **task.sampler_options(device))
    labels = () if task.labels is None else chosen_labels(task.labels, trained.model)
    samplers = make_samplers(trained, task.solver, task.nfe or NFE, config)
    sampler = samplers.get(task.grid) or next(iter(samplers.values()))
    if task.invert is not None:
        return invert(task, trained, sampler, config, labels)
    begun = beginning(task, trained, sampler, labels)
    parallel = None if task.parallel == "no" else in_parallel(task, begun.sampler, trained.model.schedule)
    seeds = torch.arange(task.seed, task.seed + begun.count)
    used, sampling = parallel or begun.sampler, config.sampling()
    settings = settings_of(task, SolverSource(trained, used, sampling).identity, labels, begun.about)
    make = by_sampler(trained, used, sampling, begun.start)
    drawing = Drawing(make, trained.model, seeds, task.batch_size, begun.label_of, settings)
    return write(task, drawing, kind, process, trained.weights, parallel)


def warn(process: ProcessInfo, *lines: str) -> None:
    """On the terminal, by the first process."""
    for line in lines if process.rank == 0 else ():
        print(f"warning: {printable(line)}", file=sys.stderr)


def write(
    task: SampleTask,
    drawing: Drawing,
    kind: Kind,
    process: ProcessInfo,
    weights: str,
    parallel: ParallelSampler | None = None,
) -> None:
    """Draw, and print what it took."""
    made = draw_grid(drawing, task.out) if kind == "grid" else draw_set(drawing, task.out, kind, process)
    if process.rank > 0:
        return
    head = f", {made.head_nfe:g} of the head a token" * bool(made.head_nfe)
    passed = f" ({made.token_evaluations:g} token-evaluations{head})" * bool(made.token_evaluations)
    waves = f" in {parallel.waves} waves" if parallel and made.images else ""
    took = f"{made.nfe:g} evaluations{passed} each{waves}, {made.seconds:.2f} s"
    drawn = took if made.images else "all of them there already"
    own = f" ({made.images} drawn here)" if process.world_size > 1 else ""
    echo(f"{len(drawing.seeds)} images{own}, {drawn}; weights {weights}; saved {task.out}")
    if drawing.model.classes:
        echo(f"classes: {numbered_classes(drawing.model)}")


def check_latent(task: SampleTask) -> None:
    """UsageError for flags of priors, and the name of a rule, where the model is a latent one."""
    task.without_priors("this is a latent model")
    if task.prompt is not None:
        why, fix = "only priors complete tokens, and this is a latent model", "drop it; image to image is --init"
        raise UsageError(f"--prompt {task.prompt}", why, fix)
    check_solver(task.solver, "--solver", str(task.model))


def with_solver(task: SampleTask, model: LatentModel) -> SampleTask:
    """With the solver and the grid that the model is sampled by where none is given."""
    solver, grid = own_solver(model.config.objective, model.config.jump)
    return replace(task, solver=task.solver or solver, grid=task.grid or grid, nfe=task.nfe or NFE)


# ---- priors ----

OF_SOLVERS = (
    "init strength invert noise parallel tolerance window rtol atol guidance_interval guide adapter analytic_first eta "
    "graph"
)
"""Flags without effect on priors."""


def prior_drawing(task: SampleTask, trained: TrainedPrior) -> tuple[Drawing, tuple[str, ...]]:
    """Images of a prior, and warnings. UsageError for a rule, a number of evaluations or a flag that it cannot have."""
    prior = trained.prior
    given = [f.name for f in fields(task) if f.name in OF_SOLVERS.split() and getattr(task, f.name) != f.default]
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        raise UsageError(
            f"{flag} on {task.model}", "it is for models that are solved, and this is a prior", f"drop {flag}"
        )
    task.apply_tiles(trained.tokenizer)
    found = None if task.prompt is None else read_prompt(task, trained)
    prompt, own = (None, ()) if found is None else (found.prompt, found.labels)
    left, flags = None if prompt is None else prompt.left, ("--solver", "--nfe", "--grid")
    given = DecodingFlags(task.solver, task.nfe, task.grid, task.guidance, task.draw_options, flags, left)
    decoding = decoding_for(prior, given, trained.run.place)
    labels = own if task.labels is None else chosen_labels(task.labels, prior)
    head = head_for(trained, task.head, task.guidance)
    sampling = CodeSampling(decoding, task.batch_size, task.precision, head=head, prompt=prompt)
    tiles = {} if task.tile is None else {"--tile": [task.tile, task.tile_margin]}
    settings = {**tiles, "--labels": list(labels) or "in turn", **identity_of(trained, sampling)}
    count = task.n or (64 if prompt is None else len(prompt.tokens))
    seeds, make = torch.arange(task.seed, task.seed + count), by_prior(trained, sampling)
    drawing = Drawing(make, prior, seeds, task.batch_size, label_rule(labels, prior), settings)
    return drawing, draw_warnings(prior, [decoding], prompt)


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
