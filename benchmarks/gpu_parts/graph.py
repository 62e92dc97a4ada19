"""A whole trajectory as one CUDA graph, beside the eager loop and beside the loop of a diffusers pipeline, on one DiT-S."""

from collections.abc import Iterator
from functools import partial

import torch
from common import Result
from gpu_parts.part import Maker, Setting, Work, relative, time_rows, turns, without

from midway.gen.diffusion.model import LatentModel
from midway.samplers.graph import Graphs
from midway.samplers.grids import karras
from midway.samplers.sample import sample
from midway.samplers.solvers import SOLVERS
from samplers import Network, diffusers_loop, make_model, overhead_rows

PEERS = {"ddim": "DDIMScheduler", "dpmpp2m": "DPMSolverMultistepScheduler", "unipc3": "UniPCMultistepScheduler"}
BATCHES = (1, 64)
STEPS = 10
LATENCY = 3.0
"""How many times as fast as diffusers' loop one image by ddim has to be."""


def makers(setting: Setting) -> dict[str, Maker]:
    """Every solver at every batch, and the overhead over the network."""
    model = a_model(setting)
    batches = BATCHES if not setting.tiny else (1, 2)
    seconds = 0.4 * setting.seconds / (len(PEERS) * len(batches))
    timed = {
        f"{name}, B = {batch}": partial(trajectories, setting, model, name, batch, seconds)
        for batch in batches
        for name in PEERS
    }
    return {**timed, **{f"overhead, B = {batch}": partial(overhead, setting, model, batch) for batch in batches}}


def a_model(setting: Setting) -> LatentModel:
    """DiT-S on 16x16 latents with random weights, or a small one."""
    return make_model(Network(32, 2, 4, 4) if setting.tiny else Network(), setting.device)


@torch.no_grad()
def trajectories(
    setting: Setting, model: LatentModel, name: str, batch: int, seconds: float
) -> Iterator[Result | dict]:
    """Graph, eager and diffusers in turns, with how far the graph's result is from the eager one's."""
    table = SOLVERS[name].build(model.schedule, karras(model.schedule, STEPS))
    labels = torch.zeros(batch, dtype=torch.int64, device=setting.device)
    x, graphs = torch.randn(batch, *model.latent_shape, device=setting.device), Graphs()
    row, peer = f"{name}, {STEPS} steps, B = {batch}", f"diffusers' {PEERS[name]}"
    sides: dict[str, Work] = {
        "graph": lambda: graphs.sample(model.field, table, x, (labels,)),
        "eager": lambda: sample(model.field(labels), table, x),
    }
    try:
        sides[peer] = diffusers_loop(model, PEERS[name], STEPS, x, labels)
    except ModuleNotFoundError as error:
        yield without(f"{row}, beside {peer}", error)
    found = relative(graphs.sample(model.field, table, x, (labels,)), sample(model.field(labels), table, x))
    target = {peer: LATENCY} if setting.cuda and batch == 1 and name == "ddim" else {}
    yield from time_rows(row, turns(sides, setting, seconds), {"eager": {"x, relative": found}}, target)


@torch.no_grad()
def overhead(setting: Setting, model: LatentModel, batch: int) -> list[Result]:
    """The share of a trajectory that is not the network's, with a graph and without."""
    table = SOLVERS["dpmpp2m"].build(model.schedule, karras(model.schedule, STEPS))
    return overhead_rows(model, table, batch, setting.device, 1 if setting.tiny else 20)
