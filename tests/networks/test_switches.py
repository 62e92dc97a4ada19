"""The switches of the transformer: each changes what it says, starts at 0, and works with all that networks are used for."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from derivatives import check_derivative
from tensors import normal, randomised
from torch import Tensor
from torch.nn import functional as F

from midway.gen.networks.dit import CLASS_TOKENS, TIME_TOKENS, Block, DiT
from midway.gen.networks.dit_config import Details, DiTConfig
from midway.gen.networks.layers import SwiGLU, make_norm, places_2d, rotated, rotation, swiglu_width
from midway.gen.networks.mixers import MIXERS, TOKENS, linear_attention, logit_scale, phi, softmax_attention
from midway.gen.training.batches import Context
from midway.gen.training.optim import checkpoint_activations, is_hidden_matrix

TINY = DiTConfig(width=16, depth=2, heads=2)
CHANGES: dict[str, dict[str, Any]] = {
    "norm rms": {"norm": "rms"},
    "norm dyt": {"norm": "dyt"},
    "mlp swiglu": {"mlp": "swiglu"},
    "positions rope": {"positions": "rope"},
    "positions both": {"positions": "both"},
    "no qk_norm": {"qk_norm": False},
    "conditioning tokens": {"conditioning": "tokens"},
    "mixer linear": {"mixer": "linear"},
    "attention_scale tokens": {"attention_scale": "tokens"},
    "details": {"details": Details(norm_gains=True, mlp_norm_eps=0.1, qk_norm_eps=0.1, time_intervals=127)},
}
"""One by one; then several that meet in one layer."""
SWITCHES = {
    "none": {},
    **CHANGES,
    "rotated linear": {"mixer": "linear", "positions": "both"},
    "tokens, dyt, swiglu, both": {"conditioning": "tokens", "norm": "dyt", "mlp": "swiglu", "positions": "both"},
    "tokens, rms": {"conditioning": "tokens", "norm": "rms", "attention_scale": "tokens"},
}
every_switch = pytest.mark.parametrize("name", SWITCHES)
LABELS = torch.tensor([0, 3, 5])


def network(more: tuple[str, ...] = (), **switches: Any) -> DiT:
    """Of 2x3 tokens of 3 channels and 5 classes."""
    torch.manual_seed(0)
    return DiT(replace(TINY, **switches), 3, 2, 3, 5, more)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return normal(3, 3, 2, 3, dtype=dtype), torch.tensor([0.2, 0.5, 0.9], dtype=dtype), LABELS


def names(found: DiT) -> set[str]:
    return {name for name, _ in found.named_parameters()}


# ---- what a switch changes ----


def test_without_switches_the_network_has_the_parameters_that_stored_weights_have() -> None:
    block = {f"attention.{layer}.{kind}" for layer in ("qkv", "out") for kind in ("weight", "bias")}
    block |= {f"{layer}.{kind}" for layer in ("mlp.0", "mlp.2", "modulation") for kind in ("weight", "bias")}
    block |= {"attention.norm_q.weight", "attention.norm_k.weight"}
    outside = {
        f"{layer}.{kind}"
        for layer in ("embed", "time.0", "time.2", "modulation", "head")
        for kind in ("weight", "bias")
    }
    expected = {f"blocks.{i}.{name}" for i in (0, 1) for name in block} | outside | {"label.weight"}
    assert names(network()) == expected == {*network().state_dict()}
    switches = dict.fromkeys(switch for change in CHANGES.values() for switch in change)
    others = [field.name for field in fields(DiTConfig)][7:]
    assert [name for name in others if not name.startswith("mup_")] == list(switches)


@pytest.mark.parametrize("name", CHANGES)
def test_every_switch_changes_the_output(name: str) -> None:
    """By the same weights, where it has the same."""
    plain, changed = randomised(network(), std=0.3), randomised(network(**CHANGES[name]), std=0.3)
    common = names(plain) & names(changed)
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    changed.load_state_dict({key: plain.state_dict()[key] for key in common}, strict=False)
    assert all(changed.state_dict()[key].shape == shapes[key] for key in common)
    with torch.no_grad():
        assert (plain(*inputs()).value - changed(*inputs()).value).abs().max() > 1e-3


def test_switches_have_the_parameters_that_they_claim() -> None:
    plain, blocks = names(network()), range(TINY.depth)
    for kept in ("norm rms", "positions rope", "positions both", "mixer linear", "attention_scale tokens"):
        assert names(network(**CHANGES[kept])) == plain
    assert plain - names(network(qk_norm=False)) == {
        f"blocks.{i}.attention.norm_{n}.weight" for i in blocks for n in "qk"
    }
    alphas = {f"blocks.{i}.norm_{n}.alpha" for i in blocks for n in (1, 2)} | {"norm.alpha"}
    assert names(network(norm="dyt")) - plain == alphas
    gone = {f"{where}modulation.{kind}" for where in ("", "blocks.0.", "blocks.1.") for kind in ("weight", "bias")}
    assert plain - names(network(conditioning="tokens")) == gone
    norms = {f"blocks.{i}.norm_{n}.{kind}" for i in blocks for n in (1, 2) for kind in ("weight", "bias")}
    assert names(network(conditioning="tokens")) - plain == norms | {"norm.weight", "norm.bias", "prefix"}


def test_tokens_in_place_of_modulation_save_a_third_of_the_weights() -> None:
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in DiT(DiTConfig(384, 12, 6, 2, conditioning=how), 4, 32, 32, 1000).parameters())  # pyright: ignore
            for how in ("adaln", "tokens")
        ]
    assert sizes[1] / sizes[0] == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.parametrize("width", [16, 96, 384, 768, 1000, 1152])
@pytest.mark.parametrize("ratio", [4.0, 3.0, 1.5])
def test_swiglu_has_the_weights_of_the_mlp_that_it_replaces(width: int, ratio: float) -> None:
    """2 W r W of one, 3 W H of the other, with H rounded up by less than 8."""
    with torch.device("meta"):
        gated = sum(p.numel() for p in SwiGLU(width, swiglu_width(width, ratio)).parameters() if p.ndim == 2)
    assert swiglu_width(width, ratio) % 8 == 0
    assert 0 <= gated - 2 * ratio * width**2 < 3 * 8 * width


def test_swiglu_is_its_formula() -> None:
    layer, x = SwiGLU(4, 8).double(), normal(5, 4, dtype=torch.float64)
    a, b = (x @ layer.up.weight.T + layer.up.bias).split(8, dim=-1)
    expected = (a * torch.sigmoid(a) * b) @ layer.down.weight.T + layer.down.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms", "dyt"])
def test_norms_are_their_formulas_in_float32_whatever_comes_in(kind: Any, affine: bool) -> None:
    norm, x = randomised(make_norm(kind, 16, affine), std=0.3).double(), normal(7, 16, dtype=torch.float64) + 1
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = torch.tanh(norm.get_parameter("alpha") * x) if kind == "dyt" else expected
    own = dict(norm.named_parameters())
    expected = expected * own.get("weight", torch.ones(16)) + own.get("bias", torch.zeros(16))
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)
    learned = {"rms": ["weight"], "layer": ["weight", "bias"], "dyt": ["weight", "bias"]}[kind] if affine else []
    assert [name for name in own if name != "alpha"] == learned
    half, norm = x.bfloat16(), norm.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(half), norm(half.float()).to(norm(half).dtype))


# ---- the start ----


@every_switch
def test_a_new_network_returns_0_and_its_blocks_are_the_identity(name: str) -> None:
    made = network(("span",), **SWITCHES[name])
    out = made(*inputs(), more={"span": torch.rand(3)})
    assert not out.value.any()
    x = normal(3, 6 + made.front, 16)
    condition = made.conditions(torch.rand(1), LABELS, {"span": torch.rand(1)})[0]
    assert all(torch.equal(block(x, condition, None, made.turn), x) for block in made.blocks)
    assert out.hidden.shape == (3, 6, 16)


@every_switch
def test_every_parameter_learns_after_two_steps(name: str) -> None:
    """Zeros at the start cut no parameter off for good."""
    made, target = network(**SWITCHES[name]), normal(3, 3, 2, 3, seed=5)
    optimizer = torch.optim.SGD(made.parameters(), 0.5)
    for _ in range(4):
        optimizer.zero_grad()
        (made(*inputs()).value - target).square().mean().backward()
        optimizer.step()
    assert [key for key, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- attention ----


@pytest.mark.parametrize("mixer", MIXERS)
def test_rotated_attention_depends_on_differences_of_places_alone(mixer: str) -> None:
    q, k, v = normal(3, 2, 2, 12, 8, dtype=torch.float64)
    places = places_2d(3, 4).double()
    base = MIXERS[mixer](q, k, v, rotation(places, 8), None)  # pyright: ignore[reportArgumentType]
    shift = torch.tensor([5.0, -7.0], dtype=torch.float64)
    moved = MIXERS[mixer](q, k, v, rotation(places + shift, 8), None)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(moved, base, rtol=0, atol=1e-13)
    for other in (places * 2, places.flip(1), None):
        turn = None if other is None else rotation(other, 8)
        assert (MIXERS[mixer](q, k, v, turn, None) - base).abs().max() > 1e-2  # pyright: ignore[reportArgumentType]


def test_logits_of_rotated_queries_and_keys_are_a_function_of_the_difference() -> None:
    """(R_m q) . (R_n k) = q . (R_(n - m) k), for all pairs of places."""
    q, k = normal(2, 1, 1, 1, 8, dtype=torch.float64)
    places = places_2d(4, 4).double()
    logits = (
        rotated(q.expand(1, 1, 16, 8), rotation(places, 8)) @ rotated(k.expand(1, 1, 16, 8), rotation(places, 8)).mT
    )[0, 0]
    differences = (places[None] - places[:, None]).flatten(0, 1)
    expected = rotated(k.expand(1, 1, 256, 8), rotation(differences, 8))[0, 0] @ q.flatten()
    torch.testing.assert_close(logits.flatten(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("turned", [False, True])
def test_linear_attention_is_its_quadratic_form(turned: bool) -> None:
    q, k, v = normal(3, 2, 2, 9, 8, dtype=torch.float64)
    turn = rotation(places_2d(3, 3).double(), 8) if turned else None
    phi_q, phi_k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    weights = phi_q @ phi_k.mT
    above = weights if turn is None else rotated(phi_q, turn) @ rotated(phi_k, turn).mT
    expected = (above / weights.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(linear_attention(q, k, v, turn, None), expected, rtol=0, atol=1e-12)


def test_the_scale_of_logits_follows_the_number_of_tokens() -> None:
    assert logit_scale("fixed", 16, 8, 8) is None
    assert logit_scale("tokens", TOKENS, 16, 16) == 1 / 4
    assert logit_scale("tokens", TOKENS**2, 8, 8) == pytest.approx(math.sqrt(2 / 8))
    q, k, v = normal(3, 2, 2, 16, 8, dtype=torch.float64)
    expected = ((q @ k.mT * math.sqrt(0.5 / 8)).softmax(-1)) @ v
    got = softmax_attention(q, k, v, None, logit_scale("tokens", 16, 8, 8))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_linear_attention_neither_overflows_nor_divides_by_0() -> None:
    x = normal(1000) * 5
    torch.testing.assert_close(phi(x), F.elu(x) + 1, rtol=1e-6, atol=1e-6)
    low, v = torch.full((1, 1, 3, 8), -30.0), normal(1, 1, 3, 8)  # which elu(x) + 1 makes 0
    torch.testing.assert_close(linear_attention(low, low, v, None, None), v.mean(2, keepdim=True).expand_as(v))
    q, k, v = 6 * normal(3, 1, 1, 4096, 8)
    expected = linear_attention(q.double(), k.double(), v.double(), None, None)
    got = linear_attention(q.half(), k.half(), v.half(), None, None)
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("conditioning", ["adaln", "tokens"])
def test_tokens_are_rotated_by_row_and_column_and_those_in_front_are_not(conditioning: str) -> None:
    made = network(positions="rope", conditioning=conditioning, width=32)  # 2x3 tokens, 8 pairs of channels a head
    assert made.turn is not None
    assert not made.positions.any()
    front, patches = made.turn[:, : made.front], made.turn[:, made.front :].unflatten(1, (2, 3))
    assert torch.equal(front, torch.tensor([1.0, 0.0])[:, None, None].expand_as(front))
    rows, columns = patches.split(4, dim=-1)
    for row in range(2):
        expected = torch.tensor([math.cos(row), math.sin(row)])[:, None].expand(2, 3)
        torch.testing.assert_close(rows[:, row, :, 0], expected, rtol=0, atol=1e-6)
    for column in range(3):
        expected = torch.tensor([math.cos(column), math.sin(column)])[:, None].expand(2, 2)
        torch.testing.assert_close(columns[:, :, column, 0], expected, rtol=0, atol=1e-6)


# ---- all that networks are used for ----


@every_switch
def test_a_further_number_enters_by_an_embedding_that_starts_at_0(name: str) -> None:
    """So that the weights of a network without it begin where they were."""
    plain, made = randomised(network(**SWITCHES[name])), network(("span",), **SWITCHES[name])
    made.load_state_dict(made.state_dict() | plain.state_dict())
    spans = [{"span": torch.full((3,), value)} for value in (0.2, 0.7)]
    with torch.no_grad():
        for more in spans:
            assert torch.equal(made(*inputs(), more=more).value, plain(*inputs()).value)
        randomised(made.more, std=0.3)
        a, b = (made(*inputs(), more=more).value for more in spans)
    assert (a - b).abs().max() > 1e-3


@every_switch
def test_the_derivative_by_state_and_time_is_that_of_finite_differences(name: str) -> None:
    """What objectives of jumps take of the network; `span` has weights here, too."""
    made = randomised(network(("span",), **SWITCHES[name], time_scale=1.0), std=0.2).double()
    check_derivative(made, *inputs(torch.float64))


@every_switch
def test_conditions_of_all_times_are_those_of_each(name: str) -> None:
    made = randomised(network(("span",), **SWITCHES[name]), std=0.2)
    angles, spans = torch.tensor([0.1, 0.9]), torch.tensor([0.0, 0.4])
    x, _, labels = inputs()
    together = made.conditions(angles, labels, {"span": spans})
    assert together.shape == (2, 3, TIME_TOKENS + CLASS_TOKENS, 16)[: 4 if made.front else 2] + (
        () if made.front else (16,)
    )
    for i in range(2):
        alone = made(x, angles[i].expand(3), labels, more={"span": spans[i].expand(3)})
        for found, expected in zip(made(x, condition=together[i]), alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _loss_and_gradients(made: DiT, context: Context | None, autocast: bool) -> list[Tensor]:
    made.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = made(*inputs(), context)
    out.value.float().square().sum().backward()
    return [out.value.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)]


@every_switch
def test_recomputing_activations_changes_no_bit(name: str) -> None:
    made, context = randomised(network(**SWITCHES[name], dropout=0.3), std=0.2), Context(0, 0, torch.arange(3))
    for autocast in (False, True):
        plain = _loss_and_gradients(made, context, autocast)
        checkpoint_activations(made)
        again = _loss_and_gradients(made, context, autocast)
        assert len(plain) == 1 + len(names(made))
        assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@every_switch
def test_under_autocast_what_flows_from_block_to_block_is_float32(name: str) -> None:
    made, seen = randomised(network(**SWITCHES[name]), std=0.2), list[torch.dtype]()
    for block in made.blocks:
        block.register_forward_hook(lambda _module, given, out: seen.extend([given[0].dtype, out.dtype]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = made(*inputs()).value
    assert {*seen} == {torch.float32}
    torch.testing.assert_close(half.float(), made(*inputs()).value.detach(), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ["none", "tokens, dyt, swiglu, both", "rotated linear"])
def test_the_network_compiles_as_one_graph(name: str) -> None:
    made, graphs = randomised(network(**SWITCHES[name]), std=0.2), list[object]()
    expected = made(*inputs()).value
    made.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    assert torch.equal(made(*inputs()).value, expected)
    assert len(graphs) == 1


@every_switch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_give_nearly_the_same(name: str, dtype: torch.dtype) -> None:
    made = randomised(network(**SWITCHES[name]), std=0.2)
    expected = made(*inputs()).value.detach()
    got = made.to(dtype)(*inputs()).value
    assert got.dtype == dtype
    torch.testing.assert_close(got.float().detach(), expected, rtol=0, atol=0.15)


@every_switch
def test_muon_has_the_hidden_matrices_of_attention_and_mlp(name: str) -> None:
    made = network(**SWITCHES[name])
    mlp = ("mlp.up", "mlp.down") if made.config.mlp == "swiglu" else ("mlp.0", "mlp.2")
    layers = ("attention.qkv", "attention.out", *mlp)
    found = {key for key, p in made.named_parameters() if is_hidden_matrix(f"network.{key}", p)}
    assert found == {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in layers}


@pytest.mark.parametrize("other", ["attention.out", "mlp.2"])
def test_dropout_acts_on_both_branches_of_blocks_without_modulation(other: str) -> None:
    """The expectation over masks is the output without, as of blocks with one; the other branch is 0."""
    torch.manual_seed(0)
    block = randomised(Block(replace(TINY, dropout=0.4, conditioning="tokens"), layer=0), std=0.3).requires_grad_(False)
    for parameter in block.get_submodule(other).parameters():
        torch.nn.init.zeros_(parameter)
    x, context = normal(1, 5, 16).expand(4000, -1, -1), Context(0, 0, torch.arange(4000))
    got, plain = block(x, torch.empty(0), context), block(x, torch.empty(0))[0]
    error = got.std(0) / math.sqrt(4000)
    assert error.min() > 0
    assert ((got.mean(0) - plain).abs() < 5 * error).all()


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"positions": "rope", "width": 20, "heads": 2}, "a head has 10 channels, not a multiple of 4"),
        ({"mixer": "linear", "attention_scale": "tokens"}, "linear attention has no logits"),
    ],
)
def test_switches_that_exclude_each_other_raise_an_error(switches: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DiTConfig(**switches)
