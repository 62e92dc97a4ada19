"""Principal axes of features, on which few images can be compared.

    u = B^T (x - m),    B (D, k) the eigenvectors of the covariance of a reference with the k largest eigenvalues, m its mean

The Fréchet distance of n images has a bias of about D^2 / 4n in D features of unit variance: with fewer than about five images
per feature it is mostly bias, and hardly changes when whole classes are missing. On k << D fixed axes it is mostly signal.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from midway.gen.metrics.moments import FeatureStatistics

_ROWS = 256
"""Rows of one product, always as many, so that coordinates do not depend on the number of images in the last bits."""


@dataclass(frozen=True, eq=False)
class PrincipalAxes:
    """`mean` float64 (D,), and `basis` float64 (D, k): orthonormal columns by falling variance of the reference; on the CPU."""

    mean: Tensor
    basis: Tensor

    @property
    def count(self) -> int:
        """k, the number of axes."""
        return self.basis.shape[1]

    def project(self, features: Tensor) -> Tensor:
        """Coordinates float32 (N, k), on the CPU, of features (N, D); the same bits for any N. ValueError for another D."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features {tuple(features.shape)} on axes of {len(self.mean)}: use one feature network")
        found = [torch.empty(0, self.count)]
        for part in features.detach().cpu().split(_ROWS):
            centred = F.pad(part.double() - self.mean, (0, 0, 0, _ROWS - len(part)))
            found.append((centred @ self.basis)[: len(part)].float())
        return torch.cat(found)

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors for a safetensors file; `from_tensors` is the inverse."""
        return {"axes.mean": self.mean, "axes.basis": self.basis}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "PrincipalAxes":
        """The axes behind `to_tensors`."""
        return cls(tensors["axes.mean"], tensors["axes.basis"])


def axes_of(statistics: FeatureStatistics, count: int) -> PrincipalAxes:
    """The first `count` axes of features with these statistics. ValueError unless 1 <= count <= min(N - 1, D).

    Signs are fixed: the largest coefficient of every axis is positive.
    """
    from scipy.linalg import eigh

    n, dim = statistics.count, statistics.dim
    if not 1 <= count <= min(n - 1, dim):
        raise ValueError(f"{count} principal axes of {n} images and {dim} features: there are {min(n - 1, dim)}")
    _, vectors = eigh(statistics.covariance.numpy(), subset_by_index=(dim - count, dim - 1))
    basis = torch.from_numpy(vectors.copy()).flip(1)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return PrincipalAxes(statistics.mean, (basis * largest.sign()).contiguous())
