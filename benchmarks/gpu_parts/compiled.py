"""torch.compile beside eager: what compiling costs, a training step, and a trajectory, also inside a CUDA graph."""

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from common import Result
from gpu_parts.graph import STEPS, a_model
from gpu_parts.part import Maker, Setting, Work, relative, time_rows, turns, value_row

from midway.samplers.graph import Graphs
from midway.samplers.grids import karras
from midway.samplers.sample import sample
from midway.samplers.solvers import SOLVERS


def makers(setting: Setting) -> dict[str, Maker]:
    """Training in bf16 is where it is used; then sampling of one image and of a batch."""
    seconds = 0.2 * setting.seconds / 3
    batches = (1, 64) if not setting.tiny else (1,)
    sampled: dict[str, Maker] = {
        f"sampling, B = {batch}": partial(sampling, setting, batch, seconds) for batch in batches
    }
    return {"training step": partial(training, setting, seconds), **sampled}


def training(setting: Setting, seconds: float) -> Iterator[Result]:
    """One optimizer step of the bare loop in bf16."""
    from gpu_parts.training import loss_of, training_row
    from training import bare_loop

    row = training_row(setting, "bf16")
    sides: dict[str, Work] = {}
    for way in ("compiled", "eager"):
        config = replace(row.config, compile=way == "compiled")
        sides[way] = partial(next, bare_loop(row.model, loss_of(row), row.items.size, config, setting.device))
    begun = time.perf_counter()
    sides["compiled"]()
    yield value_row("training step, bf16, the first compiled one", "s", time.perf_counter() - begun)
    yield from time_rows("training step, bf16", turns(sides, setting, seconds))


@torch.no_grad()
def sampling(setting: Setting, batch: int, seconds: float) -> Iterator[Result]:
    """dpmpp2m in float32: compiled and eager networks, each with a graph and without."""
    model = a_model(setting)
    faster = copy.deepcopy(model)
    faster.network.compile()
    table = SOLVERS["dpmpp2m"].build(model.schedule, karras(model.schedule, STEPS))
    labels = torch.zeros(batch, dtype=torch.int64, device=setting.device)
    x, graphs = torch.randn(batch, *model.latent_shape, device=setting.device), Graphs()
    sides = {
        "compiled, graph": lambda: graphs.sample(faster.field, table, x, (labels,), key="compiled"),
        "compiled": lambda: sample(faster.field(labels), table, x),
        "eager, graph": lambda: graphs.sample(model.field, table, x, (labels,), key="eager"),
        "eager": lambda: sample(model.field(labels), table, x),
    }
    name = f"sampling, {STEPS} steps, B = {batch}"
    begun = time.perf_counter()
    found = {"x, relative": relative(sides["compiled"](), sides["eager"]())}
    yield value_row(f"{name}, the first compiled one", "s", time.perf_counter() - begun)
    yield from time_rows(name, turns(sides, setting, seconds), dict.fromkeys(sides, found))
