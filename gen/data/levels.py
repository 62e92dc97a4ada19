"""Definition of the likelihood of images, with which the bits of all models can be compared.

Images are uint8; a data set has L levels, of which level k = 0 .. L - 1 is stored as round(k 255 / (L - 1)). All models give
nats per image of the integers k, or a lower bound, over the D = C H W values of an image:

    bits per dimension = -ln P(k) / (D ln 2)              no other constant anywhere: a uniform model has log2 L
    ln P(k) >= E_u ln p(x) - D ln L,   x = (k + u) / L in (0, 1)^D, u uniform  (Theis et al. 2016, arXiv 1511.01844, section 3.1)
    y = ln(q / (1 - q)), q = a + (1 - 2a) x,   ln|dy/dx| = sum ln(1 - 2a) - ln q - ln(1 - q)
                                                           (Dinh et al. 2017, arXiv 1605.08803, section 4.1, with both ends cut)

The second line is for densities, that is flows. Scaling x to another range inside a model belongs to that model's Jacobian.
"""

import functools
import math

import torch
from torch import Tensor

from midway.gen.data.pixels import Images, in_parts

CANDIDATES = (2, 4, 16, 17, 32, 64, 128, 256)
"""Numbers of levels that `levels_of` tries."""


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """-nats / (dims ln 2): bits per dimension of log-likelihoods in nats per image of `dims` values."""
    return -nats / (dims * math.log(2))


def dequantised_bound(log_density: Tensor, dims: int, levels: int) -> Tensor:
    """ln p(x) - D ln L: lower bound in nats of ln P(k), from the density p of x = (k + u) / L in (0, 1)^D."""
    return log_density - dims * math.log(levels)


# ---- levels ----


def to_levels(images: Tensor, levels: int) -> Tensor:
    """int64 level k of every value of uint8 images (any shape).

    ValueError for another dtype and for a value that is none of the `levels`. On a GPU the host waits for that check.
    """
    k = levels_unchecked(images, levels)
    if bool((k < 0).any()):
        odd = images[k < 0][0].item()
        raise ValueError(
            f"the images have the value {odd}, which is none of {levels} levels round(k 255 / {levels - 1}): "
            "use the levels that levels_of() finds in the training images, 256 for photographs"
        )
    return k


def levels_unchecked(images: Tensor, levels: int) -> Tensor:
    """`to_levels` without its check of values: -1 where a value is none of the levels."""
    if images.dtype != torch.uint8:
        raise ValueError(f"levels are of uint8 images, these are {images.dtype}: convert them with to_uint8 first")
    return _level_table(levels, images.device)[images.long()]


def from_levels(k: Tensor, levels: int) -> Tensor:
    """uint8 round(k 255 / (L - 1)) of integers k in 0 .. L - 1 (any shape). ValueError for an integer outside."""
    if k.numel() and not 0 <= int(k.min()) <= int(k.max()) < levels:
        raise ValueError(f"levels are 0 to {levels - 1}, these are {int(k.min())} to {int(k.max())}: clamp them first")
    return _stored(levels, k.device)[k.long()]


def levels_of(images: Tensor) -> int:
    """The smallest number of levels in `CANDIDATES` that holds all values of uint8 images: 17 for digits, 256 in general."""
    values = images.unique()
    return next(levels for levels in CANDIDATES if bool((levels_unchecked(values, levels) >= 0).all()))


def values_of(images: Images) -> Tensor:
    """uint8: the values that occur in images, in ascending order."""
    return torch.cat([part.unique() for part in in_parts(images)] or [images[:]]).unique()


@functools.cache
def _stored(levels: int, device: torch.device) -> Tensor:
    """uint8 (L,): how each level is stored."""
    if not 2 <= levels <= 256:
        raise ValueError(f"levels is {levels}; uint8 images have 2 to 256 levels")
    k = torch.arange(levels, dtype=torch.float64)
    return (k * 255 / (levels - 1)).round().to(device, torch.uint8)


@functools.cache
def _level_table(levels: int, device: torch.device) -> Tensor:
    """int64 (256,): the level of each stored value, -1 where there is none."""
    table = torch.full((256,), -1, dtype=torch.int64, device=device)
    table[_stored(levels, device).long()] = torch.arange(levels, device=device)
    return table


# ---- densities of integers ----


def uniform_dequantise(k: Tensor, u: Tensor, levels: int) -> Tensor:
    """x = (k + u) / L in (0, 1), in the dtype of u, for levels k and u on (0, 1) of one shape."""
    return (k + u) / levels


def logit_transform(x: Tensor, a: float = 0.05) -> tuple[Tensor, Tensor]:
    """y = logit(a + (1 - 2a) x) for x in [0, 1], (B, ...), and ln|dy/dx| summed over each sample, (B,).

    ValueError unless 0 <= a < 1/2; at a = 0 the ends of [0, 1] go to infinity.
    """
    _check_margin(a)
    q, rest = a + (1 - 2 * a) * x, a + (1 - 2 * a) * (1 - x)  # rest is 1 - q, without its cancellation
    log_q, log_rest = q.log(), rest.log()
    return log_q - log_rest, (math.log1p(-2 * a) - log_q - log_rest).flatten(1).sum(1)


def inverse_logit(y: Tensor, a: float = 0.05) -> Tensor:
    """x of y = `logit_transform(x, a)`; outside [0, 1] for |y| beyond logit(1 - a)."""
    _check_margin(a)
    return (y.sigmoid() - a) / (1 - 2 * a)


def _check_margin(a: float) -> None:
    if not 0 <= a < 0.5:
        raise ValueError(f"the logit margin is {a}; give a number in [0, 0.5), 0.05 by default")
