"""The start of a linear encoder and decoder from training images: principal components of patches, and the way back.

    patches x (N, P) of mean m and covariance V diag(v) V^T, v_1 >= v_2 >= ...
    z_i = s_i V_i^T (x - m) / sqrt(v_i)                   uncorrelated, with standard deviations s_i; s_i = 1: whitened
    x'  = B c + b,   B, b = argmin sum |x - B c - b|^2    over the codes c of these z

With c = z this is x' = m + sum_i V_i V_i^T (x - m), the best that a linear autoencoder reaches (Baldi and Hornik 1989, Neural
Networks 2(1)); of rounded or bounded codes it is the best linear decoder. A patch is what one position of the latents covers:
f x f pixels of all channels. A quantizer states what its channels start as (`Channel`).

A direction that varies less than rounding to 8 bits does counts as noise. Channels beyond the others, on patches of fewer pixels
or on flat images, start as further directions of the whitened components, those of the map's own rows; as constants where
distances count.

Sums are float64 on the CPU, so that the start is the same on every kind of device; rank 0's counts.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from midway.tokenizers.base import Channel, Quantizer, distributed, float32_island

NOISE = (2 / 255) ** 2 / 12
"""Variance of the error of rounding to 8 bits, of pixels in [-1, 1]."""
_CHUNK = 64  # images
_SAME = 1e-6  # of the largest variance of codes: directions below it differ by rounding only


@torch.no_grad()
def start(encoder: nn.Conv2d, decoder: nn.Conv2d, quantizer: Quantizer, images: Tensor, factor: int) -> None:
    """Set both maps, 1x1 convolutions from and to patches of `factor` pixels a side, and start the quantizer between them.

    images: (B, C, H, W) in [-1, 1], sides multiples of `factor`. Every process must call it, with the same images.
    """
    with float32_island(images):
        patches = F.pixel_unshuffle(images.float(), factor)
        own = whole(encoder.weight).flatten(1)
        moments = mean_and_covariance(rows(patches))
        weight, bias = shared(*principal_map(*moments, quantizer.start_channels(), own), to=images)
        put(encoder, weight, bias)
        z = F.conv2d(patches, weight[..., None, None], bias)
        quantizer.cover(z)
        quantizer.start(z)
        codes, _ = quantizer.encode(z)
        own = whole(decoder.weight).flatten(1)
        both = mean_and_covariance(rows(torch.cat([codes, patches], 1)))
        put(decoder, *shared(*least_squares(*both, own), to=images))


def principal_map(mean: Tensor, covariance: Tensor, channels: Sequence[Channel], own: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (D, P) and bias (D,) of patches -> z, float64, for patches with this mean (P,) and covariance (P, P).

    own: the map's weight (D, P) so far, whose rows give the directions of channels beyond the components that vary.
    """
    values, vectors = (each.flip(-1) for each in torch.linalg.eigh(covariance))
    rank = int((values > NOISE).sum())
    weight = own.double()
    if rank:
        values, vectors = values[:rank], vectors[:, :rank]
        directions = directions_of(channels, values, weight @ vectors)
        variances = directions.square() @ values
        weight = (stds(channels, variances, rank) / variances.sqrt())[:, None] * directions @ vectors.T
    return weight, torch.tensor([c.mean for c in channels], dtype=torch.float64) - weight @ mean


def directions_of(channels: Sequence[Channel], values: Tensor, own: Tensor) -> Tensor:
    """Direction of every channel in the coordinates of the components, (D, rank), not zero.

    values: variances (rank,) of the components, largest first; own: rows (D, rank) for the channels beyond them.
    """
    rank = len(values)
    balanced = [i for i, c in enumerate(channels) if c.balanced and c.component < rank]
    found = own / values.sqrt() + 1e-12  # directions of the whitened components
    for i, channel in enumerate(channels):
        if channel.component < rank:
            found[i] = torch.eye(rank, dtype=torch.float64)[channel.component]
    if balanced:
        found[balanced] = balance(values[[channels[i].component for i in balanced]]) @ found[balanced]
    return found


def balance(variances: Tensor) -> Tensor:
    """A rotation (n, n) after which all of n uncorrelated numbers of these variances have the same: their mean.

    Each step turns the largest and the smallest that are left, in their plane, until one has the mean (Schur 1923, Horn 1954).
    """
    rotation, left, mean = torch.eye(len(variances), dtype=torch.float64), variances.tolist(), variances.mean().item()
    order = sorted(range(len(left)), key=lambda i: -left[i])
    while len(order) > 1:
        big, small = order.pop(0), order.pop()
        spread = left[big] - left[small]
        sine = min(max((left[big] - mean) / spread, 0.0), 1.0) ** 0.5 if spread > 0 else 0.0
        cosine = (1 - sine**2) ** 0.5
        turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
        rotation[[big, small]] = turn @ rotation[[big, small]]
        left[small] = left[big] + left[small] - mean
        order = sorted([*order, small], key=lambda i: -left[i])
    return rotation


def stds(channels: Sequence[Channel], variances: Tensor, rank: int) -> Tensor:
    """The standard deviation (D,) of each channel: its own number, or that of its component times a factor that all such share.

    With the factor their root mean square is 1; beyond the components they are constant, so that distances stay what they are.
    variances: (D,) along the directions of the channels.
    """
    given = torch.tensor([c.std or 0.0 for c in channels], dtype=torch.float64)
    natural = torch.tensor([c.std is None and c.component < rank for c in channels])
    if not bool(natural.any()):
        return given
    return torch.where(natural, (variances / variances[natural].mean()).sqrt(), given)


def least_squares(mean: Tensor, covariance: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (P, D) and bias (P,) of codes -> patches, float64; of all solutions the one nearest to `own` (P, D).

    mean (D + P,), covariance (D + P, D + P): of codes and patches together.
    """
    dim, own = own.shape[1], own.double()
    codes, across = covariance[:dim, :dim], covariance[dim:, :dim]
    values, vectors = torch.linalg.eigh(codes)
    vary = values > _SAME * values.max().clamp(min=_SAME)
    inverse = vectors[:, vary] / values[vary] @ vectors[:, vary].T
    weight = own + (across - own @ codes) @ inverse
    return weight, mean[dim:] - weight @ mean[:dim]


def mean_and_covariance(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) of rows (n, C) in several parts, float64, about the mean of the first part."""
    zero = torch.zeros((), dtype=torch.float64)
    count, total, products, centre = 0, zero, zero, None
    for part in parts:
        centre = part.mean(0) if centre is None else centre
        part = part - centre
        count, total, products = count + len(part), total + part.sum(0), products + part.T @ part
    assert centre is not None
    return centre + total / count, products / count - (total / count).outer(total / count)


def rows(x: Tensor) -> Iterable[Tensor]:
    """(B, C, h, w) -> (n h w, C) float64 on the CPU, `_CHUNK` images at a time."""
    return (part.movedim(1, -1).flatten(0, 2).cpu().double() for part in x.split(_CHUNK))


def shared(*values: Tensor, to: Tensor) -> list[Tensor]:
    """`values` of rank 0, float32 on the device of `to`."""
    found = [value.float().to(to.device) for value in values]
    if distributed():
        for value in found:
            dist.broadcast(value, src=0)
    return found


def whole(value: Tensor) -> Tensor:
    """A parameter on the CPU; the shards of a distributed one are gathered."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().float().cpu()


def put(layer: nn.Module, *values: Tensor) -> None:
    """Give the parameters of a layer, in their order, these values, of their shapes but for ones at the end."""
    for parameter, value in zip(layer.parameters(), values, strict=True):
        value = value.view(parameter.shape)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)
