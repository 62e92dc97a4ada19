"""Streaming first and second moments of features, in float64.

    count = N,    total = sum_i x_i,    outer = sum_i x_i x_i^T
    mean = total / N,    covariance = (outer - N mean mean^T) / (N - 1)

Sums add, so the statistics of a whole are the sum of its parts', in any order and on any number of processes.
One-pass sums in float64 keep about 1e-12 even where the mean is 50 standard deviations away; float32 loses the answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Sums over N feature vectors of D numbers: `count` = N, `total` float64 (D,), `outer` float64 (D, D), on CPU."""

    count: int
    total: Tensor
    outer: Tensor

    def __post_init__(self) -> None:
        dim = self.total.shape[-1] if self.total.ndim == 1 else -1
        if self.total.dtype != torch.float64 or self.outer.dtype != torch.float64 or self.outer.shape != (dim, dim):
            raise ValueError(
                f"statistics need float64 total (D,) and outer (D, D), not {self.total.dtype} "
                f"{tuple(self.total.shape)} and {self.outer.dtype} {tuple(self.outer.shape)}: "
                "build them with FeatureStatistics.of(features)"
            )
        if self.count < 0:
            raise ValueError(f"count is {self.count}: a number of feature vectors cannot be negative")

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """The sums of `features` (N, D), any float dtype and device. ValueError if not (N, D >= 2) or not finite."""
        check_features(features)
        x = features.detach().cpu().double()
        return cls(len(x), x.sum(dim=0), x.T @ x)

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """The statistics of both sets together. ValueError if their dimensions differ."""
        if self.dim != other.dim:
            raise ValueError(f"cannot merge features of {self.dim} and {other.dim} dimensions: use one feature network")
        return FeatureStatistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def dim(self) -> int:
        """D, the number of features of one image."""
        return len(self.total)

    @property
    def mean(self) -> Tensor:
        """float64 (D,). ValueError without any feature vector."""
        if self.count < 1:
            raise ValueError("the mean of 0 feature vectors is undefined: add features first")
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """float64 (D, D), symmetric, with the divisor N - 1. ValueError if N < 2."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, not {self.count}: use more images")
        centred = self.outer - self.count * torch.outer(self.mean, self.mean)
        return (centred + centred.T) / (2 * (self.count - 1))

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors for a safetensors file; `from_tensors` is the inverse."""
        return {"count": torch.tensor(self.count, dtype=torch.int64), "total": self.total, "outer": self.outer}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "FeatureStatistics":
        """The statistics behind `to_tensors`. ValueError if a tensor is missing or has the wrong shape or dtype."""
        missing = sorted({"count", "total", "outer"} - set(tensors))
        if missing:
            raise ValueError(f"feature statistics lack {', '.join(missing)}: measure the features again")
        return cls(int(tensors["count"]), tensors["total"], tensors["outer"])


def comparable(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) and (M, D) in float64. ValueError unless `check_features` passes both, and N, M >= 2 and D agree."""
    check_features(x)
    check_features(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared: use one feature network"
        )
    if min(len(x), len(y)) < 2:
        raise ValueError(f"sets of {len(x)} and {len(y)} feature vectors: a spread needs at least 2, use more images")
    x = _float64(x)
    return x, _float64(y).to(x.device)


def _float64(features: Tensor) -> Tensor:
    """On its own device, or on the CPU if that has no float64."""
    features = features.detach()
    return (features.cpu() if features.device.type == "mps" else features).double()


def check_features(features: Tensor) -> None:
    """ValueError unless `features` is finite and (N, D) with D >= 2; flattened features give a meaningless distance."""
    if features.ndim != 2 or features.shape[1] < 2:
        raise ValueError(
            f"features have shape {tuple(features.shape)}: expected (N, D) with D >= 2, one row per image; "
            "a flattened batch would silently give a distance near 0"
        )
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(features)} feature vectors are not finite: "
            "look for NaN or infinite pixels in the images, or a diverged feature network"
        )
