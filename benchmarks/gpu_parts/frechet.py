"""The Fréchet distance by Newton-Schulz on the GPU, beside eigenvalues there and on the CPU, from the same statistics."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from common import Result
from gpu_parts.part import Maker, Setting, time_rows, turns, value_row
from torch import Tensor

from midway.gen.metrics.frechet import frechet_distance
from midway.gen.metrics.moments import FeatureStatistics

DIMENSIONS = (768, 2048)


def makers(setting: Setting) -> dict[str, Maker]:
    """Of CLIP's and Inception's numbers of features."""
    dimensions = DIMENSIONS if not setting.tiny else (24,)
    seconds = 0.3 * setting.seconds / len(dimensions)
    return {f"Fréchet distance, D = {dim}": partial(distance, setting, dim, seconds) for dim in dimensions}


def statistics(dim: int, seed: int, device: torch.device) -> FeatureStatistics:
    """Of 5 D vectors whose variances fall as 1 / k in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)).to(device)).Q
    scales = torch.arange(1, dim + 1, device=device) ** -0.5
    features: Tensor = (torch.randn(5 * dim, dim, generator=generator).to(device) + 0.05) * scales @ basis
    x = features.double()
    centred = x - x.mean(0)
    return FeatureStatistics(len(x), x.mean(0).cpu(), (centred.T @ centred).cpu())


def distance(setting: Setting, dim: int, seconds: float) -> Iterator[Result]:
    """All three, the transfer of the covariances included."""
    a, b = (statistics(dim, seed, setting.device) for seed in (1, 2))
    device = setting.device
    sides: dict[str, Callable[[], float]] = {
        "Newton-Schulz": lambda: frechet_distance(a, b, "newton-schulz", device),
        "eigenvalues, same device": lambda: frechet_distance(a, b, "eigen", device),
    }
    begun = time.perf_counter()
    exact = frechet_distance(a, b)
    name = f"Fréchet distance, D = {dim}"
    yield value_row(f"{name}, eigenvalues on the CPU", "s", time.perf_counter() - begun)
    errors = {side: abs(work() / exact - 1) for side, work in sides.items()}
    for side, error in errors.items():
        yield value_row(f"{name}, {side}, relative difference from the CPU's", "relative", error)
    yield from time_rows(name, turns(sides, setting, seconds, warm_up=1))
