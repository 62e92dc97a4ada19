"""Images per second of fit() beside a bare PyTorch loop and beside diffusers' unconditional-training recipe.

Both sides of a row train the same network on the same data at the same batch and precision in one process, taking turns after
every optimizer step (on a GPU, after 50, and the device is waited for), so that whatever else the machine does touches both.
The ratio is the median over the pairs of neighbouring turns; its error is the standard error of that median (by resampling the
pairs). fit() is timed with everything it does for a step: data order, noise by sample, finite check, average, sums for the log.

bare loop    the fewest lines that train the same thing: torch.randn, torch.randperm, fused AdamW, gradient clipping, a weight
             average by torch._foreach_lerp_, the loss read every 50 steps
diffusers    the objects of its training example, as the example uses them: DDPMScheduler, EMAModel, get_scheduler, a shuffled
             DataLoader, all prepared by Accelerate; the loss read every step

    python benchmarks/training.py --out benchmarks/results/training.json
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.core.config import to_dict
from midway.gen.core.environment import environment
from midway.gen.core.runs import Run
from midway.gen.data.images import load_images, to_float
from midway.gen.diffusion.model import LatentModel
from midway.gen.training.batches import Context, ImageBatch, LatentBatch
from midway.gen.training.config import TrainConfig, learning_rate
from midway.gen.training.fit import fit
from midway.gen.training.interface import Items
from midway.gen.training.optim import compile_networks
from midway.gen.training.starting import START_SAMPLES
from midway.samplers.prediction import expand, target_value

Peer = Callable[[], Iterator[None]]
"""A fresh training that has done one more optimizer step after each next()."""
TOKENIZERS = ("digits-fsq", "digits-vq", "cifar10-fsq")
LATENT_MODELS = ("digits-dit", "cifar10-dit")
BARE_TARGET, PEER_TARGET = 0.97, 1.0
UNTIMED_TURNS = 3


@dataclass(frozen=True)
class Row:
    """A comparison: what fit() trains, the peer, and the least ratio of our speed to the peer's."""

    name: str
    peer_name: str
    model: nn.Module
    items: Items
    config: TrainConfig
    peer: Peer
    target: float


# ---- taking turns ----


class TakingTurns(nn.Module):
    """A model whose training, after every `turn` optimizer steps, has the peer do as many, and notes how long both took."""

    def __init__(self, model: nn.Module, peer: Iterator[None], turn: int, device: torch.device) -> None:
        super().__init__()
        self.inner, self.peer, self.turn, self.device = model, peer, turn, device
        self.steps, self.since = 0, 0.0
        self.pairs: list[tuple[float, float]] = []  # seconds per step of fit() and of the peer

    def loss(self, batch: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner.loss(batch, context)  # pyright: ignore[reportCallIssue]

    def after_step(self, step_ok: Tensor) -> None:
        self.inner.after_step(step_ok)  # pyright: ignore[reportCallIssue]
        self.steps += 1
        if self.steps % self.turn:
            return
        ours = self._now() - self.since
        begun = self._now()
        for _ in range(self.turn):
            next(self.peer)
        self.since = self._now()
        self.pairs.append((ours / self.turn, (self.since - begun) / self.turn))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def turn_of(device: torch.device) -> int:
    """Optimizer steps of a turn: where the device is waited for between them, many."""
    return 50 if device.type == "cuda" else 1


def take_turns(row: Row, turns: int, device: torch.device, turn: int | None = None) -> list[tuple[float, float]]:
    """Seconds per step of fit() and of the peer, for each of `turns` turns of `turn` steps; the first few are not counted."""
    turn = turn or turn_of(device)
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision=row.config.precision, cpu=device.type == "cpu")
    model = TakingTurns(copy.deepcopy(row.model), row.peer(), turn, device)
    config = replace(row.config, steps=(turns + UNTIMED_TURNS) * turn, save_seconds=0)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), "benchmark", {"train": to_dict(config)}, quiet=True)
        fit(model, row.items, config, run, accelerator)
    return model.pairs[UNTIMED_TURNS:]


# ---- the bare loop ----


def bare_loop(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    size: int,
    config: TrainConfig,
    device: torch.device,
) -> Iterator[None]:
    """The loop one writes by hand; `loss_of(model, item indices)` is the loss of a batch."""
    net = copy.deepcopy(model).to(device).train()
    if config.compile:
        compile_networks(net)
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    averaged = [p.detach().clone() for p in parameters]
    batches = shuffled(size, config.batch_size)
    for step in itertools.count():
        optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = loss_of(net, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - min(config.ema, (1 + step) / (10 + step)))
        if step % 50 == 49:
            loss.item()
        yield


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
        return load_images("digits").images[:]
    return torch.randint(0, 256, (2048, 3, 32, 32), dtype=torch.uint8)


def tokenizer_row(recipe: str, device: torch.device, precision: str, compiled: bool) -> Row:
    """A tokenizer recipe: fit() and the bare loop."""
    from midway.gen.recipes.recipes import TOKENIZER_RECIPES
    from midway.gen.tokenizer.objective import TokenizerObjective  # these need diffusers and tyro, other rows do not
    from midway.tokenizers.tokenizer import ImageTokenizer

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
    with torch.no_grad():
        nn.Module.to(tokenizer, device)  # diffusers hides the signature of its own `to`
        tokenizer.start(to_float(images[:START_SAMPLES]))
    model = TokenizerObjective(tokenizer)
    config = replace(task.train, precision=precision, compile=compiled)
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    fetch = Items(lambda items: ImageBatch(images[items.to(device)], labels[items.to(device)]), len(images))

    def loss_of(net: nn.Module, items: Tensor) -> Tensor:
        x = to_float(images[items.to(device)])
        out = net.tokenizer(x)  # pyright: ignore[reportCallIssue]
        net.tokenizer.observe(out.quantized)  # pyright: ignore
        net.tokenizer.update()  # pyright: ignore
        return (out.reconstruction - x).square().mean() + out.quantized.loss

    return make_row(recipe, model, fetch, loss_of, config, device)


def latent_row(recipe: str, device: torch.device, precision: str, compiled: bool) -> Row:
    """A latent-model recipe on standard normal latents of its tokenizer's shape: fit() and the bare loop."""
    from midway.gen.recipes.recipes import LATENT_RECIPES

    task = LATENT_RECIPES[recipe]()
    digits = recipe.startswith("digits")
    shape, size = ((6, 2, 2), 1438) if digits else ((6, 8, 8), 2048)
    model = LatentModel(task.model, shape, 10)
    return latent_model_row(recipe, model, size, replace(task.train, precision=precision, compile=compiled), device)


def latent_model_row(name: str, model: LatentModel, size: int, config: TrainConfig, device: torch.device) -> Row:
    """A latent model on `size` standard normal latents: fit() and the bare loop."""
    latents = torch.randn(size, *model.latent_shape).to(device)
    labels = torch.randint(0, model.classes, (size,)).to(device)
    fetch = Items(lambda items: LatentBatch(latents[items.to(device)], labels[items.to(device)]), size)
    mean, std, dropped = model.config.time_mean, model.config.time_std, model.config.label_dropout

    def loss_of(net: nn.Module, items: Tensor) -> Tensor:
        assert isinstance(net, LatentModel)
        items = items.to(device)
        x0 = latents[items]
        eps, schedule = torch.randn_like(x0), net.schedule
        t = schedule.time_of_rho((mean + std * torch.randn(len(x0), device=device)).exp().clamp(0.002, 80))
        label = torch.where(torch.rand(len(x0), device=device) < dropped, net.classes, labels[items])
        x_t = expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps
        target = target_value(net.config.target, x0, eps, t, schedule) / expand(net.output_scale(t), x0)
        return F.mse_loss(net.forward_network(x_t, t, label)[0].float(), target)

    return make_row(name, model, fetch, loss_of, config, device)


def make_row(
    recipe: str,
    model: nn.Module,
    items: Items,
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    config: TrainConfig,
    device: torch.device,
) -> Row:
    """fit() beside the bare loop, both compiled if the configuration compiles."""
    suffix = "".join(
        f" {word}" for word in (config.precision, "compiled") if word == "bf16" or (config.compile and word != "no")
    )
    peer = partial(bare_loop, model, loss_of, items.size, config, device)
    return Row(f"{recipe}{suffix}", "bare loop", model, items, config, peer, BARE_TARGET)


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

    def after_step(self, step_ok: Tensor) -> None:
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
    name = f"UNet2DModel{'' if precision == 'no' else ' bf16'}"
    peer = partial(diffusers_recipe, unet, images, config, device)
    return Row(name, "diffusers recipe", model, fetch, config, peer, PEER_TARGET)


def diffusers_recipe(unet: nn.Module, images: Tensor, config: TrainConfig, device: torch.device) -> Iterator[None]:
    """The training example's loop on its own objects; the images are in memory as floats, which is in its favour."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    floats = to_float(images).cpu()
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
    batches = iter(loader)
    for step in itertools.count():
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
        logged = {"loss": loss.detach().item(), "lr": scheduler.get_last_lr()[0], "step": step}
        assert logged  # the example gives it to its progress bar
        yield


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


def measure(row: Row, seconds: float, device: torch.device, turn: int | None = None, least: int = 20) -> dict[str, Any]:
    """Images per second of both sides, and the ratio of their times per step with its standard error; `least` turns or more."""
    turn = turn or turn_of(device)
    pair_seconds = sum(statistics.median(side) for side in zip(*take_turns(row, 4, device, turn)))
    ratios_of = take_turns(row, max(least, int(seconds / pair_seconds / turn)), device, turn)
    ours, theirs = (statistics.median(side) for side in zip(*ratios_of))
    ratios = torch.tensor([their / own for own, their in ratios_of])
    resampled = ratios[torch.randint(len(ratios), (200, len(ratios)))].median(dim=1).values
    return {
        "name": row.name,
        "peer": row.peer_name,
        "ours_images_per_second": round(row.config.batch_size / ours, 1),
        "peer_images_per_second": round(row.config.batch_size / theirs, 1),
        "ratio": round(ratios.median().item(), 4),
        "error": round(resampled.std().item(), 4),
        "turns": len(ratios),
        "batch": row.config.batch_size,
        "target": row.target,
        "held": ratios.median().item() >= row.target,
    }


def main() -> int:
    """Print the table, write the JSON; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: results/training.json, with --only nothing is written")
    parser.add_argument("--seconds", type=float, default=45.0, help="about how long a row takes")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    results = []
    print(f"{'name':28s} {'ours':>10s} {'peer':>10s} {'ratio':>7s} {'error':>7s} {'target':>7s}  held   (images/s)")
    for make in rows_for(device):
        row = make()
        if arguments.only not in row.name:
            continue
        result = measure(row, arguments.seconds, device)
        results.append(result)
        speeds = f"{result['ours_images_per_second']:10.1f} {result['peer_images_per_second']:10.1f}"
        ratio = f"{result['ratio']:7.3f} {result['error']:7.3f} {row.target:7.2f}"
        held = "yes" if result["held"] else "NO"
        print(f"{row.name:28s} {speeds} {ratio}  {held:5s}  beside the {row.peer_name}", flush=True)
    if not results:
        parser.error(f"no row's name contains '{arguments.only}'")
    out = arguments.out or (None if arguments.only else Path(__file__).parent / "results" / "training.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        report = {"device": device.type, "environment": environment(), "rows": results}
        out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {out}")
    return 0 if all(result["held"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
