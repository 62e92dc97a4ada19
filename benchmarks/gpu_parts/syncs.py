"""How often the host waits for the GPU within a trajectory, and in a training step: CUDA reports operations that synchronise.

Trajectories are counted after one that makes what is made once; of training, the difference of a longer and a shorter one.
"""

import copy
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from common import Result
from gpu_parts.graph import PEERS, STEPS, a_model
from gpu_parts.part import Maker, Setting, Work, value_row
from torch import Tensor

from midway.gen.core.config import to_dict
from midway.gen.core.runs import Run
from midway.gen.diffusion.model import Guidance, LatentModel
from midway.samplers.grids import karras
from midway.samplers.sample import sample
from midway.samplers.solvers import ALIASES, SOLVERS
from samplers import diffusers_loop

REPORTED = "called a synchronizing"
"""What CUDA's warning of one holds; it has another, once, about the check itself."""
GUIDED = {"unguided": 1.0, "guided": Guidance(2.0), "guided in an interval": Guidance(2.0, (0.3, 2.0))}


def makers(setting: Setting) -> dict[str, Maker]:
    """Every solver of the registry, then guidance, then the schedulers of diffusers."""
    model = a_model(setting)
    ours: dict[str, Maker] = {name: partial(solver, setting, model, name) for name in SOLVERS if name not in ALIASES}
    guided: dict[str, Maker] = {how: partial(guidance, setting, model, how) for how in GUIDED}
    peers: dict[str, Maker] = {
        f"diffusers' {name}": partial(scheduler, setting, model, name) for name in PEERS.values()
    }
    return {**ours, **guided, "training": partial(training, setting), **peers}


def synchronisations(work: Work, device: torch.device) -> int:
    """Of the second call of `work`; 0 where nothing is asynchronous."""
    work()
    return reported(work, device)


def reported(work: Work, device: torch.device) -> int:
    """How many synchronising operations CUDA reports while `work` runs."""
    if device.type != "cuda":
        work()
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(REPORTED in str(warning.message) for warning in caught)


def row(name: str, count: int, setting: Setting, ours: bool) -> Result:
    """A count; of ours it has to be 0."""
    judged = ours and setting.cuda
    return Result(
        f"waits of {name}", "", count, "", None, None, "= 0" if judged else "", count == 0 if judged else None
    )


def start(setting: Setting, model: LatentModel) -> tuple[Tensor, Tensor]:
    """Noise and labels of two samples."""
    x = torch.randn(2, *model.latent_shape, device=setting.device)
    return x, torch.zeros(2, dtype=torch.int64, device=setting.device)


@torch.no_grad()
def solver(setting: Setting, model: LatentModel, name: str) -> Iterator[Result]:
    """One of the registry, with noise that is on the device where it draws any."""
    x, labels = start(setting, model)
    table = SOLVERS[name].build(model.schedule, karras(model.schedule, STEPS))
    noise = torch.randn_like if table.stochastic else None
    field = model.field(labels)
    yield row(name, synchronisations(lambda: sample(field, table, x, noise), setting.device), setting, ours=True)


@torch.no_grad()
def guidance(setting: Setting, model: LatentModel, how: str) -> Iterator[Result]:
    """dpmpp2m with a field that is made anew for every trajectory, as sampling makes it."""
    x, labels = start(setting, model)
    table = SOLVERS["dpmpp2m"].build(model.schedule, karras(model.schedule, STEPS))
    found = synchronisations(lambda: sample(model.field(labels, GUIDED[how]), table, x), setting.device)
    yield row(f"a field made anew, {how}", found, setting, ours=True)


def training(setting: Setting) -> Iterator[Result]:
    """fit() of a DiT without logging: the waits of one more step."""
    from accelerate import Accelerator
    from gpu_parts.training import training_row

    from midway.gen.training.fit import fit

    row = training_row(setting, "bf16")

    def fit_for(steps: int) -> None:
        config = replace(row.config, steps=steps, log_every=10**6, save_seconds=0)
        accelerator = Accelerator(mixed_precision="bf16", cpu=not setting.cuda)
        with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
            run = Run(Path(folder), "benchmark", {"train": to_dict(config)}, quiet=True)
            fit(copy.deepcopy(row.model), row.items, config, run, accelerator)

    fit_for(2)
    short, long = (reported(partial(fit_for, steps), setting.device) for steps in ((2, 4) if setting.tiny else (5, 25)))
    yield value_row("waits of a step of fit()", "", (long - short) / (2 if setting.tiny else 20))


@torch.no_grad()
def scheduler(setting: Setting, model: LatentModel, name: str) -> Iterator[Result]:
    """The loop of a diffusers pipeline with this scheduler, `set_timesteps` included."""
    x, labels = start(setting, model)
    loop = diffusers_loop(model, name, STEPS, x, labels)
    yield row(f"diffusers' {name}", synchronisations(loop, setting.device), setting, ours=False)
