"""bfloat16 beside float32: seconds of a training step, and the quality of what was trained.

    python benchmarks/precision.py

Speed: both precisions take turns after every step, in one process with one thread, on the process's own time; the ratio is the
median over pairs of steps. `chosen` is what --precision auto chooses on this machine. Networks of different widths stand beside
the recipes, since width decides. Quality: recipes of tokenizers on digits, trained whole with the same seeds in both precisions;
PSNR of held-out images, whose difference is to be compared with the spread over seeds.
"""

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from midway.gen.core.config import to_dict
from midway.gen.core.environment import environment
from midway.gen.core.runs import Run
from midway.gen.data.images import load_images, to_float
from midway.gen.data.splits import load_splits
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.flags.tasks import TokenizerTask
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.recipes.recipes import TOKENIZER_RECIPES
from midway.gen.tokenizer.objective import TokenizerObjective, evaluate_tokenizer
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.gen.training.precision import resolve_precision
from midway.gen.trainings.running import image_parts
from midway.gen.trainings.train_tokenizer import make_tokenizer
from midway.tokenizers.tokenizer import ImageTokenizer

PRECISIONS = ("no", "bf16")
SEEDS = (0, 1, 2)
RESULT = Path(__file__).parent / "results" / "precision.json"
QUALITY: dict[str, tuple[str, dict[str, Any]]] = {
    "digits-fsq": ("digits-fsq", {}),
    "digits-vq": ("digits-vq", {}),
    "digits-vq, width 64": ("digits-vq", {"width": 64}),
    "digits-fsq, 2x down": ("digits-fsq", {"downsample": 2, "levels": (8, 8, 8)}),
}
"""Recipes of tokenizers, and what differs from them."""
WIDTHS = {"conv": (32, 48, 64, 96), "vit": (128, 192, 256)}
Network = Literal["conv", "transformer"]


def tokenizer_loss(tokenizer: nn.Module, images: Tensor) -> Tensor:
    """Squared error and the quantizer's losses."""
    out = tokenizer(images)
    return (out.reconstruction.float() - images).square().mean() + out.quantized.loss


def speed(
    name: str,
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    network: Network,
    width: int,
    turns: int,
) -> dict[str, Any]:
    """Median seconds of a step in float32 divided by those in bfloat16."""
    models = {precision: copy.deepcopy(model).train() for precision in PRECISIONS}
    optimizers = {p: torch.optim.AdamW(models[p].parameters(), 1e-3, fused=True) for p in PRECISIONS}
    seconds: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    for _ in range(turns + 2):
        for precision in PRECISIONS:
            begun = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                value = loss(models[precision])
            value.backward()
            optimizers[precision].step()
            optimizers[precision].zero_grad()
            seconds[precision].append(time.process_time() - begun)
    ratios = sorted(a / b for a, b in zip(seconds["no"][2:], seconds["bf16"][2:]))
    chosen, _ = resolve_precision(TrainConfig(precision="auto"), None, network, width)
    return {
        "name": name,
        "width": width,
        "float32_ms": round(1e3 * statistics.median(seconds["no"][2:]), 2),
        "bf16_ms": round(1e3 * statistics.median(seconds["bf16"][2:]), 2),
        "speedup": round(statistics.median(ratios), 3),
        "quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
        "chosen": chosen.precision,
    }


def tokenizers(turns: int) -> list[dict[str, Any]]:
    """Convolutional tokenizers by size of image, down-sampling and width, and transformers by width."""
    rows = []
    for side, downsample, (network, widths) in itertools.product((8, 16, 32), (4, 8), WIDTHS.items()):
        channels, batch = (1, 64) if side == 8 else (3, 1024 // side)
        images = 2 * torch.rand(batch, channels, side, side) - 1
        for width in widths if side > downsample else ():
            shape = {"in_channels": channels, "image_size": side, "downsample": downsample, "width": width}
            quantizer = {"type": "fsq", "levels": [8, 5, 5, 5]}
            made = ImageTokenizer(**shape, network=network, quantizer=quantizer)  # pyright: ignore[reportArgumentType]
            name = f"{network} tokenizer, {side} px, {downsample}x down, width {width}"
            kind: Network = "conv" if network == "conv" else "transformer"
            rows.append(speed(name, made, lambda m, x=images: tokenizer_loss(m, x), kind, width, turns))
            show(rows[-1])
    images = to_float(load_images("digits").images[:128])
    task = TOKENIZER_RECIPES["digits-vq"]()
    made = make_tokenizer(task, load_splits(task.data).train)
    made.start(images)
    rows.append(speed("digits-vq", made, lambda m: tokenizer_loss(m, images), "conv", task.model.width, turns))
    show(rows[-1])
    return rows


def latent_models(turns: int) -> list[dict[str, Any]]:
    """DiTs by tokens and width."""
    rows = []
    for (side, patch), width in itertools.product(((2, 1), (8, 2)), (96, 192, 256)):
        shape = (6, side, side)
        dit = DiTConfig(width=width, depth=4, heads=4, patch=patch)
        model = LatentModel(LatentModelConfig(schedule="cosine", target="v", dit=dit), shape, 10)
        x, t, labels = torch.randn(64, *shape), 0.05 + 0.9 * torch.rand(64), torch.randint(0, 10, (64,))

        def loss(m: nn.Module, x: Tensor = x, t: Tensor = t, labels: Tensor = labels) -> Tensor:
            return m.forward_network(x, t, labels)[0].float().square().mean()  # pyright: ignore

        rows.append(
            speed(f"DiT, {(side // patch) ** 2} tokens, width {width}", model, loss, "transformer", width, turns)
        )
        show(rows[-1])
    return rows


def quality(name: str, seeds: tuple[int, ...], steps: int | None) -> dict[str, Any]:
    """PSNR of held-out images after the recipe's training, by precision and seed."""
    recipe, differs = QUALITY[name]
    task = TOKENIZER_RECIPES[recipe]()
    task = replace(task, model=replace(task.model, **differs))
    config = replace(task.train, steps=steps or task.train.steps, save_seconds=0)
    found = {p: [trained_psnr(task, replace(config, seed=seed, precision=p)) for seed in seeds] for p in PRECISIONS}
    differences = [b - a for a, b in zip(found["no"], found["bf16"])]
    return {
        "name": name,
        "steps": config.steps,
        "psnr": {p: [round(psnr, 3) for psnr in found[p]] for p in PRECISIONS},
        "difference": round(statistics.mean(differences), 3),
        "error": round(statistics.stdev(differences) / len(differences) ** 0.5, 3),
        "spread_over_seeds": round(statistics.stdev(found["no"]), 3),
    }


def trained_psnr(task: TokenizerTask, config: TrainConfig) -> float:
    """Of fit(), with the averaged weights."""
    AcceleratorState._reset_state(True)
    accelerator = make_accelerator(config)
    splits = load_splits(task.data)
    torch.manual_seed(config.seed)
    objective = TokenizerObjective(make_tokenizer(task, splits.train))
    items = image_parts(objective, splits).items
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), "benchmark", {"train": to_dict(config)}, quiet=True)
        result = fit(objective, items, config, run, accelerator)
    assert result.ema is not None
    objective.load_state_dict(result.ema.shadow)
    return evaluate_tokenizer(objective.eval().tokenizer, splits.held_out.images)["psnr"]


def show(row: dict[str, Any]) -> None:
    """One line."""
    print(
        f"{row['name']:48s} {row['float32_ms']:8.1f} {row['bf16_ms']:8.1f} {row['speedup']:6.2f}  {row['chosen']}",
        flush=True,
    )


def main() -> None:
    """Print the rows, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument("--turns", type=int, default=12, help="pairs of steps of a row")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="trainings of each recipe and precision")
    parser.add_argument("--steps", type=int, help="steps of each training (default: the recipe's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'':48s} {'float32':>8s} {'bf16':>8s} {'ratio':>6s}  auto   (ms a step)")
    rows = tokenizers(arguments.turns) + latent_models(arguments.turns)
    found = []
    for name in QUALITY:
        found.append(quality(name, tuple(range(arguments.seeds)), arguments.steps))
        print(json.dumps(found[-1]), flush=True)
    report = {"environment": environment(), "speed": rows, "quality": found}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
