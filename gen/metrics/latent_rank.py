"""The shape of a cloud of latents: its ranks, nearest neighbours by angle, points on the arcs between them.

effective rank     exp(H(s / sum s)), s the singular values of centred vectors (Roy and Vetterli 2007)
stable rank        sum s^2 / max s^2
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from midway.gen.metrics.moments import FeatureStatistics

_ROWS = 1024  # of the search for neighbours


def moments(x: Tensor) -> FeatureStatistics:
    """Of the vectors of x (B, D, *S) over batch and positions."""
    return FeatureStatistics.of_rows(x.transpose(0, 1).flatten(1).T)


def ranks(statistics: FeatureStatistics) -> tuple[float, float]:
    """Effective and stable rank, in [1, D], of centred vectors; 0 if they are all the same."""
    eigenvalues = torch.linalg.eigvalsh(statistics.covariance).clamp(min=0)
    scale = statistics.mean.square().sum() + eigenvalues.sum()  # mean squared length
    if not eigenvalues[-1] > 1e-14 * scale:  # what is left of equal vectors by rounding
        return 0.0, 0.0
    share = eigenvalues.sqrt() / eigenvalues.sqrt().sum()
    return torch.special.entr(share).sum().exp().item(), (eigenvalues.sum() / eigenvalues[-1]).item()


def nearest(vectors: Tensor) -> Tensor:
    """int64 (N,): for each of float (N, M), N >= 2, the other one of least angle; of equal ones the first."""
    directions = F.normalize(vectors, dim=1)
    found = []
    for start in range(0, len(vectors), _ROWS):
        cosines = directions[start : start + _ROWS] @ directions.T
        cosines.diagonal(start).fill_(-math.inf)
        found.append(cosines.argmax(1))
    return torch.cat(found)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """From a (weight 0) to b (weight 1) along the great circle, lengths with it (Shoemake 1985); both (N, M)."""
    cosine = (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    straight = angle.sin() < 1e-6  # there the line is the arc, or there is no arc
    sine = torch.where(straight, 1.0, angle.sin())
    of_a = torch.where(straight, 1 - weight, ((1 - weight) * angle).sin() / sine)
    return of_a * a + torch.where(straight, weight, (weight * angle).sin() / sine) * b


def interpolated(latents: Tensor, weight: float = 0.5) -> Tensor:
    """Raw latents float32 (N, D, *S), each moved towards its nearest neighbour by `weight` of the angle between them.

    Angle and arc are those of latents standardised per channel, as latent models see them.
    """
    mean, std = channel_moments(latents)
    shape = (1, -1, *[1] * (latents.ndim - 2))
    mean, scale = mean.view(shape), torch.where(std > 0, std, 1.0).view(shape)
    standard = ((latents.double() - mean) / scale).flatten(1)
    moved = slerp(standard, standard[nearest(standard.float())], weight)
    return (moved.view(latents.shape) * scale + mean).float()


def channel_moments(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of (N, D, *S), float64 (D,)."""
    channels = latents.double().transpose(0, 1).flatten(1)
    return channels.mean(1), channels.std(1)
