"""RMSE and PSNR of end states: closed forms in bytes and in floats."""

import math

import pytest
import torch

from midway.gen.data import to_float
from midway.gen.endpoints import endpoint_psnr, endpoint_rmse
from midway.gen.reconstruction import PSNR_CAP


@pytest.mark.parametrize("levels", [1, 10, 255])
def test_bytes_that_are_some_levels_off(levels: int) -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert endpoint_rmse(images, images + levels).tolist() == pytest.approx([2 * levels / 255] * 2, rel=1e-12)
    assert endpoint_psnr(images, images + levels).tolist() == pytest.approx([20 * math.log10(255 / levels)] * 2)


def test_floats_have_the_errors_of_their_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (3, 3, 8, 8), generator=generator, dtype=torch.uint8) for _ in range(2))
    for measure in (endpoint_rmse, endpoint_psnr):
        floats = measure(to_float(a).double(), to_float(b).double())
        torch.testing.assert_close(measure(a, b), floats, rtol=1e-6, atol=0)
        assert floats.dtype == torch.float64


def test_floats_are_not_rounded() -> None:
    """An error of 1e-4, which no byte shows; each image has its own."""
    images = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    other = images + torch.tensor([1e-4, 0.0], dtype=torch.float64).view(2, 1, 1, 1)
    assert endpoint_rmse(images, other).tolist() == pytest.approx([1e-4, 0], rel=1e-12)
    assert endpoint_psnr(images, other).tolist() == pytest.approx([20 * math.log10(2e4), math.inf])
    assert endpoint_psnr(*[images.to(torch.uint8)] * 2).tolist() == [PSNR_CAP] * 2


def test_refuses_what_cannot_be_compared() -> None:
    floats, few = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for measure in (endpoint_rmse, endpoint_psnr):
        for pair in ((floats, few), (few, floats)):
            with pytest.raises(ValueError, match="float32"):
                measure(*pair)
        for pair in ((floats, floats[:1]), (floats[0], floats[0]), (few, few[:1])):
            with pytest.raises(ValueError, match="shape"):
                measure(*pair)
        with pytest.raises(ValueError, match="1 of 2 images"):
            measure(floats, torch.stack([floats[0], floats[1] + math.nan]))
