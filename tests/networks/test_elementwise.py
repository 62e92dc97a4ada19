"""Blocks that write over their intermediate results compute what those with gradients compute."""

from typing import Any

import pytest
import torch
from torch import Tensor

from midway.gen.networks.dit import DiT
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.elementwise import GELU, gated, modulate, plus, times

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "rms, swiglu, rope": {"norm": "rms", "mlp": "swiglu", "positions": "rope"},
    "dyt": {"norm": "dyt", "qk_norm": False},
    "tokens": {"conditioning": "tokens", "norm": "rms"},
    "linear": {"mixer": "linear"},
}


def network_of(kind: str) -> DiT:
    """With weights that let everything reach the output."""
    torch.manual_seed(0)
    net = DiT(DiTConfig(width=16, depth=3, heads=2, **KINDS[kind]), 3, 4, 4, 5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "autocast", "bfloat16"])
def test_without_gradients_a_network_computes_the_same_bits(kind: str, dtype: str) -> None:
    net, x = network_of(kind), torch.randn(4, 3, 4, 4)
    if dtype == "bfloat16":
        net = net.bfloat16()
    angle, labels, kept = torch.rand(4), torch.arange(4), x.clone()
    condition = net.conditions(angle[:1], labels)[0].detach()
    own = condition.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        expected = net(x, condition=condition)
        with torch.no_grad():
            found = net(x, condition=condition)
    for one, other in zip(found, expected, strict=True):  # values, and the hidden tokens of a block in the middle
        assert torch.equal(one, other)
    assert torch.equal(x, kept) and torch.equal(condition, own)


def test_memory_is_written_over_without_gradients_alone() -> None:
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    work = [
        lambda x: times(x, scale[:, None]),
        lambda x: plus(x, shift[:, None]),
        lambda x: modulate(x, shift, scale),
        lambda x: gated(x, scale, torch.ones(2, 3, 4)),
        GELU(),
    ]
    for each in work:
        with_gradients, without = x.clone(), x.clone()
        expected = each(with_gradients)
        assert torch.equal(with_gradients, x)
        with torch.no_grad():
            assert each(without).data_ptr() == without.data_ptr()
        assert torch.equal(without, expected)


@torch.no_grad()
def test_a_wider_result_has_memory_of_its_own() -> None:
    branch, wide = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 4)
    kept = branch.clone()
    found: Tensor = plus(branch, wide)
    assert found.dtype == torch.float32 and torch.equal(found, kept.float() + wide)
    assert torch.equal(branch, kept)
