"""Runs of priors as a training leaves them, of random weights: nothing here depends on what they have learned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pipelines import TINY
from safetensors.torch import save_file

from midway.gen.core import checkpoints
from midway.gen.core.config import to_dict
from midway.gen.core.runs import Run
from midway.gen.data.images import to_float
from midway.gen.data.splits import load_splits
from midway.gen.diffusion.load import load_tokenizer
from midway.gen.priors.config import PriorConfig
from midway.gen.priors.load import KIND, TrainedPrior, load_prior, write_prior
from midway.gen.priors.registry import layout_for, make_prior

TINY_PRIOR: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2}


def prior_run(path: Path, tokenizer: Path, classes: int = 10, seed: int = 0, **config: Any) -> Path:
    """A run on a tokenizer's run: weights 10 times those of a new prior, so that its laws are far from uniform."""
    trained, data = load_tokenizer(tokenizer)
    settings = PriorConfig(**{**TINY_PRIOR, **config})
    torch.manual_seed(seed)
    if settings.kind == "continuous":
        raw = trained.raw_latents(to_float(load_splits(data).train.images[:64]))
        trained.set_latent_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
    prior = make_prior(settings, layout_for(settings, trained), classes)
    with torch.no_grad():
        for name, weight in prior.named_parameters():
            if settings.kind == "continuous" and name.startswith("head."):
                weight.add_(0.1 * torch.randn_like(weight))  # some begin at 0
            elif weight.dim() > 1:
                weight.mul_(10)
    train = replace(TINY, steps=5, ema=0.0)
    parts = {"data": to_dict(data), "model": to_dict(settings), "train": to_dict(train), "tokenizer": str(tokenizer)}
    run = Run.create(path, KIND, parts)

    def write(folder: Path) -> None:
        save_file(prior.state_dict(), folder / "model.safetensors")
        write_prior(folder, prior, trained)

    checkpoints.save(run.checkpoints, 5, write)
    return path


def open_prior(path: Path) -> TrainedPrior:
    """On the CPU."""
    return load_prior(path)
