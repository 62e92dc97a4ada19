"""Contracts of all encoders with their decoders: gradients, recomputed activations, half precision, compilation."""

from typing import Any, cast

import pytest
import torch
from networks import OPTIONS, PAIRS, UPSAMPLES, conv_pair, vit_pair
from tensors import gradients, normal, randomised
from torch import Tensor, nn

from midway.tokenizers import recomputed
from midway.tokenizers.attention import AttentionBlock, TransformerBlock
from midway.tokenizers.networks import ResidualBlock
from midway.tokenizers.recomputed import Recomputed

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = [name for name in PAIRS if name.startswith("vit")]
ONE_OF_EACH = [*(f"conv, transposed, {options}" for options in OPTIONS), *VIT]
EVERY_UPSAMPLING = [*(f"conv, {upsample}, both" for upsample in UPSAMPLES), *VIT]
IMAGES = normal(2, 3, 12, 12)


@pytest.mark.parametrize(("name", "trained"), [*((name, True) for name in PAIRS), *((name, False) for name in VIT)])
def test_the_gradient_reaches_every_parameter(name: str, trained: bool) -> None:
    network = randomised(PAIRS[name]()) if trained else PAIRS[name]()
    for (parameter, _), gradient in zip(network.named_parameters(), gradients(network, IMAGES)[1:], strict=True):
        assert gradient.isfinite().all(), parameter
        assert gradient.abs().max() > 0, parameter


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradient_checkpointing_computes_again_and_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, calls = randomised(PAIRS[name]()), []

    def counted(compute: Any) -> Any:
        return lambda block, x: (calls.append(block), compute(block, x))[1]

    for kind in (AttentionBlock, ResidualBlock, TransformerBlock):
        monkeypatch.setattr(kind, "compute", counted(kind.compute))
    blocks = [module for module in network.modules() if isinstance(module, Recomputed)]
    plain = gradients(network, IMAGES)
    assert len(calls) == len(blocks) > 0
    for block in blocks:
        block.gradient_checkpointing = True
    again = gradients(network, IMAGES)
    assert len(calls) == 3 * len(blocks)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("block", [AttentionBlock(8), ResidualBlock(8), TransformerBlock(8, 2)])
def test_without_gradients_nothing_is_computed_again(block: Recomputed, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(1, 3, 8) if isinstance(block, TransformerBlock) else normal(1, 8, 2, 2)
    expected = block(x)
    monkeypatch.setattr(block, "gradient_checkpointing", True)
    monkeypatch.setattr(recomputed, "checkpoint", None)  # calling it would raise
    with torch.no_grad():
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("name", EVERY_UPSAMPLING)
def test_bfloat16_runs_and_is_near(name: str) -> None:
    network = randomised(PAIRS[name]())
    expected = gradients(network, IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_inside = gradients(network, IMAGES)
    with torch.no_grad():
        cast_outside = network.to(torch.bfloat16)(IMAGES.bfloat16())
    assert cast_outside.dtype == torch.bfloat16
    assert all(gradient.isfinite().all() for gradient in cast_inside)
    for out in (cast_inside[0].float(), cast_outside.float()):
        assert (out - expected[0]).std() < 0.05 * expected[0].std()


COMPILED = {
    **{u: lambda u=u: conv_pair(u, factor=2, width=8, attention=True, multipliers=(1, 2)) for u in UPSAMPLES},
    **{f"vit, {tokens}": lambda tokens=tokens: vit_pair(tokens, width=8, depth=1) for tokens in (None, 5)},
}


@pytest.mark.parametrize("name", COMPILED)
def test_both_compile_as_one_graph(name: str) -> None:
    network, x = randomised(COMPILED[name]()), IMAGES[:1]
    torch.compiler.reset()
    compiled = cast(nn.Module, torch.compile(network, fullgraph=True, backend="eager"))
    found: list[Tensor] = gradients(compiled, x)
    for a, b in zip(found, gradients(network, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
