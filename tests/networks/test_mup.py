"""muP: at the base width nothing changes; at others activations move as much in the first steps, whatever the width is."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit import DiT
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.mixers import logit_scale
from midway.gen.networks.presets import MODERN
from midway.gen.training.config import TrainConfig
from midway.gen.training.optim import make_optimizers, set_rate

BASE = DiTConfig(width=64, depth=2, heads=4, qk_norm=False)
WIDTHS = (64, 128, 256, 512)
KINDS: dict[str, dict[str, Any]] = {
    "dit2023": {},
    "modern": MODERN,
    "tokens": {"conditioning": "tokens", "mlp": "swiglu"},
}
LAYERS = (
    "embed",
    "time",
    "blocks.0",
    "blocks.1.attention.qkv",
    "blocks.1.attention",
    "blocks.1.mlp",
    "blocks.1",
    "head",
)


def model_of(width: int, base: int, kind: str = "dit2023", seed: int = 0) -> LatentModel:
    """A model of latents (4, 4, 4) and 10 classes."""
    torch.manual_seed(seed)
    dit = replace(BASE, width=width, mup_base_width=base, **KINDS[kind])
    return LatentModel(LatentModelConfig(dit=dit), (4, 4, 4), 10)


def layers_of(model: LatentModel, x: Tensor, t: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Outputs of every kind of layer, and attention's logits."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            found[name] = output.detach().clone()  # blocks go on in its memory

        return hook

    network = model.network
    assert isinstance(network, DiT)
    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in LAYERS]
    with torch.no_grad():
        model.forward_network(x, t, labels)
    for hook in hooks:
        hook.remove()
    attention = network.get_submodule("blocks.1.attention")
    qkv = found.pop("blocks.1.attention.qkv")
    heads, channels = BASE.heads, qkv.shape[-1] // 3 // BASE.heads
    q, k, _ = qkv.unflatten(-1, (3, heads, channels)).permute(2, 0, 3, 1, 4)
    if attention.norm_q is not None:
        q, k = attention.norm_q(q), attention.norm_k(k)  # pyright: ignore
    scale = logit_scale("fixed", 16, channels, network.config.head_channels) or 1 / math.sqrt(channels)
    found["logits"] = scale * q @ k.transpose(-2, -1)
    return found


def moved(width: int, base: int, kind: str, optimizer: Literal["adamw", "muon"], seed: int) -> dict[str, float]:
    """Root mean square by which layers' outputs moved in the first steps at one learning rate."""
    model = model_of(width, base, kind, seed)
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, 16, 4, 4, 4, generator=generator)
    t, labels = torch.rand(16, generator=generator), torch.arange(16) % 10
    with torch.no_grad():  # past the zeros that blocks begin with, at the size that learning gives them
        for name, p in model.named_parameters():
            if not p.any() and p.dim() == 2:
                p.normal_(std=0.3 / p.shape[1] ** 0.5 if name != "network.head.weight" else 0.3 / p.shape[1])
    before = layers_of(model, x, t, labels)
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer), torch.device("cpu"))
    set_rate(optimizers, 4e-3)
    for _ in range(12):
        (model.forward_network(x, t, labels)[0] - target).square().mean().backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    after = layers_of(model, x, t, labels)
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in after}


def slopes(base: int, kind: str, optimizer: Literal["adamw", "muon"], seeds: int = 3) -> dict[str, float]:
    """Of log movement against log width, by least squares, mean over seeds."""
    x = torch.tensor(WIDTHS).double().log()
    x = x - x.mean()
    found = [[moved(width, base, kind, optimizer, seed) for width in WIDTHS] for seed in range(seeds)]

    def slope(name: str) -> float:
        y = torch.tensor([[each[name] for each in of_seed] for of_seed in found]).double().log().mean(0)
        return float((x * y).sum() / x.square().sum())

    return {name: slope(name) for name in found[0][0]}


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("dit2023", "adamw"),
        *(
            pytest.param(k, o, marks=pytest.mark.slow)
            for k in KINDS
            for o in ("adamw", "muon")
            if (k, o) != ("dit2023", "adamw")
        ),
    ],
)
def test_layers_move_as_much_at_every_width(kind: str, optimizer: Literal["adamw", "muon"]) -> None:
    """The coordinate check, over widths 64 to 512. Logits are sums over the channels of a head of products which are independent
    at first, so that their part without a common sign falls with the root of the width; they must not grow."""
    found = slopes(BASE.width, kind, optimizer, seeds=1 if (kind, optimizer) == ("dit2023", "adamw") else 3)
    logits = found.pop("logits")
    assert max(abs(slope) for slope in found.values()) < 0.1, found
    assert -0.7 < logits < 0.1


@pytest.mark.slow
def test_without_it_they_do_not() -> None:
    assert slopes(0, "dit2023", "adamw")["blocks.1"] > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_base_width_nothing_changes(kind: str) -> None:
    own, with_mup = model_of(64, 0, kind), model_of(64, 64, kind)
    states = own.state_dict(), with_mup.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {with_mup.rate_of(name) for name, _ in with_mup.named_parameters()} == {1.0}
    x, t, labels = torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 3])
    for model in (own, with_mup):
        model.network.head.weight.data.fill_(0.1)  # pyright: ignore
    assert torch.equal(own.forward_network(x, t, labels)[0], with_mup.forward_network(x, t, labels)[0])


def test_what_every_parameter_gets() -> None:
    """Four times as wide: a quarter of the rate where inputs grow, the rate itself elsewhere."""
    for kind in KINDS:
        model = model_of(256, 64, kind)
        rates = {name: model.rate_of(name) for name, _ in model.named_parameters()}
        slow = {name for name, rate in rates.items() if rate == 0.25}
        assert set(rates.values()) == {1.0, 0.25}
        expected = {
            name
            for name, p in model.named_parameters()
            if p.dim() == 2
            and p.shape[1] >= 256
            and name not in ("network.label.weight", "network.prefix", "network.time.0.weight")
        }
        assert slow == expected, kind
        assert {"network.head.weight", "network.time.2.weight", "network.blocks.0.attention.qkv.weight"} <= slow
        assert "network.embed.weight" not in slow


def test_the_start_of_embeddings_is_that_of_the_base_and_of_hidden_layers_falls() -> None:
    base, wide = (model_of(width, 64).network for width in (64, 1024))
    spread = {
        name: (wide.get_parameter(name).std() / base.get_parameter(name).std()).item()
        for name, _ in base.named_parameters()
        if "weight" in name
    }
    for name in ("embed.weight", "time.0.weight", "label.weight"):
        assert spread[name] == pytest.approx(1, abs=0.1), name
    for name in ("time.2.weight", "blocks.0.attention.qkv.weight", "blocks.1.mlp.0.weight"):
        assert spread[name] == pytest.approx(0.25, abs=0.02), name


def test_logits_are_divided_by_the_channels_of_a_head() -> None:
    """By their root at the base; heads of the base's channels keep it."""
    assert logit_scale("fixed", 16, 64, 16) == pytest.approx(1 / 4 * 16 / 64)
    assert logit_scale("tokens", 256, 64, 16) == pytest.approx(1 / 4 * 16 / 64)
    assert DiTConfig(width=256, heads=4, mup_base_width=64).head_channels == 16
    more_heads = DiTConfig(width=256, heads=16, mup_base_width=64, mup_base_heads=4)
    assert logit_scale("fixed", 16, 16, more_heads.head_channels) is None


def test_optimizers_have_the_rates_and_one_decay() -> None:
    """Muon's matrices by the root of the factor; what is subtracted from a weight in a step does not depend on the width."""
    model = model_of(256, 64)
    adamw, muon = make_optimizers(model, TrainConfig(optimizer="muon", weight_decay=0.1), torch.device("cpu"))
    set_rate([adamw, muon], 0.01)
    assert {group["lr"] for group in adamw.param_groups} == {0.01, 0.0025}
    assert {group["lr"] for group in muon.param_groups} == {0.005}
    for group in (*adamw.param_groups, *muon.param_groups):
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.001)


def test_impossible_bases_are_errors() -> None:
    with pytest.raises(ValueError, match="mup_base_width 66 must be divisible"):
        DiTConfig(width=64, heads=4, mup_base_width=66)
    with pytest.raises(ValueError, match="no effect without mup_base_width"):
        DiTConfig(mup_base_heads=4)
