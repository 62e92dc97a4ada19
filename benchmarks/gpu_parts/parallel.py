"""Sampling in parallel over time beside the sequential loop, as one CUDA graph and eager: wall-clock of one image."""

from collections.abc import Iterator
from functools import partial

import torch
from common import Result
from gpu_parts.graph import a_model
from gpu_parts.part import Maker, Setting, relative, time_rows, turns, value_row

from midway.gen.diffusion.model import LatentModel
from midway.samplers.graph import Graphs
from midway.samplers.grids import logsnr
from midway.samplers.parallel import ParallelConfig, ParallelSample, sample_parallel
from midway.samplers.sample import sample
from midway.samplers.solvers import SOLVERS

STEPS = (20, 50, 100)
TOLERANCES = (1e-2, 1e-3)


def makers(setting: Setting) -> dict[str, Maker]:
    """Every number of steps at every tolerance."""
    model = a_model(setting)
    steps = STEPS if not setting.tiny else (6,)
    seconds = 0.4 * setting.seconds / (len(steps) * len(TOLERANCES))
    return {
        f"N = {count}, tolerance {tolerance:g}": partial(trajectory, setting, model, count, tolerance, seconds)
        for count in steps
        for tolerance in TOLERANCES
    }


@torch.no_grad()
def trajectory(setting: Setting, model: LatentModel, count: int, tolerance: float, seconds: float) -> Iterator[Result]:
    """ddim, one image; its waves, and how far its result is from the sequential one."""
    table = SOLVERS["ddim"].build(model.schedule, logsnr(model.schedule, count))
    labels = torch.zeros(1, dtype=torch.int64, device=setting.device)
    x, graphs, config = (
        torch.randn(1, *model.latent_shape, device=setting.device),
        Graphs(),
        ParallelConfig(tolerance=tolerance),
    )

    def parallel() -> ParallelSample:
        return sample_parallel(lambda n: model.field(labels.repeat(n)), table, model.schedule, x, config)

    name, found = f"parallel in time, N = {count}, tolerance {tolerance:g}", parallel()
    yield value_row(f"{name}, waves", "waves", found.waves)
    difference = {"x, relative": relative(found.x, sample(model.field(labels), table, x))}
    sides = {
        "parallel": parallel,
        "sequential, graph": lambda: graphs.sample(model.field, table, x, (labels,)),
        "sequential, eager": lambda: sample(model.field(labels), table, x),
    }
    taken = turns(sides, setting, seconds, warm_up=1)
    yield from time_rows(name, taken, dict.fromkeys(sides, difference))
