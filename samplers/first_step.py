"""The exact first step of a flow: at pure noise the best clean estimate is the mean of the data, which needs no network.

Where alpha = 0 (t = 1 on `Linear`) the state says nothing about x0, so

    D(x, 1) = E[x0 | c] = mu,    v(x, 1) = x - mu        on `Linear`

In the variables x' = x - alpha(t) mu the data are centred, D' = D - mu, eps' = eps, and the same ODE holds. There the analytic
first row of every table, eps = x' / sqrt(alpha^2 + sigma^2), is this step: exact at alpha = 0 and, at any t, for data that are
Gaussian with unit variance about mu. It costs no evaluation.

    x' = remove_mean(x, schedule, grid[0], mu)
    x' = sample(centered(field, schedule, mu), build(schedule, grid, analytic_first=True), x')
    x  = restore_mean(x', schedule, grid[-1], mu)

mu is (B, *), the mean of each sample's class. Under classifier-free guidance with scale w it is mu_all + w (mu_class - mu_all).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from midway.samplers.guidance import at_time
from midway.samplers.prediction import Field, Prediction, expand
from midway.samplers.schedule import Schedule

CHUNK = 4096
"""Latents turned to float64 at a time."""


def class_means(latents: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean of each class, (classes, *), of latents (N, *) with labels int64 (N,); summed in float64, in the latents' dtype.

    ValueError for a class without latents.
    """
    counts = torch.bincount(labels, minlength=classes)
    if len(counts) > classes or (counts == 0).any():
        raise ValueError(
            f"means of {classes} classes need latents of each and of no other, but their counts are {counts.tolist()}"
        )
    sums = torch.zeros(classes, latents[0].numel(), dtype=torch.float64, device=latents.device)
    for part, their_labels in zip(latents.split(CHUNK), labels.split(CHUNK), strict=True):
        sums += one_hot(their_labels, classes).double().T @ part.flatten(1).double()
    return (sums / counts[:, None]).view(classes, *latents.shape[1:]).to(latents.dtype)


def remove_mean(x: Tensor, schedule: Schedule, time: float, mean: Tensor) -> Tensor:
    """x' = x - alpha mean, for x (B, *) at `time` and mean (B, *) or (*)."""
    return torch.sub(x, mean, alpha=_alpha(schedule, time))


def restore_mean(x: Tensor, schedule: Schedule, time: float, mean: Tensor) -> Tensor:
    """x = x' + alpha mean, the inverse of `remove_mean`."""
    return torch.add(x, mean, alpha=_alpha(schedule, time))


def centered(field: Field, schedule: Schedule, mean: Tensor) -> Field:
    """The field in the variables x' = x - alpha(t) mean, D' = D - mean: (x' (B, *), t (B,)) -> Prediction of the centred data.

    mean: (B, *) or (*). Features are the field's, and so is `at`.
    """
    return _Centered(field, schedule, mean)


@dataclass(frozen=True, eq=False)
class _Centered:
    field: Field
    schedule: Schedule
    mean: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Centered) and self.field == other.field and self.mean is other.mean

    def __hash__(self) -> int:
        return hash((self.field, id(self.mean)))

    def at(self, time: float) -> Field:
        return replace(self, field=at_time(self.field, time))

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        said = self.field(x + expand(self.schedule.alpha(t), x) * self.mean, t)
        return Prediction(said.x0 - self.mean, said.eps, said.features)


def _alpha(schedule: Schedule, time: float) -> float:
    return schedule.alpha(torch.tensor(time, dtype=torch.float64)).item()
