"""Adapters: their first output is the network's own, merged weights compute the same, and how LoRA-GA begins."""

import copy
from dataclasses import replace

import pytest
import torch
from tensors import grad, normal
from torch import nn

from midway.gen.core.errors import UsageError
from midway.gen.networks.adapters import AdapterConfig, LabelRows, LowRank, adapt, layers_of
from midway.gen.networks.dit import DiT
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.network import Network
from midway.gen.networks.presets import MODERN
from midway.gen.networks.unet import UNet, UNetConfig
from midway.gen.training.optim import is_hidden_matrix

DIT = DiTConfig(width=32, depth=2, heads=2)
CONFIGS = {
    "dit": DIT,
    "modern": replace(DIT, **MODERN),
    "tokens": replace(DIT, conditioning="tokens", mixer="linear"),
    "unet": UNetConfig(widths=(8, 16)),
}
ADAPTERS = {"zero": AdapterConfig(rank=4, alpha=6.0), "gradient": AdapterConfig(rank=4, alpha=6.0, start="gradient")}
LAYERS = {"dit": 8, "modern": 8, "tokens": 8, "unet": 16}


def network_of(kind: str) -> Network:
    """With random weights everywhere, so that nothing starts as the identity."""
    torch.manual_seed(0)
    config = CONFIGS[kind]
    made = DiT(config, 3, 4, 4, 5) if isinstance(config, DiTConfig) else UNet(config, 3, 4, 4, 5)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.requires_grad_(False)  # torch may choose other kernels for weights that train


def output(network: Network) -> torch.Tensor:
    inputs = normal(6, 3, 4, 4), torch.linspace(0.1, 0.9, 6), torch.arange(6) % 5
    return torch.cat([each.flatten() for each in network(*inputs)])


def started(network: Network) -> None:
    """From the gradient of some loss, where adapters start so."""
    layers = [layer for layer in layers_of(network).values() if layer.from_gradient]
    weights = [layer.base.weight.requires_grad_() for layer in layers]
    if weights:
        with torch.enable_grad():
            gradients = torch.autograd.grad(output(network).square().mean(), weights)
        for layer, found in zip(layers, gradients, strict=True):
            layer.base.weight.requires_grad_(False)
            layer.start(found)


@torch.no_grad()
@pytest.mark.parametrize("start", ADAPTERS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_first_output_is_the_networks_own_and_merged_weights_compute_the_same(kind: str, start: str) -> None:
    """Bit for bit at the start; after steps of A and B up to rounding."""
    network = network_of(kind)
    merged, before = copy.deepcopy(network), output(network)
    adapt(network, ADAPTERS[start])
    started(network)
    assert len(layers_of(network)) == LAYERS[kind]
    assert torch.equal(output(network), before)
    for layer in layers_of(network).values():
        layer.lora_A.weight.add_(0.1 * normal(*layer.lora_A.weight.shape, seed=1))
        layer.lora_B.weight.add_(0.1 * normal(*layer.lora_B.weight.shape, seed=2))
    after = output(network)
    assert (after - before).abs().max() > 1e-3
    for name, layer in layers_of(network).items():
        merged.get_submodule(name).weight.data = layer.weight.detach()  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(output(merged), after, rtol=1e-6, atol=1e-6 * float(after.abs().max()))


def test_the_first_step_from_a_gradient_is_its_best_approximation_of_twice_the_rank() -> None:
    """dB A_0 + B_0 dA = scale c^2 (U S V^T)_1..2r, for the gradients dA and dB of <G, W>: arXiv 2407.05000, section 3.2."""
    layer = LowRank(nn.Linear(10, 16), AdapterConfig(rank=3, alpha=6.0, start="gradient"), "layer")
    direction = normal(16, 10)
    layer.start(direction)
    a, b = layer.lora_A.weight.detach().clone(), layer.lora_B.weight.detach().clone()
    (layer(torch.eye(10)).T * direction).sum().backward()
    step = grad(layer.lora_B.weight) @ a + b @ grad(layer.lora_A.weight)
    left, values, right = torch.linalg.svd(direction, full_matrices=False)
    size = 16**0.5 / 16.0
    torch.testing.assert_close(step, 2 * size * left[:, :6] * values[:6] @ right[:6], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a @ a.T, size * torch.eye(3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.T @ b, size * torch.eye(3), rtol=1e-5, atol=1e-5)


def test_new_classes_begin_as_no_class_and_known_ones_as_they_are() -> None:
    base = nn.Embedding(4, 8)
    table = LabelRows(base, (2, None, 0, None))
    assert torch.equal(table(torch.arange(5)), base.weight[torch.tensor([2, 3, 0, 3, 3])])
    table(torch.arange(5)).square().sum().backward()
    assert [name for name, p in table.named_parameters() if p.requires_grad] == ["new"]
    torch.testing.assert_close(grad(table.new), 2 * table.new.detach())


def test_muon_does_not_take_the_matrices_of_adapters() -> None:
    network = network_of("dit")
    assert any(is_hidden_matrix(name, p) for name, p in network.named_parameters())
    adapt(network, ADAPTERS["zero"])
    assert not any(
        is_hidden_matrix(name, p) for name, p in network.named_parameters() if p.requires_grad and "lora" in name
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AdapterConfig(targets=("attention.qvk",)), "no layer has a name that ends with attention.qvk: there are"),
        (AdapterConfig(rank=33), "rank 33 of blocks.0.attention.qkv, which is 96 x 32: at most 32"),
        (AdapterConfig(rank=17, start="gradient"), "at most 16, since it takes 2 r singular vectors"),
    ],
)
def test_targets_and_ranks_that_a_network_has_not_are_errors(config: AdapterConfig, words: str) -> None:
    network = network_of("dit")
    with pytest.raises(ValueError, match=words):
        adapt(network, config)
    assert not layers_of(network)
    with pytest.raises(UsageError, match="rank is 0"):
        AdapterConfig(rank=0)
