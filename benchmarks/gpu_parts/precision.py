"""bfloat16 and TF32 beside IEEE float32: sampling (time, and error against float64) and a training step (time and memory)."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from common import Result, peak_bytes
from gpu_parts.graph import STEPS, a_model
from gpu_parts.part import Maker, Setting, Work, compared, relative, time_rows, turns

from midway.gen.diffusion.model import LatentModel
from midway.samplers.graph import Graphs
from midway.samplers.grids import karras
from midway.samplers.sample import sample
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table

WAYS = ("bf16", "TF32", "float32")


def makers(setting: Setting) -> dict[str, Maker]:
    """Sampling, then training."""
    batches = (1, 64) if not setting.tiny else (1,)
    seconds = 0.3 * setting.seconds / (len(batches) + 1)
    sampled: dict[str, Maker] = {
        f"sampling, B = {batch}": partial(sampling, setting, batch, seconds) for batch in batches
    }
    return {**sampled, "training step": partial(training, setting, seconds)}


@contextlib.contextmanager
def products(way: str) -> Iterator[None]:
    """Within the block float32 matrices are multiplied in TF32 if that is the way, else in IEEE float32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if way == "TF32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@torch.no_grad()
def sampling(setting: Setting, batch: int, seconds: float) -> Iterator[Result]:
    """dpmpp2m as one graph in every precision, and its end beside that of float64."""
    model = a_model(setting)
    table = SOLVERS["dpmpp2m"].build(model.schedule, karras(model.schedule, STEPS))
    labels = torch.zeros(batch, dtype=torch.int64, device=setting.device)
    x, graphs = torch.randn(batch, *model.latent_shape, device=setting.device), Graphs()

    def side(way: str) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            # a graph must not hold casts that autocast frees at its end
            bf16 = torch.autocast(setting.device.type, torch.bfloat16, enabled=way == "bf16", cache_enabled=False)
            with products(way), bf16:
                return graphs.sample(model.field, table, x, (labels,), key=way)

        return run

    sides = {way: side(way) for way in WAYS}
    name = f"sampling, {STEPS} steps, B = {batch}"
    exact = in_float64(model, table, x, labels)
    errors = {way: relative(run(), exact) for way, run in sides.items()}
    for way in ("bf16", "TF32"):
        yield compared(f"{name}, {way}, error against float64", "relative", errors[way], "float32", errors["float32"])
    yield from time_rows(name, turns({way: sides[way] for way in ("bf16", "TF32", "float32")}, setting, seconds))


def in_float64(model: LatentModel, table: Table, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same trajectory with all numbers in float64."""
    return sample(copy.deepcopy(model).double().field(labels), table, x.double())


def training(setting: Setting, seconds: float) -> Iterator[Result]:
    """One optimizer step of the bare loop on the same model in every precision: forward, backward, AdamW, average."""
    from gpu_parts.training import loss_of, training_row
    from training import bare_loop

    row = training_row(setting, "no")
    sides: dict[str, Work] = {}
    for way in WAYS:
        config = replace(row.config, precision="bf16" if way == "bf16" else "no")
        steps = bare_loop(row.model, loss_of(row), row.items.size, config, setting.device)
        sides[way] = partial(one_step, steps, way)
    yield from time_rows("training step", turns(sides, setting, seconds))
    peaks = {way: peak_bytes(work, setting.device) / 2**20 for way, work in sides.items()}
    yield compared("training step, memory, bf16", "MiB", peaks["bf16"], "float32", peaks["float32"])


def one_step(steps: Iterator[None], way: str) -> None:
    """The next of an endless training, which has an autocast of its own."""
    with products(way):
        next(steps)
