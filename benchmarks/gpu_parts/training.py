"""Images per second of fit() on a DiT-S, beside a bare loop and beside the loop of diffusers' training example.

The example's loop needs Accelerate only; its own UNet is a row where diffusers is installed.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import training as benchmark
from gpu_parts.part import Maker, Setting
from torch import Tensor, nn

from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.training.config import TrainConfig

BATCH = 128
Loss = Callable[[nn.Module, Tensor], Tensor]


def makers(setting: Setting) -> dict[str, Maker]:
    """The same model beside both loops, in bf16 and in float32, and the UNet of diffusers."""
    seconds = 0.5 * setting.seconds / 5
    made: dict[str, Maker] = {}
    for precision in ("bf16", "no"):
        for peer in ("bare loop", "recipe"):
            made[f"DiT-S, {precision}, {peer}"] = partial(speeds, setting, precision, peer, seconds)
    return {**made, "UNet2DModel": partial(unet, setting, seconds)}


def training_row(setting: Setting, precision: str) -> benchmark.Row:
    """DiT-S/2 on standard normal latents of 4x32x32, or a small one: fit() and the bare loop."""
    torch.manual_seed(0)
    dit = (
        DiTConfig(width=32, depth=2, heads=2, patch=2)
        if setting.tiny
        else DiTConfig(width=384, depth=12, heads=6, patch=2)
    )
    shape = (4, 4, 4) if setting.tiny else (4, 32, 32)
    model = LatentModel(LatentModelConfig(dit=dit), shape, 1000)
    config = TrainConfig(batch_size=8 if setting.tiny else BATCH, lr=1e-4, precision=precision, ema=0.999)  # pyright: ignore
    return benchmark.latent_model_row("DiT-S", model, 64 if setting.tiny else 4096, config, setting.device)


def speeds(setting: Setting, precision: str, peer: str, seconds: float) -> Iterator[dict[str, Any]]:
    """As benchmarks/training.py measures, in turns of few steps."""
    row = training_row(setting, precision)
    if peer == "recipe":
        loop = partial(recipe_loop, row.model, loss_of(row), row.items.size, row.config, setting.device)
        row = replace(row, peer=loop, peer_name="the loop of diffusers' example", target=benchmark.PEER_TARGET)
    yield measured(row, setting, f"DiT-S, batch {row.config.batch_size}, {precision}", seconds)


def unet(setting: Setting, seconds: float) -> Iterator[dict[str, Any]]:
    """diffusers' network by fit() and by its own recipe, in bf16."""
    row = benchmark.diffusers_row(setting.device, "bf16")
    if setting.tiny:
        row = replace(row, config=replace(row.config, batch_size=2))
        row = replace(row, peer=partial(row.peer.func, *row.peer.args[:2], row.config, setting.device))  # pyright: ignore
    yield measured(row, setting, row.name, seconds)


def measured(row: benchmark.Row, setting: Setting, name: str, seconds: float) -> dict[str, Any]:
    """One comparison; the ratio is that of the speeds, ours / peer, with its standard error."""
    turn, least = (1, 3) if setting.tiny else (5, 10)
    found = benchmark.measure(row, 0 if setting.tiny else seconds, setting.device, turn, least)
    ours, peer = found["ours_images_per_second"], found["peer_images_per_second"]
    judged = {} if setting.tiny else {"target": f"ours / peer >= {row.target:g}", "held": found["held"]}
    kept = {key: found[key] for key in ("ratio", "error", "turns", "batch")}
    return {
        "name": f"{name}, fit()",
        "unit": "images/s",
        "ours": ours,
        "peer_name": row.peer_name,
        "peer": peer,
        **kept,
        **judged,
    }


def loss_of(row: benchmark.Row) -> Loss:
    """What the bare loop of a row computes of a network and item indices."""
    return row.peer.args[1]  # pyright: ignore[reportFunctionMemberAccess]


def recipe_loop(model: nn.Module, loss: Loss, size: int, config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Accelerate prepares model, AdamW and a shuffled DataLoader; the loss is read, and the average moved, in every step."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=config.precision, cpu=device.type == "cpu")
    net = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, betas=(0.95, 0.999), weight_decay=1e-6)
    indices: Any = torch.utils.data.DataLoader(range(size), config.batch_size, shuffle=True, drop_last=True)  # pyright: ignore
    net, optimizer, indices = accelerator.prepare(net, optimizer, indices)
    averaged = [p.detach().clone() for p in net.parameters()]
    net.train()
    batches = iter(indices)
    while True:
        items = next(batches, None)
        if items is None:
            batches = iter(indices)
            items = next(batches)
        with accelerator.accumulate(net):
            with accelerator.autocast():
                value = loss(net, items)
            accelerator.backward(value)
            accelerator.clip_grad_norm_(net.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for mean, p in zip(averaged, net.parameters(), strict=True):
                mean.lerp_(p, 1 - config.ema)
        value.detach().item()  # the example gives it to its progress bar
        yield
