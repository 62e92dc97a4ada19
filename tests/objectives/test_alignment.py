"""Alignment: the cosine loss against its closed form, projectors, spatial normalisation, the end, and which tokens it takes."""

import math
from dataclasses import replace
from typing import Any, Literal, cast

import pytest
import torch
from tensors import grad, normal, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.core.errors import UsageError
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit import DiT
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.objectives.alignment import MEAN_SHARE, AlignConfig, Alignment, make_projector, spatial
from midway.gen.objectives.jump_config import JUMPS, JumpConfig, Objective
from midway.gen.training.batches import Context, LatentBatch

GRID, SHAPE = (2, 3), (3, 4, 6)
TINY = DiTConfig(width=16, depth=3, heads=2, patch=2, time_scale=1.0)


def bare(weight: float = 0.7, normalize: Literal["none", "spatial"] = "none") -> Alignment:
    """Tokens are features already: the projector is the identity."""
    made = Alignment(AlignConfig(weight=weight, normalize=normalize), 5, GRID, 5)
    made.projector = nn.Identity()
    return made


def tokens(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, C), row by row."""
    return features.flatten(2).mT


# ---- the loss ----


def test_equal_features_give_minus_the_weight_and_opposite_ones_plus() -> None:
    y = normal(4, 5, *GRID)
    for factor, expected in ((1.0, -0.7), (3.0, -0.7), (-1.0, 0.7)):
        term, cosines = bare()(factor * tokens(y), y, 0)
        assert term.item() == pytest.approx(expected, abs=1e-6)
        assert cosines.tolist() == pytest.approx([24 * math.copysign(1, factor), 24], abs=1e-4)
    across = y.clone()
    across[:, 0::2], across[:, 1::2] = 0, 0
    across[:, 0], y[:, 0] = 1, 0  # in the one channel that y has not
    assert bare()(tokens(across), y, 0)[0].item() == pytest.approx(0, abs=1e-7)


def test_loss_and_gradient_are_those_of_the_closed_form() -> None:
    """d/dp of cos = y / (|p| |y|) - cos p / |p|^2, over 4 samples of 6 tokens, times minus the weight."""
    h = normal(4, 6, 5, dtype=torch.float64).requires_grad_()
    y = normal(4, 5, *GRID, seed=1, dtype=torch.float64)
    term, _ = bare()(h, y, 0)
    term.backward()
    wanted, p = tokens(y), h.detach()
    sizes = p.norm(dim=2, keepdim=True), wanted.norm(dim=2, keepdim=True)
    cosine = (p * wanted).sum(2, keepdim=True) / (sizes[0] * sizes[1])
    assert term.item() == pytest.approx(-0.7 * cosine.mean().item(), abs=1e-12)
    expected = -0.7 / 24 * (wanted / (sizes[0] * sizes[1]) - cosine * p / sizes[0].square())
    torch.testing.assert_close(grad(h), expected, rtol=0, atol=1e-12)


def test_two_micro_batches_are_one_batch() -> None:
    h, y = normal(4, 6, 5), normal(4, 5, *GRID, seed=1)
    whole, parts = bare()(h, y, 0), [bare()(h[i : i + 2], y[i : i + 2], 0) for i in (0, 2)]
    assert whole[0].item() == pytest.approx((parts[0][0] + parts[1][0]).item() / 2, abs=1e-7)
    torch.testing.assert_close(whole[1], parts[0][1] + parts[1][1])


# ---- projectors and normalisation ----


def test_the_mlp_is_three_layers_token_by_token() -> None:
    network = randomised(make_projector("mlp", 4, 5))
    x = normal(2, 4, *GRID)
    first, _, second, _, third = network.children()
    h = tokens(x)
    for layer in (first, second, third):
        assert isinstance(layer, nn.Conv2d)
        h = F.linear(h if layer is first else F.silu(h), layer.weight[:, :, 0, 0], layer.bias)
    torch.testing.assert_close(tokens(network(x)), h)


def test_the_convolution_sees_neighbours_on_the_grid() -> None:
    """A change of the first token moves itself, its right neighbour and the two below them: row by row, in a grid of 2 x 3."""
    made = Alignment(AlignConfig(projector="conv"), 4, GRID, 5)
    seen = list[Tensor]()
    made.projector.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    h, y = normal(1, 6, 4), normal(1, 5, *GRID)
    made(h, y, 0)
    made(h.index_fill(1, torch.tensor([0]), 0.0), y, 0)
    moved = (seen[0] - seen[1]).abs().amax(1)[0] > 1e-6
    assert moved.tolist() == [[True, True, False], [True, True, False]]


def test_spatial_normalisation_leaves_a_share_of_the_mean_and_unit_deviation() -> None:
    y = 3 * normal(2, 5, *GRID) + 7
    found = spatial(y)
    mean, deviation = y.mean((2, 3)), y.flatten(2).std(2)
    torch.testing.assert_close(found.mean((2, 3)), (1 - MEAN_SHARE) * mean / deviation, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.flatten(2).std(2), torch.ones(2, 5), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spatial(10 * y), found, rtol=1e-4, atol=1e-4)
    term, _ = bare(1, "spatial")(tokens(found), y, 0)
    assert term.item() == pytest.approx(-1, abs=1e-6), "the loss normalises the teacher's features"
    with pytest.raises(ValueError, match="one token"):
        Alignment(AlignConfig(normalize="spatial"), 4, (1, 1), 5)


# ---- on and off ----


def test_it_is_off_from_its_last_step_on() -> None:
    config = AlignConfig(steps=3)
    assert [config.is_on(step) for step in range(5)] == [True, True, True, False, False]
    assert AlignConfig().is_on(10**9)
    made = Alignment(config, 4, GRID, 5)
    h, y = normal(2, 6, 4).requires_grad_(), normal(2, 5, *GRID)
    term, cosines = made(h, y, 3)
    term.backward()
    assert term.item() == 0 and cosines.tolist() == [0, 0] and h.grad is None
    assert all(not grad(p).any() for p in made.parameters()), (
        "0 and not None: processes add up gradients of all parameters"
    )


@pytest.mark.parametrize("wrong", [{"until": 0.0}, {"until": 1.5}, {"weight": -1.0}, {"block": -1}])
def test_numbers_out_of_range_raise(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        AlignConfig(**wrong)


# ---- the tokens of a model ----


def model(objective: Objective = "flow", **switches: Any) -> LatentModel:
    torch.manual_seed(0)
    config = LatentModelConfig(
        schedule="linear", objective=objective, jump=JumpConfig(flow_share=0.5), dit=replace(TINY, **switches)
    )
    return randomised(LatentModel(config, SHAPE, 4), std=0.2)


def batch() -> LatentBatch:
    return LatentBatch(normal(8, *SHAPE), torch.arange(8) % 4, features=normal(8, 5, *GRID, seed=2))


CONTEXT = Context(0, 1, torch.arange(8))
BLOCKS = {"adaln": {}, "tokens": {"conditioning": "tokens"}, "linear": {"mixer": "linear", "positions": "rope"}}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("block", [1, 2, 3])
def test_hidden_tokens_are_those_after_the_block(block: int, name: str) -> None:
    """Those of patches, not of conditions in front; what the network predicts stays."""
    made = model(**BLOCKS[name])
    assert isinstance(made.network, DiT)
    x, t, labels = normal(8, *SHAPE), torch.linspace(0.1, 0.9, 8), torch.arange(8) % 4
    before, middle = made.forward_network(x, t, labels)
    seen = list[Tensor]()
    taken = cast(nn.Module, made.network.blocks[block - 1])
    taken.register_forward_hook(lambda *call: seen.append(call[-1]))
    made.network.take(block)
    value, hidden = made.forward_network(x, t, labels)
    assert torch.equal(value, before) and torch.equal(hidden, seen[0][:, made.network.front :])
    assert hidden.shape == (8, 6, 16) and torch.equal(hidden, middle) == (block == 2)
    with pytest.raises(ValueError, match="no block 4"):
        made.network.take(4)


@pytest.mark.parametrize("objective", ["flow", *JUMPS])
def test_the_term_is_added_to_every_objective(objective: Objective) -> None:
    """It is 0 at weight 0; it moves blocks up to the one that is taken, and the projector; without it the loss is as it was."""
    made, found = model(objective), batch()
    alone, logs = made.loss(replace(found, features=None), CONTEXT)
    terms = {}
    for weight in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        made.align(Alignment(AlignConfig(weight=weight, block=1), 16, GRID, 5))
        loss, more = made.loss(found, CONTEXT)
        terms[weight] = (loss - alone).item()
        cosine = more["alignment"][0] / more["alignment"][1]
        assert terms[weight] == pytest.approx(-weight * cosine.item(), abs=1e-5 * (1 + abs(alone.item())))
        assert more.keys() == {*logs, "alignment"} and more["alignment"][1] == 8 * 6
    assert abs(terms[1.0]) > 1e-3
    assert made.alignment is not None
    parameters = dict(made.named_parameters())
    made.loss(found, CONTEXT)[0].backward()
    with_term = {name: grad(p).clone() for name, p in parameters.items() if p.grad is not None}
    made.zero_grad()
    made.alignment.config = AlignConfig(weight=0.0)
    made.loss(found, CONTEXT)[0].backward()
    differ = {name for name, p in parameters.items() if not torch.equal(with_term[name], grad(p))}
    assert {"network.embed.weight", "network.blocks.0.mlp.0.weight", "alignment.projector.0.weight"} <= differ
    assert not [name for name in differ if name.startswith(("network.blocks.1", "network.blocks.2", "network.head"))]


def test_a_switched_off_alignment_leaves_the_gradients_of_none() -> None:
    plain, off = model(), model()
    off.align(Alignment(AlignConfig(steps=1), 16, GRID, 5))
    losses = [one.loss(batch(), CONTEXT)[0] for one in (plain, off)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    own = dict(off.named_parameters())
    assert all(torch.equal(grad(p), grad(own[name])) for name, p in plain.named_parameters())
