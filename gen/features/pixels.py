"""Pixels as features: a second space, without a network.

    features = x / 255, flattened; of images with a side above 32, means over areas bring that side to 32

A feature network sees what it was trained to see; errors that it is blind to may be plain in pixels, and the other way round. On
principal axes of the reference (reference.py) the Fréchet distance of pixels compares means and covariances of whole images.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from midway.gen.data.pixels import Images
from midway.gen.features.extractor import (
    Activations,
    Extractor,
    check_measurable,
    in_blocks,
    need_measurable,
    other_label,
)

SIDE = 32
AXES = 64
BLOCK = 256
"""Images per block."""


class Pixels(Extractor):
    """Grey images have one channel; features of images of other shapes are of other lengths."""

    name = f"pixels-{SIDE}"
    label = other_label(name)
    note = (
        f"{label}: features are the pixels, or means over areas in images of more than {SIDE} x {SIDE}. Distances compare only "
        "with those of images of the same size, the same number of images and the same reference images."
    )
    dim = 3 * SIDE**2
    """At most; `dim_of` images of one shape."""
    axes = AXES

    def dim_of(self, images: Images) -> int:
        """The number of pixels and channels after the reduction."""
        channels, *sides = images.shape[1:]
        return channels * min(sides[0], SIDE) * min(sides[1], SIDE)

    def check(self, images: Images, what: str = "the images are") -> None:
        """DataError unless these are uint8 images (N, 1 or 3, H, W); `what` names their source."""
        check_measurable(self.name, images, what)

    @torch.no_grad()
    def activations(self, images: Tensor) -> Activations:
        """Features and no logits, as `features`; on the CPU."""
        need_measurable(self.name, images)
        return in_blocks(images, BLOCK, torch.device("cpu"), _block)


def _block(images: Tensor) -> Activations:
    size = (min(images.shape[2], SIDE), min(images.shape[3], SIDE))
    x = images.float() / 255
    return Activations((x if size == tuple(images.shape[2:]) else F.adaptive_avg_pool2d(x, size)).flatten(1), None)
