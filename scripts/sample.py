"""Draw samples: python scripts/sample.py --model runs/digits-dit --solver ddim --nfe 10 --n 64 --seed 0 --out grid.png"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import main, resolve
from midway.gen.artefacts import best_device, load_model
from midway.gen.errors import DivergedError, UsageError
from midway.gen.evaluate import SweepConfig, make_plans
from midway.gen.pictures import save_grid
from midway.gen.sampling import decode, sample_latents


@dataclass(frozen=True)
class SampleTask:
    """Sample a grid of images; image k depends on seed + k alone."""

    model: Path
    """Run directory of the latent model."""
    out: Path = Path("grid.png")
    """PNG to write."""
    solver: str = "dpmpp2m"
    """euler, ddim, heun, dpm2, dpmpp2m, or a learned solver: amed, amed-constants."""
    nfe: int = 10
    """Network evaluations per image (guidance doubles what the network runs)."""
    grid: str = "karras"
    """Spacing of the steps: uniform, logsnr, karras, shift. A learned solver brings its own."""
    n: int = 64
    """Number of images."""
    seed: int = 0
    """Seed of the first image; the others follow."""
    label: int | None = None
    """One class for all images; otherwise the classes in turn."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    analytic_first: bool = False
    """Replace the first evaluation by the analytic direction (odd budgets for two-stage solvers)."""
    eta: float = 0.0
    """ddim only: 0 is deterministic, 1 ancestral."""
    batch_size: int = 256


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
    trained = load_model(task.model, best_device())
    classes = trained.model.classes
    if task.label is not None and not classes:
        raise UsageError(f"--label {task.label}", "this model was trained without classes", "drop --label")
    if task.label is not None and not 0 <= task.label < classes:
        raise UsageError(f"--label {task.label}", f"the model knows classes 0 to {classes - 1}", "choose one of them")
    config = SweepConfig(grids=(task.grid,), guidance=task.guidance, analytic_first=task.analytic_first, eta=task.eta)
    plans = make_plans(trained, task.solver, task.nfe, config)
    plan = plans.get(task.grid) or next(iter(plans.values()))
    seeds = torch.arange(task.seed, task.seed + task.n)
    labels = None if task.label is None else torch.full((task.n,), task.label)
    samples = sample_latents(trained, plan, seeds, task.guidance, task.batch_size, labels)
    if not samples.latents.isfinite().all():
        raise DivergedError(
            "sampling diverged", "the latents stopped being finite", "use more --nfe or less --guidance"
        )
    save_grid(task.out, decode(trained, samples.latents), columns=math.ceil(math.sqrt(task.n)))
    print(
        f"{task.n} images, {samples.nfe:g} evaluations each, {samples.seconds:.2f} s; "
        f"weights {trained.weights}; saved {task.out}"
    )


if __name__ == "__main__":
    main(lambda arguments: run(resolve(SampleTask, {}, arguments)))
