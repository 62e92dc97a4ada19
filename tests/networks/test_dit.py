"""The transformer of a latent model: dropout in its blocks, patches and positions, derivatives."""

import math
from dataclasses import replace

import pytest
import torch
from tensors import normal, randomised
from torch import Tensor

from midway.gen.networks.dit import Block, DiT
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.layers import drop, positions_2d
from midway.gen.training.batches import Context
from midway.tokenizers.vit import patchify, unpatchify

TINY = DiTConfig(width=16, depth=2, heads=2)


def _context(count: int) -> Context:
    return Context(seed=0, step=0, sample_ids=torch.arange(count))


def test_dropout_keeps_the_mean_and_the_scale() -> None:
    x = torch.full((500, 20, 10), 3.0)
    got = drop(x, 0.2, _context(500), "here")
    assert set(got.unique().tolist()) == {0.0, 3.75}
    assert got.mean().item() == pytest.approx(3, abs=4 * 3.75 * math.sqrt(0.2 * 0.8 / x.numel()))


@pytest.mark.parametrize("branch", [0, 1], ids=["attention", "mlp"])
def test_the_expectation_of_a_blocks_output_is_that_without_dropout(branch: int) -> None:
    """One sample under 4000 masks; the other branch's gate is closed, so that the output is linear in the mask."""
    torch.manual_seed(0)
    block = Block(DiTConfig(width=16, heads=2, dropout=0.4), layer=0).requires_grad_(False)
    gate = torch.zeros(6, 16)
    gate[3 * branch + 2] = 1
    block.get_parameter("modulation.weight").zero_()
    block.get_parameter("modulation.bias").copy_(gate.flatten())
    x, condition = torch.randn(1, 5, 16).expand(4000, -1, -1), torch.zeros(4000, 16)
    got, plain = block(x, condition, _context(4000)), block(x, condition)[0]
    error = got.std(0) / math.sqrt(4000)
    assert error.min() > 0, "every number is dropped for some samples"
    assert ((got.mean(0) - plain).abs() < 5 * error).all()


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_a_dropout_that_cannot_be_raises_an_error(dropout: float) -> None:
    with pytest.raises(ValueError, match=f"dropout is {dropout}; give a number in"):
        DiTConfig(dropout=dropout)


def test_positions_and_patches() -> None:
    positions = positions_2d(3, 5, 32)
    assert positions.shape == (15, 32)
    assert len(torch.unique(positions, dim=0)) == 15
    x = torch.randn(2, 3, 4, 6)
    tokens = patchify(x, 2)
    assert torch.equal(tokens[:, 4].view(2, 3, 2, 2), x[:, :, 2:, 2:4]), "row by row"
    assert torch.equal(unpatchify(tokens, (2, 3), 2), x)
    with pytest.raises(ValueError, match="patches of 3"):
        DiT(DiTConfig(width=16, depth=1, heads=2, patch=3), 3, 4, 4, 10)
    with pytest.raises(ValueError, match="divisible by heads"):
        DiTConfig(width=18, heads=4)


def test_a_network_in_float64_has_the_gradient_of_finite_differences() -> None:
    network = randomised(DiT(replace(TINY, patch=2), 3, 4, 4, 10), std=0.2).double()
    x, angle = normal(2, 3, 4, 4, dtype=torch.float64).requires_grad_(), torch.rand(2, dtype=torch.float64)
    out = network(x, angle, torch.tensor([1, 10]))
    assert {out.value.dtype, out.hidden.dtype} == {torch.float64}
    torch.autograd.gradcheck(lambda x: network(x, angle, torch.tensor([1, 10])).value, x)
    scale = network.get_parameter("blocks.1.attention.norm_k.weight").detach().clone()

    def of_scale(scale: Tensor) -> Tensor:
        return torch.func.functional_call(
            network, {"blocks.1.attention.norm_k.weight": scale}, (x, angle, torch.tensor([1, 10]))
        ).value

    torch.autograd.gradcheck(of_scale, scale.requires_grad_())
    near = network(x, angle + 1e-9, torch.tensor([1, 10])).value - out.value
    assert 0 < near.abs().max() < 1e-5  # float32 cannot tell these times apart
