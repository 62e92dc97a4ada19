"""Derivatives of networks by state and time, against finite differences."""

import torch
from tensors import normal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from midway.gen.networks.network import Network

STEP = 1e-5


def check_derivative(network: Network, x: Tensor, angle: Tensor, labels: Tensor) -> None:
    """Forward differentiation of a float64 network along x (B, C, H, W) and angle (B,) at once; its span is half the angle."""
    tangent = normal(*x.shape, seed=2, dtype=torch.float64)

    def value(x: Tensor, angle: Tensor) -> Tensor:
        return network(x, angle, labels, more={"span": angle / 2}).value

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        got = torch.func.jvp(value, (x, angle), (tangent, torch.ones_like(angle)))[1]
        ends = [value(x + way * STEP * tangent, angle + way * STEP) for way in (1, -1)]
    torch.testing.assert_close(got, (ends[0] - ends[1]) / (2 * STEP), rtol=1e-6, atol=1e-8)
    assert got.abs().max() > 1e-2
