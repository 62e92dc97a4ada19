"""Streaming first and second moments of features, in float64.

    mean = sum_i x_i / N,    scatter = sum_i (x_i - mean) (x_i - mean)^T,    covariance = scatter / (N - 1)

Of two sets with the difference of means d = mean' - mean (Chan, Golub & LeVeque 1979):

    mean + d N' / (N + N'),    scatter + scatter' + d d^T N N' / (N + N')

so the statistics of a whole are those of its parts, in any order and on any number of processes. Everything is about a mean:
however far the features lie from the origin, no digit of their spread is lost but those that float64 features lack themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Of N feature vectors of D numbers: `count` = N, `mean` float64 (D,), `scatter` float64 (D, D), on CPU; zeros of none."""

    count: int
    mean: Tensor
    scatter: Tensor

    def __post_init__(self) -> None:
        dim = self.mean.shape[-1] if self.mean.ndim == 1 else -1
        if self.mean.dtype != torch.float64 or self.scatter.dtype != torch.float64 or self.scatter.shape != (dim, dim):
            raise ValueError(
                f"statistics need float64 mean (D,) and scatter (D, D), not {self.mean.dtype} "
                f"{tuple(self.mean.shape)} and {self.scatter.dtype} {tuple(self.scatter.shape)}: "
                "build them with FeatureStatistics.of(features)"
            )
        if self.count < 0:
            raise ValueError(f"count is {self.count}: a number of feature vectors cannot be negative")

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Of `features` (N, D), any float dtype and device. ValueError if not (N, D >= 2) or not finite."""
        check_features(features)
        return cls.of_rows(features)

    @classmethod
    def of_rows(cls, rows: Tensor) -> "FeatureStatistics":
        """As `of`, without its checks: of any vectors (N, D >= 1)."""
        x = rows.detach().cpu().double()
        mean = x.mean(0) if len(x) else torch.zeros(x.shape[1], dtype=torch.float64)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """The statistics of both sets together. ValueError if their dimensions differ."""
        if self.dim != other.dim:
            raise ValueError(f"cannot merge features of {self.dim} and {other.dim} dimensions: use one feature network")
        count = self.count + other.count
        share = other.count / max(count, 1)
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.count * share)
        return FeatureStatistics(count, self.mean + apart * share, scatter)

    @property
    def dim(self) -> int:
        """D, the number of features of one image."""
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """float64 (D, D), symmetric, with the divisor N - 1. ValueError if N < 2."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, not {self.count}: use more images")
        return (self.scatter + self.scatter.T) / (2 * (self.count - 1))

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors for a safetensors file; `from_tensors` is the inverse."""
        return {"count": torch.tensor(self.count, dtype=torch.int64), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "FeatureStatistics":
        """The statistics behind `to_tensors`. ValueError if a tensor is missing or has the wrong shape or dtype."""
        missing = sorted({"count", "mean", "scatter"} - set(tensors))
        if missing:
            raise ValueError(f"feature statistics lack {', '.join(missing)}: measure the features again")
        return cls(int(tensors["count"]), tensors["mean"], tensors["scatter"])


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
