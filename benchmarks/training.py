"""Images per second of fit() beside a bare PyTorch loop and beside diffusers' unconditional-training recipe.

Both sides of a row train the same network on the same data at the same batch and precision, in turns, in one process. The time
per step of a turn is the lower quartile of its steps, and that of a side the lower quartile of its turns, since whatever else
the machine does only ever adds; the ratio is that of the two. fit() is timed between optimizer steps, so with everything it
does for each of them (data order, noise by sample, finite check, average, sums for the log).

bare loop    the fewest lines that train the same thing: torch.randn, torch.randperm, fused AdamW, gradient clipping, a weight
             average by torch._foreach_lerp_, the loss read every 50 steps
diffusers    the objects of its training example, as the example uses them: DDPMScheduler, EMAModel, get_scheduler, a shuffled
             DataLoader, all prepared by Accelerate; the loss read every step

    python benchmarks/training.py --out benchmarks/results/training.json
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.config import to_dict
from midway.gen.context import Context, ImageBatch, LatentBatch
from midway.gen.data import load_images, to_float
from midway.gen.latent_model import LatentModel
from midway.gen.optim import compile_networks
from midway.gen.runs import Run, environment
from midway.gen.tokenizer_training import TokenizerObjective
from midway.gen.train_config import TrainConfig, learning_rate
from midway.gen.trainable import Items
from midway.gen.training import fit
from midway.samplers.prediction import expand, target_value
from midway.tokenizers.tokenizer import ImageTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from recipes import LATENT_RECIPES, TOKENIZER_RECIPES

Steps = Callable[[int], list[float]]
"""Train so many steps; when each of them ended."""
TOKENIZERS = ("digits-fsq", "digits-vq", "cifar10-fsq")
LATENT_MODELS = ("digits-dit", "cifar10-dit")
BARE_TARGET, PEER_TARGET = 0.97, 1.0
TURN_SECONDS = 1.3


@dataclass(frozen=True)
class Row:
    """A comparison: both sides, images of a step, and the least ratio of our speed to the peer's."""

    name: str
    peer: str
    ours: Steps
    theirs: Steps
    batch: int
    target: float


# ---- our side ----


class Timed(nn.Module):
    """A model that notes the time after every optimizer step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.times: list[float] = []

    def loss(self, batch: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner.loss(batch, context)  # pyright: ignore[reportCallIssue]

    def after_step(self, kept: Tensor) -> None:
        self.inner.after_step(kept)  # pyright: ignore[reportCallIssue]
        self.times.append(time.perf_counter())


def fit_steps(model: nn.Module, items: Items, config: TrainConfig, device: torch.device) -> Steps:
    """fit() on a copy of `model`; the first two steps of a call are not timed."""

    def run(count: int) -> list[float]:
        timed = Timed(copy.deepcopy(model))
        now = replace(config, steps=count + 2, save_seconds=0)
        with tempfile.TemporaryDirectory() as folder:
            AcceleratorState._reset_state(True)
            accelerator = Accelerator(mixed_precision=config.precision, cpu=device.type == "cpu")
            fit(timed, items, now, Run(Path(folder), "benchmark", {"train": to_dict(now)}, quiet=True), accelerator)
        return timed.times[1:]

    return run


# ---- the bare loop ----


def bare_steps(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    size: int,
    config: TrainConfig,
    device: torch.device,
) -> Steps:
    """The loop one writes by hand; `loss_of(model, item indices)` is the loss of a batch."""

    def run(count: int) -> list[float]:
        net = copy.deepcopy(model).to(device).train()
        if config.compile:
            compile_networks(net)
        parameters = list(net.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        averaged = [p.detach().clone() for p in parameters]
        batches = shuffled(size, config.batch_size)
        times = []
        for step in range(count + 2):
            optimizer.param_groups[0]["lr"] = learning_rate(config, step)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = loss_of(net, next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(
                averaged, [p.detach() for p in parameters], 1 - min(config.ema, (1 + step) / (10 + step))
            )
            if step % 50 == 49:
                loss.item()
            times.append(time.perf_counter())
        return times[1:]

    return run


def shuffled(size: int, batch: int) -> Iterator[Tensor]:
    """Endless batches of item indices, in a new order each epoch."""
    rest = torch.empty(0, dtype=torch.int64)
    while True:
        while len(rest) < batch:
            rest = torch.cat([rest, torch.randperm(size)])
        yield rest[:batch]
        rest = rest[batch:]


# ---- what is trained ----


def images_like(name: str) -> Tensor:
    """uint8 (N, C, H, W): the digits, or noise of CIFAR-10's size, which takes as long."""
    if name == "digits":
        return load_images("digits").images
    return torch.randint(0, 256, (2048, 3, 32, 32), dtype=torch.uint8)


def tokenizer_row(recipe: str, device: torch.device, precision: str, compiled: bool) -> Row:
    """A tokenizer recipe: fit() and the bare loop."""
    task = TOKENIZER_RECIPES[recipe]()
    images = images_like(recipe.split("-")[0]).to(device)
    tokenizer = ImageTokenizer(
        in_channels=images.shape[1],
        image_size=images.shape[2],
        width=task.model.width,
        downsample=task.model.downsample,
        blocks=task.model.blocks,
        quantizer=task.model.quantizer_config(images.shape[1]),
    )
    model = TokenizerObjective(tokenizer)
    config = replace(task.train, precision=precision, compile=compiled)
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    fetch = Items(lambda items: ImageBatch(images[items.to(device)], labels[items.to(device)]), len(images))

    def loss_of(net: nn.Module, items: Tensor) -> Tensor:
        x = to_float(images[items.to(device)])
        out = net.tokenizer(x)  # pyright: ignore[reportCallIssue]
        net.tokenizer.update()  # pyright: ignore
        return (out.reconstruction - x).square().mean() + out.quantized.loss

    return make_row(recipe, model, fetch, loss_of, config, device)


def latent_row(recipe: str, device: torch.device, precision: str, compiled: bool) -> Row:
    """A latent-model recipe on standard normal latents of its tokenizer's shape: fit() and the bare loop."""
    task = LATENT_RECIPES[recipe]()
    digits = recipe.startswith("digits")
    shape, size = ((6, 2, 2), 1438) if digits else ((6, 8, 8), 2048)
    latents = torch.randn(size, *shape).to(device)
    labels = torch.randint(0, 10, (size,)).to(device)
    model = LatentModel(task.model, shape, 10)
    config = replace(task.train, precision=precision, compile=compiled)
    fetch = Items(lambda items: LatentBatch(latents[items.to(device)], labels[items.to(device)]), size)
    mean, std, dropped = task.model.time_mean, task.model.time_std, task.model.label_dropout

    def loss_of(net: nn.Module, items: Tensor) -> Tensor:
        assert isinstance(net, LatentModel)
        items = items.to(device)
        x0 = latents[items]
        eps, schedule = torch.randn_like(x0), net.schedule
        t = schedule.time_of_rho((mean + std * torch.randn(len(x0), device=device)).exp().clamp(0.002, 80))
        label = torch.where(torch.rand(len(x0), device=device) < dropped, 10, labels[items])
        x_t = expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps
        target = target_value(net.config.target, x0, eps, t, schedule) / expand(net._output_scale(t), x0)
        return F.mse_loss(net.forward_network(x_t, t, label)[0].float(), target)

    return make_row(recipe, model, fetch, loss_of, config, device)


def make_row(
    recipe: str,
    model: nn.Module,
    items: Items,
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    config: TrainConfig,
    device: torch.device,
) -> Row:
    """fit() beside the bare loop, both compiled if the configuration says so."""
    suffix = "".join(
        f" {word}" for word in (config.precision, "compiled") if word == "bf16" or (config.compile and word != "no")
    )
    return Row(
        f"{recipe}{suffix}",
        "bare loop",
        fit_steps(model, items, config, device),
        bare_steps(model, loss_of, items.size, config, device),
        config.batch_size,
        BARE_TARGET,
    )


# ---- diffusers ----

UNET = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
UNET_CONFIG = TrainConfig(batch_size=16, lr=1e-4, warmup=500, decay="cosine", ema=0.9999)


class Denoiser(nn.Module):
    """UNet2DModel trained to predict the noise of DDPM's 1000 levels, on our terms."""

    def __init__(self, unet: nn.Module, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("levels", alphas_cumprod, persistent=False)

    def loss(self, batch: ImageBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        x = to_float(batch.images)
        eps = context.normal("noise", x.shape[1:])
        t = (context.uniform("time") * 1000).long()
        level = expand(self.get_buffer("levels")[t], x)
        x_t = level.sqrt() * x + (1 - level).sqrt() * eps
        return F.mse_loss(self.unet(x_t, t).sample.float(), eps), {}

    def after_step(self, kept: Tensor) -> None:
        """Nothing to do between optimizer steps."""


def diffusers_row(device: torch.device, precision: str) -> Row:
    """One UNet2DModel, trained by fit() and by the library's own recipe."""
    from diffusers import DDPMScheduler, UNet2DModel

    unet = UNet2DModel(**UNET)  # pyright: ignore[reportArgumentType]
    images = images_like("cifar10").to(device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    fetch = Items(lambda items: ImageBatch(images[items.to(device)], labels[items.to(device)]), len(images))
    config = replace(UNET_CONFIG, precision=precision)
    model = Denoiser(unet, DDPMScheduler().alphas_cumprod)
    return Row(
        f"UNet2DModel{'' if precision == 'no' else ' bf16'}",
        "diffusers recipe",
        fit_steps(model, fetch, config, device),
        diffusers_steps(unet, images, config, device),
        config.batch_size,
        PEER_TARGET,
    )


def diffusers_steps(unet: nn.Module, images: Tensor, config: TrainConfig, device: torch.device) -> Steps:
    """The training example's loop on its own objects; the images are in memory as floats, which is in its favour."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    floats = to_float(images).cpu()

    def run(count: int) -> list[float]:
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(mixed_precision=config.precision, cpu=device.type == "cpu")
        net = copy.deepcopy(unet)
        ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        loader: Any = torch.utils.data.DataLoader(list(floats), batch_size=config.batch_size, shuffle=True)  # pyright: ignore
        scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10000)
        net, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, loader, scheduler)
        ema.to(accelerator.device)
        net.train()
        times, batches = [], iter(loader)
        for step in range(count + 2):
            clean = next(batches, None)
            if clean is None:
                batches = iter(loader)
                clean = next(batches)
            noise = torch.randn(clean.shape, device=clean.device)
            timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)  # pyright: ignore[reportArgumentType]
            with accelerator.accumulate(net):
                loss = F.mse_loss(net(noisy, timesteps).sample.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(net.parameters())
            said = {"loss": loss.detach().item(), "lr": scheduler.get_last_lr()[0], "step": step}
            assert said  # the example gives it to its progress bar
            times.append(time.perf_counter())
        return times[1:]

    return run


# ---- measuring ----


def rows_for(device: torch.device) -> list[Callable[[], Row]]:
    """All comparisons: float32 everywhere, and with a GPU bf16 and torch.compile too."""
    ways = [("no", False), ("bf16", False), ("bf16", True)] if device.type == "cuda" else [("no", False)]
    makers: list[Callable[[], Row]] = []
    for precision, compiled in ways:
        makers += [partial(tokenizer_row, name, device, precision, compiled) for name in TOKENIZERS]
        makers += [partial(latent_row, name, device, precision, compiled) for name in LATENT_MODELS]
        makers += [] if compiled else [partial(diffusers_row, device, precision)]
    return makers


def seconds_per_step(times: list[float], device: torch.device) -> float:
    """The lower quartile; on a GPU, where the host runs ahead and single steps mean nothing, the mean."""
    steps = [later - earlier for earlier, later in pairwise(times)]
    return statistics.mean(steps) if device.type == "cuda" else statistics.quantiles(steps, n=4)[0]


def measure(row: Row, rounds: int, seconds: float, device: torch.device) -> dict[str, Any]:
    """Both sides in turns; images per second of each, and the ratio of their times per step."""
    count = max(8, int(seconds / seconds_per_step(row.theirs(4), device)))
    pairs = []
    for i in range(rounds):  # who goes first alternates
        sides = [row.ours, row.theirs] if i % 2 == 0 else [row.theirs, row.ours]
        found = [seconds_per_step(side(count), device) for side in sides]
        pairs.append(tuple(found if i % 2 == 0 else reversed(found)))
    ours, theirs = (statistics.quantiles(side, n=4)[0] for side in zip(*pairs))
    ratio = theirs / ours
    return {
        "name": row.name,
        "peer": row.peer,
        "ours_images_per_second": round(row.batch / ours, 1),
        "peer_images_per_second": round(row.batch / theirs, 1),
        "ratio": round(ratio, 4),
        "ratios_of_rounds": [round(their / own, 4) for own, their in pairs],
        "steps_per_turn": count,
        "batch": row.batch,
        "target": row.target,
        "held": ratio >= row.target,
    }


def main() -> int:
    """Print the table, write the JSON; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    parser.add_argument("--seconds", type=float, default=TURN_SECONDS, help="about how long a turn is")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    results = []
    print(f"{'name':28s} {'ours':>10s} {'peer':>10s} {'ratio':>7s} {'target':>7s}  held   (images/s)")
    for make in rows_for(device):
        row = make()
        if arguments.only not in row.name:
            continue
        result = measure(row, arguments.rounds, arguments.seconds, device)
        results.append(result)
        print(
            f"{row.name:28s} {result['ours_images_per_second']:10.1f} {result['peer_images_per_second']:10.1f} "
            f"{result['ratio']:7.3f} {row.target:7.2f}  {'yes' if result['held'] else 'NO':5s}  beside the {row.peer}",
            flush=True,
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"device": device.type, "rounds": arguments.rounds, "environment": environment(), "rows": results}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {arguments.out}")
    return 0 if all(result["held"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
