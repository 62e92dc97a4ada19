"""How far images of a few solver steps are from those of many: one number an image, in float64, in [-1, 1] units.

    RMSE = sqrt(mean over pixels and channels of (x - x')^2),      PSNR = 20 log10(2 / RMSE) dB

Of 8-bit images a level is 2 / 255, and the PSNR is that of reconstruction.py: at most 58.92 dB, the error of rounding itself.
Of floats in [-1, 1] nothing has been rounded: that of equal images is infinite.
"""

import torch
from torch import Tensor

from midway.gen import reconstruction


def endpoint_rmse(images: Tensor, reference: Tensor) -> Tensor:
    """float64 (B,) of images and what they should be, both (B, C, H, W) uint8 or both floats. ValueError for others."""
    return _mse(images, reference).sqrt()


def endpoint_psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64 (B,); arguments as of `endpoint_rmse`."""
    if images.dtype == reference.dtype == torch.uint8:
        return reconstruction.psnr(images, reference)
    return 10 * torch.log10(4 / _mse(images, reference))


def _mse(images: Tensor, reference: Tensor) -> Tensor:
    if not (images.is_floating_point() and reference.is_floating_point()):
        return reconstruction.mse(images, reference)
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, the reference {tuple(reference.shape)}: give both as (B, C, H, W)"
        )
    errors = (images.double() - reference.double()).square().flatten(1).mean(1)
    if not errors.isfinite().all():
        raise ValueError(f"{int((~errors.isfinite()).sum())} of {len(errors)} images or references are not finite")
    return errors
