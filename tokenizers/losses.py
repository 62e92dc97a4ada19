"""How far a reconstruction x' is from its image x, element by element: d = x' - x, the mean over all elements.

    "l1"            mean |d|
    "l2"            mean d^2
    "charbonnier"   mean sqrt(d^2 + eps^2)      (Lai et al. 2017, arXiv 1704.03915)

The last is l1 far from 0 and, with its constant eps, smooth at 0: its gradient d / sqrt(d^2 + eps^2) does not jump there.
It is never below eps.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Pixel = Literal["l1", "l2", "charbonnier"]


def pixel_loss(reconstruction: Tensor, images: Tensor, kind: Pixel, eps: float = 1e-3) -> Tensor:
    """Scalar float32; both tensors have one shape and one range, by convention [-1, 1]; `eps` > 0, in its unit, is Charbonnier's.

    ValueError for another kind, shapes that differ (they would broadcast) or eps <= 0.
    """
    if kind not in get_args(Pixel):
        raise ValueError(f"the pixel loss is {kind!r}; choose one of: {', '.join(get_args(Pixel))}")
    if reconstruction.shape != images.shape:
        raise ValueError(
            f"the reconstruction has shape {tuple(reconstruction.shape)}, the images {tuple(images.shape)}: "
            "decode to the size and the channels of the images"
        )
    if not eps > 0:
        raise ValueError(f"eps is {eps}; give a number above 0, 1e-3 by default, or choose 'l1'")
    difference = reconstruction.float() - images.float()
    if kind == "l1":
        return mean(difference.abs())
    square = difference.square()
    return mean(square if kind == "l2" else torch.sqrt(square + eps**2))


def mean(x: Tensor) -> Tensor:
    """The mean of all numbers; 0, with a graph, if there are none: a batch without samples has no loss."""
    return x.mean() if x.numel() else x.sum()


def mean_square(x: Tensor, y: Tensor) -> Tensor:
    """The mean of (x - y)^2, as `mean`; equal shapes."""
    return F.mse_loss(x, y, reduction="mean" if x.numel() else "sum")
