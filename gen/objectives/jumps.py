"""Objectives of average velocities u(z_t, t, r) (samplers/jumps.py): what each is trained towards, for r <= t.

On z_t = alpha x0 + sigma eps with the sample's velocity v = alpha' x0 + sigma' eps (or that of a teacher), sg = no gradient:

    shortcut    (u(z_t, t, m) + u(z_m, m, r)) / 2,   z_m = z_t - (t - m) u(z_t, t, m),   m = (t + r) / 2
                Frans et al. 2024, arXiv 2410.12557, eq. 4; t - r are dyadic shares of the way, the shortest halves have length 0
    alphaflow   alpha v + (1 - alpha) u(z_s, s, r),   z_s = z_t - (t - s) v,   s = t - alpha (t - r)
                Zhang et al. 2025, arXiv 2510.20771; alpha = 1 is flow matching along the trajectory, alpha -> 0 is meanflow
    meanflow    v - (t - r) du/dt,   du/dt = (d_z u) v + d_t u
                Geng et al. 2025, arXiv 2505.13447, eq. 10
    imf         the same, du/dt along the network's own velocity u(z_t, t, t): a function of z_t alone
                Geng et al. 2025, arXiv 2512.02012, eq. 12: u + (t - r) sg(du/dt) is regressed on v, with equal gradients

Every one is a regression of u on sg(target), and a share of the batch has r = t, where the target is v. The error of alphaflow
is of the size of alpha, so the difference is divided by it, sg(u - (u - target) / alpha): gradients and adaptive weights then
have one size for every alpha, and go over into meanflow's.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from midway.samplers.prediction import expand

warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.*")  # which torch.func.jvp calls, the first time
Average = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z_t (B, *), t (B,), r (B,)) -> u (B, *)."""
PERIOD = 64
STEEPNESS = 25.0
"""Of alpha's fall."""


def is_half(x: Tensor) -> bool:
    """Whether networks compute in half precision on the device of x: under autocast, which tensors without numbers have not."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Within the block the device of x computes in the dtypes that there are."""
    return torch.autocast(x.device.type, enabled=False) if is_half(x) else nullcontext()


def shortcut_target(average: Average, z: Tensor, t: Tensor, r: Tensor, shortest: float) -> Tensor:
    """Two half jumps of the network itself; where they would be at most `shortest`, two steps along its velocity."""
    middle = (t + r) / 2
    fine = (t - r) / 2 <= 1.5 * shortest  # t and r are float32; the next halves have twice the length
    first = average(z, t, torch.where(fine, t, middle))
    second = average(z - expand(t - middle, z) * first, middle, torch.where(fine, middle, r))
    return (first + second) / 2


def alphaflow_target(average: Average, z: Tensor, t: Tensor, r: Tensor, v: Tensor, alpha: float) -> Tensor:
    """A step along v for the share `alpha` of the jump, and the network's jump for the rest."""
    s = t - alpha * (t - r)
    rest = average(z - expand(t - s, z) * v, s, r)
    return alpha * v + (1 - alpha) * rest


def enlarged(u: Tensor, target: Tensor, alpha: float) -> Tensor:
    """The target at 1 / alpha times the difference from u."""
    return u - (u - target) / alpha


def time_derivative(average: Average, z: Tensor, t: Tensor, r: Tensor, tangent: Tensor) -> Tensor:
    """du/dt (B, *) along dz/dt = tangent (B, *), r fixed: one Jacobian-vector product, in the dtype of z without autocast.

    Attention must be the plain products: the fused kernels of scaled_dot_product_attention have no forward derivative.
    """
    if z.is_meta:  # without numbers there is no derivative either, whose cost is about that of two passes
        average(z, t, r)
        return average(z, t, r)
    with sdpa_kernel(SDPBackend.MATH), without_autocast(z):
        ones = torch.ones_like(t)
        return torch.func.jvp(lambda z, t: average(z, t, r), (z, t), (tangent, ones))[1]


def meanflow_target(
    average: Average, z: Tensor, t: Tensor, r: Tensor, v: Tensor, tangent: Tensor | None = None
) -> Tensor:
    """The identity of average velocities with v in place of the trajectory's; du/dt along `tangent`, or v."""
    derivative = time_derivative(average, z, t, r, v if tangent is None else tangent)
    return v - expand(t - r, z) * derivative


def guided(v: Tensor, labelled: Tensor, unlabelled: Tensor, scale: Tensor) -> Tensor:
    """v of guidance at scale (B,) in training: v + (1 - 1 / scale) (labelled - unlabelled), velocities of the network at r = t.

    arXiv 2512.02012, eq. 15. `labelled` is guided itself: the fixed point is unlabelled + scale (v - unlabelled).
    """
    return v + expand(1 - 1 / scale, v) * (labelled - unlabelled)


def alpha_at(progress: float, least: float) -> float:
    """alpha after this share of the training: 1 - sigmoid(25 (progress - 1/2)), not below `least`."""
    return max(1 / (1 + math.exp(STEEPNESS * (min(progress, 2) - 0.5))), least)


def adaptive_weight(error: Tensor, power: float, offset: float) -> Tensor:
    """(L + offset)^-power (B,) of the errors L (B,), without a gradient (arXiv 2505.13447, section 4.3)."""
    return (error.detach() + offset).pow(-power)


# ---- times ----


def is_flow(sample_ids: Tensor, share: float) -> Tensor:
    """bool (B,): which samples are trained at r = t. Of any 64 in a row the same number, spread evenly (bits reversed)."""
    ids, place = sample_ids % PERIOD, torch.zeros_like(sample_ids)
    for bit in range(6):
        place = place * 2 + (ids >> bit) % 2
    return place < round(PERIOD * share)


def dyadic_times(level: Tensor, place: Tensor, finest: int, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(t, r) (B,) of shortcut jumps in [low, high], for level and place (B,) uniform on (0, 1).

    t - r is 2^-k of the range, k = 0 .. finest - 1 alike, and t one of its 2^k multiples.
    """
    parts = 2.0 ** (level * finest).floor().clamp(max=finest - 1)
    index = (place * parts).floor().clamp(max=parts - 1)
    return low + (high - low) * (index + 1) / parts, low + (high - low) * index / parts


def sorted_times(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(t, r) with r <= t."""
    return torch.maximum(a, b), torch.minimum(a, b)
