"""A tiny latent model to learn solvers of, and a few steps of their training."""

from collections.abc import Callable
from typing import Any

import torch
from tensors import normal
from torch import Tensor

from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.training.batches import Context


def tiny_model(std: float = 0.0) -> LatentModel:
    """On the linear schedule, 4 classes, latents (2, 2, 2), not trainable; `std` of noise on its weights, or its output is 0."""
    torch.manual_seed(0)
    model = LatentModel(LatentModelConfig(dit=DiTConfig(width=16, depth=1, heads=2)), (2, 2, 2), 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * normal(*parameter.shape, seed=1))
    return model.eval().requires_grad_(False)


def train_steps(
    objective: Any, batch_of: Callable[[Tensor], Any], optimizer: torch.optim.Optimizer, first: int, last: int
) -> None:
    """Steps first .. last - 1 on 3 of 6 items each, of which number 1 is skipped as fit() would skip it."""
    for step in range(first, last):
        items = torch.arange(step, step + 3) % 6
        loss, _ = objective.loss(batch_of(items), Context(0, step, items))
        optimizer.zero_grad()
        loss.backward()
        if step != 1:
            optimizer.step()
        objective.after_step(torch.tensor(step != 1, device="meta"))  # a value that cannot be waited for
