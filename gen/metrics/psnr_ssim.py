"""How far reconstructions are from their images, both of 8 bits: one number an image, in float64.

    mse = mean over pixels and channels of (x - x')^2, in [-1, 1] units, where a level is 2 / 255
    PSNR = 10 log10(4 / max(mse, e)) dB,      e = 1/12 level^2: the error of rounding to 8 bits itself

So a perfect reconstruction has 58.92 dB, not infinity, and a mean over images exists. The PSNR of a set of images is that mean,
as in the literature's tables; by Jensen's inequality it is never below the PSNR of the mean error.

    SSIM = mean over windows of (2 m m' + C1)(2 c + C2) / ((m^2 + m'^2 + C1)(v + v' + C2))

(Wang et al. 2004, IEEE TIP 13(4), eq. 13) with m, v and c the means, variances and covariance under an 11 x 11 Gaussian of sigma
1.5 whose weights add up to 1, C1 = (0.01 255)^2, C2 = (0.03 255)^2; windows lie wholly inside the image, channels are compared
one by one and averaged. Images of less than 11 pixels a side have the largest odd window that fits: 7 x 7 of 8 x 8.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LEVEL = 2 / 255
LEAST_MSE = LEVEL**2 / 12
PSNR_CAP = 10 * math.log10(4 / LEAST_MSE)
"""58.92 dB: the value reported for a perfect reconstruction."""
WINDOW, SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def mse(images: Tensor, shown: Tensor) -> Tensor:
    """Mean squared error in [-1, 1] units, float64 (B,), of uint8 (B, C, H, W) and reconstructions. ValueError for others."""
    _check(images, shown)
    return (images.double() - shown.double()).square().flatten(1).mean(1) * LEVEL**2


def psnr(images: Tensor, shown: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64 (B,), at most `PSNR_CAP`; arguments as of `mse`."""
    return 10 * torch.log10(4 / mse(images, shown).clamp(min=LEAST_MSE))


def ssim(images: Tensor, shown: Tensor) -> Tensor:
    """Structural similarity in [-1, 1], 1 of equal images, float64 (B,); arguments as of `mse`."""
    _check(images, shown)
    a, b = images.double(), shown.double()
    mean_a, mean_b, aa, bb, ab = (_smooth(x) for x in (a, b, a * a, b * b, a * b))
    variances = aa - mean_a**2 + bb - mean_b**2
    likeness = (2 * mean_a * mean_b + _C1) * (2 * (ab - mean_a * mean_b) + _C2)
    return (likeness / ((mean_a**2 + mean_b**2 + _C1) * (variances + _C2))).flatten(1).mean(1)


def window_side(height: int, width: int) -> int:
    """Pixels a side of SSIM's window: 11, or the largest odd number that fits."""
    side = min(height, width, WINDOW)
    return side if side % 2 else side - 1


def _smooth(x: Tensor) -> Tensor:
    """(B, C, H, W) -> Gaussian means of all windows inside, (B, C, H - side + 1, W - side + 1)."""
    side = window_side(*x.shape[2:])
    place = torch.arange(side, dtype=x.dtype, device=x.device) - side // 2
    weights = torch.exp(-(place**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    rows = F.conv2d(x.flatten(0, 1).unsqueeze(1), weights.view(1, 1, 1, -1))
    return F.conv2d(rows, weights.view(1, 1, -1, 1)).squeeze(1).unflatten(0, x.shape[:2])


def _check(images: Tensor, shown: Tensor) -> None:
    if images.shape != shown.shape or images.ndim != 4:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, reconstructions {tuple(shown.shape)}: give both as (B, C, H, W)"
        )
    if images.dtype != torch.uint8 or shown.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}, reconstructions {shown.dtype}: round both to uint8 with to_uint8")
