"""The three numbers of an AMED step, r, c and a, as what is learned (Zhou et al. 2024, arXiv 2312.00094).

    r in (0, 1)                                   rho_m = rho_s^r rho_t^(1-r) is the inner node; sigmoid
    c in [1 - scale_dir, 1 + scale_dir]           scales the direction
    a in [1 - scale_time, 1 + scale_time]         scales rho where the inner node is evaluated

They come in two forms. `Constants`: one (r, c, a) per step, which makes the solver a plain table. `Predictor`: (r, c, a) per
sample from the features of the evaluation at t; about 9k parameters as in the paper, but the pooled features replace the
paper's 8x8 bottleneck, so any backbone serves, and the times enter as log rho.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GAIN = 10.0
"""Constants are stored divided by this: Adam moves every parameter by about the learning rate, and they have further to go
than the predictor's weights."""
MARGIN = 1e-3
"""r stays this far from 0 and 1, where an inner node meets the step's start or end and dpm2 and dpmpp divide by zero."""


@dataclass(frozen=True)
class AMEDConfig:
    """What may be learned, and how far from DPM-Solver-2 it may go."""

    scale_dir: float = 0.1
    """c in [1 - scale_dir, 1 + scale_dir]; 0 keeps c = 1."""
    scale_time: float = 0.1
    """a in [1 - scale_time, 1 + scale_time]; 0 keeps a = 1."""
    hidden: int = 128
    """Width of the predictor's feature layer."""

    def __post_init__(self) -> None:
        for name in ("scale_dir", "scale_time"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.hidden < 1:
            raise ValueError(f"hidden must be 1 or more, got {self.hidden}")


@dataclass(frozen=True)
class MeanDirection:
    """AMED's numbers for one step: inner position r in (0, 1), direction scale c, evaluation-time scale a."""

    r: float = 0.5
    c: float = 1.0
    a: float = 1.0


@dataclass(frozen=True)
class StepParameters:
    """r, c, a, each float64 (B,): `MeanDirection` per sample."""

    r: Tensor
    c: Tensor
    a: Tensor


def squash(raw: Tensor, config: AMEDConfig) -> StepParameters:
    """raw (B, 3) -> StepParameters within the config's ranges; raw = 0 is DPM-Solver-2 (r = 1/2, c = a = 1)."""
    unit = torch.sigmoid(raw.double())
    return StepParameters(
        r=unit[:, 0].clamp(MARGIN, 1 - MARGIN),
        c=1 + config.scale_dir * (2 * unit[:, 1] - 1),
        a=1 + config.scale_time * (2 * unit[:, 2] - 1),
    )


class Constants(nn.Module):
    """(r, c, a) of every step as free numbers, the same for all samples."""

    feature_dim = 0
    """Length of the features that it reads."""

    def __init__(self, steps: int, config: AMEDConfig) -> None:
        super().__init__()
        self.config = config
        self.raw = nn.Parameter(torch.zeros(steps, 3))

    def forward(self, features: Tensor, step: Tensor, log_rho: Tensor) -> StepParameters:
        """features (B, 0) and log_rho (B, 2), unused; step int64 (B,)."""
        return squash(GAIN * self.raw[step], self.config)

    def values(self) -> tuple[MeanDirection, ...]:
        """One `MeanDirection` per step."""
        d = squash(GAIN * self.raw.detach(), self.config)
        return tuple(MeanDirection(*v) for v in zip(d.r.tolist(), d.c.tolist(), d.a.tolist(), strict=True))


class Predictor(nn.Module):
    """(r, c, a) per sample from pooled features (B, F) and the step's two noise levels (paper, section 3.3).

    The output layer starts at zero beside the constants of each step, so learning starts at DPM-Solver-2 and finds the
    constants first.
    """

    def __init__(self, feature_dim: int, steps: int, config: AMEDConfig) -> None:
        super().__init__()
        self.config, self.feature_dim = config, feature_dim
        self.encode = nn.Sequential(nn.Linear(feature_dim, config.hidden), nn.SiLU(), nn.Linear(config.hidden, 4))
        self.times = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
        self.heads = nn.Linear(20, 3, bias=False)
        self.raw = nn.Parameter(torch.zeros(steps, 3))
        nn.init.zeros_(self.heads.weight)

    def forward(self, features: Tensor, step: Tensor, log_rho: Tensor) -> StepParameters:
        """features (B, F); step int64 (B,); log_rho float64 (B, 2) at t and s."""
        frequencies = 2.0 ** torch.arange(-2, 2, device=log_rho.device)
        angles = log_rho[:, :, None] * frequencies  # (B, 2, 4)
        times = self.times(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.raw)).flatten(1)
        sample = self.heads(torch.cat([self.encode(features.to(self.raw)), times], dim=1))
        return squash(GAIN * self.raw[step] + sample, self.config)


StepRule = Callable[[Tensor, Tensor, Tensor], StepParameters]
"""(features (B, F), step int64 (B,), log_rho float64 (B, 2)) -> StepParameters: a `Constants` or a `Predictor`."""
