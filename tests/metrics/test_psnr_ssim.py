"""PSNR and SSIM: closed forms, an independent double loop, and other libraries where they are installed."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from midway.gen.data.images import to_float
from midway.gen.metrics.psnr_ssim import PSNR_CAP, mse, psnr, ssim, window_side


def pair(height: int = 16, width: int = 13, channels: int = 3, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Smooth images and noisy copies, which differ per image and channel."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 255, height * width).view(1, 1, height, width)
    phase = torch.rand(batch, channels, 1, 1, generator=generator) * 255
    images = ((ramp + phase) % 256).to(torch.uint8)
    noise = torch.randn(images.shape, generator=generator) * torch.arange(1, batch + 1).view(-1, 1, 1, 1) * 15
    return images, (images + noise).round().clamp(0, 255).to(torch.uint8)


def loop_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of one channel, (H, W) in 0..255, window by window."""
    side = min(11, *(size if size % 2 else size - 1 for size in a.shape))
    weights = np.zeros((side, side))
    for i in range(side):
        for j in range(side):
            weights[i, j] = math.exp(-((i - side // 2) ** 2 + (j - side // 2) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for i in range(a.shape[0] - side + 1):
        for j in range(a.shape[1] - side + 1):
            x, y = a[i : i + side, j : j + side] / 255, b[i : i + side, j : j + side] / 255
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            found.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(found))


@pytest.mark.parametrize("levels", [1, 10, 255])
def test_an_error_of_some_levels_everywhere(levels: int) -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    expected = 20 * math.log10(255 / levels)
    assert psnr(images, images + levels).tolist() == pytest.approx([expected] * 2, abs=1e-12)


def test_the_mean_error_is_that_of_floats() -> None:
    images, shown = pair()
    expected = (to_float(images).double() - to_float(shown).double()).square().mean((1, 2, 3))
    torch.testing.assert_close(mse(images, shown), expected, rtol=1e-6, atol=0)
    assert mse(images, shown).dtype == psnr(images, shown).dtype == ssim(images, shown).dtype == torch.float64


def test_a_perfect_image_has_the_psnr_of_rounding() -> None:
    images, _ = pair()
    assert psnr(images, images).tolist() == [PSNR_CAP] * 2
    assert pytest.approx(10 * math.log10(12 * 255**2)) == PSNR_CAP
    assert ssim(images, images).tolist() == pytest.approx([1, 1], abs=1e-12)
    nearly = images.clone()
    nearly[0, 0, 0, 0] ^= 1
    assert psnr(images, nearly)[0] == PSNR_CAP


@pytest.mark.parametrize(("height", "width", "channels"), [(16, 13, 3), (11, 11, 1), (8, 8, 1), (12, 6, 2), (1, 5, 1)])
def test_ssim_agrees_with_a_loop_over_windows(height: int, width: int, channels: int) -> None:
    images, shown = pair(height, width, channels)
    expected = [
        np.mean([loop_ssim(a, b) for a, b in zip(x, y, strict=True)])
        for x, y in zip(images.double().numpy(), shown.double().numpy(), strict=True)
    ]
    found = ssim(images, shown)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert found[1] < found[0] < 1 or height == 1


def test_the_window_is_the_largest_odd_one_up_to_11() -> None:
    assert [window_side(n, 64) for n in (1, 2, 7, 8, 10, 11, 12, 64)] == [1, 1, 7, 7, 9, 11, 11, 11]
    assert window_side(64, 8) == 7


def test_ssim_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    images, shown = pair(24, 19)
    expected = [
        metrics.structural_similarity(
            a, b, data_range=255, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(images.double().numpy(), shown.double().numpy(), strict=True)
    ]
    assert ssim(images, shown).tolist() == pytest.approx(expected, abs=1e-10)


def test_ssim_agrees_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    images, shown = pair(24, 19)
    _, everywhere = functional.structural_similarity_index_measure(
        shown.double(), images.double(), data_range=255.0, reduction="none", return_full_image=True
    )
    expected = (
        everywhere[..., 5:-5, 5:-5].flatten(1).mean(1)
    )  # without windows over the mirrored border, which it averages too
    torch.testing.assert_close(ssim(images, shown), expected, rtol=0, atol=1e-4)


def test_only_pairs_of_bytes_are_compared() -> None:
    images, shown = pair()
    for measure in (mse, psnr, ssim):
        with pytest.raises(ValueError, match="float32"):
            measure(images, shown.float())
        with pytest.raises(ValueError, match="shape"):
            measure(images, shown[:1])
