"""The convolutional pair: its default architecture, what it starts as, its options, and that they change nothing else."""

import itertools
from typing import Any, cast

import pytest
import torch
from networks import OPTIONS, UPSAMPLES, conv_pair
from tensors import gradients, normal, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from midway.tokenizers.attention import AttentionBlock, SelfAttention
from midway.tokenizers.networks import (
    Decoder,
    Encoder,
    ResidualBlock,
    Upsample,
    activation,
    doubling,
    halving,
    transposed,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# The default architecture ---------------------------------------------------------------------------------------------

RESIZED = {"nearest": 3, "bilinear": 3, "pixel_shuffle": 2}
"""Where the convolution is within a doubling."""


@pytest.mark.parametrize("upsample", RESIZED)
def test_names_and_shapes_of_the_default_networks_are_those_of_trained_artefacts(upsample: Upsample) -> None:
    blocks = [f"layers.{i}.branch.{j}" for i in (1, 2) for j in (0, 2, 3, 5)]
    doublings = [f"layers.{i}.{j}" for i in (3, 4) for j in (0, RESIZED[upsample])]
    encoder = ["shortcut", "layers.0", *blocks, "layers.3", "layers.5"]
    decoder = ["shortcut.0", "layers.0", *blocks, *doublings, "layers.5", "layers.7"]
    for network, names in ((Encoder(3, 16, 4, 2, 5), encoder), (Decoder(5, 16, 4, 2, 3, upsample), decoder)):
        assert list(network.state_dict()) == [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    shapes = {name: tuple(value.shape) for name, value in Decoder(5, 16, 4, 2, 3, upsample).state_dict().items()}
    expanded = 32 if upsample == "pixel_shuffle" else 8
    assert shapes[f"layers.3.{RESIZED[upsample]}.weight"] == (expanded, 16, 3, 3)
    assert shapes[f"layers.4.{RESIZED[upsample]}.weight"] == (expanded, 8, 3, 3)
    assert (shapes["layers.7.weight"], shapes["shortcut.0.weight"]) == ((3, 8, 3, 3), (48, 5, 1, 1))


@pytest.mark.parametrize("upsample", RESIZED)
def test_a_seed_draws_what_it_always_drew(upsample: Upsample) -> None:
    """Layer by layer in the order of construction: the last convolution, the shortcut, the others, a block's second first."""
    torch.manual_seed(3)
    encoder, decoder = Encoder(1, 16, 2, 1, 5), Decoder(5, 16, 2, 1, 1, upsample)
    after = torch.rand(4)
    torch.manual_seed(3)
    expected: dict[str, Tensor] = {}
    expanded = 32 if upsample == "pixel_shuffle" else 8
    body = [("layers.1.branch.5", 16, 16, 3), ("layers.1.branch.2", 16, 16, 3)]
    doubled = (f"layers.2.{RESIZED[upsample]}", 16, expanded, 3)
    orders = {
        "encoder": [("layers.4", 16, 5, 3), ("shortcut", 4, 5, 1), ("layers.0", 4, 16, 3), *body],
        "decoder": [("layers.5", 8, 1, 3), ("shortcut.0", 5, 4, 1), ("layers.0", 5, 16, 3), *body, doubled],
    }
    for network, order in orders.items():
        for name, ins, outs, kernel in order:
            weight = nn.Conv2d(ins, outs, kernel).weight.detach()
            if kernel == 1:
                nn.init.orthogonal_(weight)
            if outs == 32:
                weight = weight[::4].repeat_interleave(4, 0)
            zero = name in ("layers.4", "layers.5", "layers.1.branch.5")
            expected[f"{network}.{name}.weight"] = 0 * weight if zero else weight
    assert torch.equal(torch.rand(4), after)
    for prefix, network in (("encoder", encoder), ("decoder", decoder)):
        for name, value in network.state_dict().items():
            default = torch.ones_like(value) if value.ndim == 1 and "weight" in name else torch.zeros_like(value)
            assert torch.equal(value, expected.get(f"{prefix}.{name}", default)), name


@pytest.mark.parametrize("upsample", RESIZED)
def test_the_default_networks_compute_what_they_always_computed(upsample: Upsample) -> None:
    """Bit for bit, written down with functions."""
    encoder, decoder = randomised(Encoder(3, 16, 2, 1, 5)), randomised(Decoder(5, 16, 2, 1, 3, upsample))

    def conv3(state: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def active(state: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
        return F.silu(F.group_norm(x, 8, state[f"{name}.weight"], state[f"{name}.bias"]))

    def block(state: dict[str, Tensor], x: Tensor) -> Tensor:
        inner = conv3(state, active(state, x, "layers.1.branch.0"), "layers.1.branch.2")
        return x + conv3(state, active(state, inner, "layers.1.branch.3"), "layers.1.branch.5")

    images = normal(2, 3, 8, 8)
    with torch.no_grad():
        state = encoder.state_dict()
        pixels = F.pixel_unshuffle(images, 2)
        z = F.conv2d(pixels, state["shortcut.weight"], state["shortcut.bias"])
        body = block(state, conv3(state, pixels, "layers.0"))
        z = z + conv3(state, active(state, body, "layers.2"), "layers.4")
        assert torch.equal(encoder(images), z)
        state, name = decoder.state_dict(), f"layers.2.{RESIZED[upsample]}"
        out = active(state, block(state, conv3(state, z, "layers.0")), "layers.2.0")
        if upsample == "pixel_shuffle":
            out = F.pixel_shuffle(conv3(state, out, name), 2)
        else:
            out = conv3(state, F.interpolate(out, scale_factor=2, mode=upsample), name)
        around = F.conv2d(z, state["shortcut.0.weight"], state["shortcut.0.bias"])
        out = F.pixel_shuffle(around, 2) + conv3(state, active(state, out, "layers.3"), "layers.5")
        assert torch.equal(decoder(z), out)


# Shapes and starts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("upsample", UPSAMPLES)
def test_every_size_channel_count_and_factor(channels: int, upsample: Upsample) -> None:
    for factor, size in itertools.product([1, 2, 4, 8, 16, 32], [8, 32, 64]):
        if size < factor:
            continue
        multipliers = (1, 2) if factor > 2 else (1,)
        encoder = Encoder(channels, 8, factor, 1, 4, attention=size // factor <= 16, multipliers=multipliers)
        decoder = Decoder(4, 8, factor, 1, channels, upsample, size // factor <= 16, multipliers)
        with torch.no_grad():
            z = encoder(normal(1, channels, size, size))
            assert z.shape == (1, 4, size // factor, size // factor)
            assert decoder(z).shape == (1, channels, size, size)


@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_pair_starts_as_its_shortcuts(options: str, upsample: Upsample) -> None:
    network = conv_pair(upsample, **OPTIONS[options])
    encoder, decoder = network.encoder, network.decoder
    images = normal(2, 3, 16, 16)
    z = encoder(images)
    assert torch.equal(z, encoder.shortcut(F.pixel_unshuffle(images, 4)))
    assert torch.equal(decoder(z), decoder.shortcut(z))


def test_attention_and_residual_blocks_start_as_the_identity() -> None:
    x = normal(2, 16, 5, 7)
    for block in (AttentionBlock(16), ResidualBlock(16)):
        assert torch.equal(block(x), x)


def middle_of_constant(decoder: Decoder, codes: int = 16, factor: int = 4) -> Tensor:
    """What the layers make of one code everywhere, but for a border of 6 codes; the last layer is as torch draws it."""
    cast(nn.Conv2d, decoder.layers[-1]).reset_parameters()
    with torch.no_grad():
        out = decoder.layers(normal(1, 4, 1, 1).expand(-1, -1, codes, codes))
    border = 6 * factor
    return out[..., border:-border, border:-border]


@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("options", OPTIONS)
def test_there_is_no_checkerboard_at_the_start(options: str, upsample: Upsample) -> None:
    middle = middle_of_constant(conv_pair(upsample, **OPTIONS[options]).decoder)
    assert middle.shape[-1] == 16
    assert middle.abs().max() > 0.01
    assert (middle - middle[..., :1, :1]).abs().max() < 1e-5


@pytest.mark.parametrize("upsample", UPSAMPLES)
def test_after_training_only_resizing_is_free_of_it(upsample: Upsample) -> None:
    middle = middle_of_constant(randomised(conv_pair(upsample).decoder))
    free = (middle - middle[..., :1, :1]).abs().max() < 1e-5
    assert free == (upsample in ("nearest", "bilinear"))


def test_a_transposed_convolution_starts_as_a_linear_map_and_nearest_neighbour() -> None:
    layer, x = transposed(6, 3).double(), normal(2, 6, 5, 4).double()
    expected = (
        torch.einsum("bihw,io->bohw", x, layer.weight[:, :, 1, 1]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    torch.manual_seed(0)
    spread = transposed(64, 200).weight[:, :, 1:3, 1:3]
    assert spread.abs().max() <= 1 / 8
    assert spread.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)


def test_a_transposed_convolution_is_the_adjoint_of_a_halving() -> None:
    *_, down = halving(3, 5).double().children()
    up = transposed(5, 3).double()
    with torch.no_grad():
        up.weight.copy_(cast(Tensor, down.weight))
    x, y = normal(1, 3, 8, 6).double(), normal(1, 5, 4, 3).double()
    assert (down(x) * y).sum().item() == pytest.approx((x * up(y)).sum().item(), abs=1e-12)


@pytest.mark.parametrize("upsample", UPSAMPLES)
def test_a_doubling_is_normalised_and_activated_before_it_grows(upsample: Upsample) -> None:
    layer = doubling(16, 8, upsample)
    assert isinstance(layer, nn.Sequential)
    assert [type(module) for module in layer[:2]] == [type(module) for module in activation(16)]
    assert layer(normal(1, 16, 3, 5)).shape == (1, 8, 6, 10)


# Options --------------------------------------------------------------------------------------------------------------


def test_attention_is_softmax_attention_of_normalised_heads() -> None:
    layer = randomised(SelfAttention(8, 2))
    x = normal(2, 5, 8)
    w, state = x.double(), {name: value.double() for name, value in layer.state_dict().items()}
    q, k, v = (w @ state["qkv.weight"].T + state["qkv.bias"]).split(8, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        a, b = (y[..., head] / (y[..., head].square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        logits = torch.einsum("bnd,bmd->bnm", a * state["scale"], b) / 2
        heads.append(logits.softmax(-1) @ v[..., head])
    expected = torch.cat(heads, -1) @ state["out.weight"].T + state["out.bias"]
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_an_attention_block_adds_attention_over_all_positions() -> None:
    block = randomised(AttentionBlock(16))
    x = normal(2, 16, 3, 5)
    rows = F.group_norm(x, 8, block.norm.weight, block.norm.bias).permute(0, 2, 3, 1).reshape(2, 15, 16)
    expected = x + block.attention(rows).reshape(2, 3, 5, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), expected)
    x.requires_grad_()
    (reached,) = torch.autograd.grad(block(x)[0, :, 2, 4].sum(), x)
    assert reached[0].abs().amax(0).min() > 0
    assert reached[1].abs().max() == 0


@pytest.mark.parametrize(("width", "heads"), [(32, 1), (64, 1), (96, 1), (128, 2), (192, 3)])
def test_heads_have_64_channels_where_that_divides(width: int, heads: int) -> None:
    assert AttentionBlock(width).attention.heads == heads


def visited(network: nn.Module, x: Tensor) -> list[tuple[str, int, int]]:
    """(class, channels, side) of all blocks of `network` in the order in which they run."""
    seen: list[tuple[str, int, int]] = []
    for module in network.modules():
        if isinstance(module, ResidualBlock | AttentionBlock):
            module.register_forward_pre_hook(
                lambda module, given: seen.append((type(module).__name__, given[0].shape[1], given[0].shape[3]))
            )
    with torch.no_grad():
        network(x)
    return seen


def test_where_blocks_run() -> None:
    network = conv_pair(factor=8, width=8, blocks=3, attention=True, multipliers=(1, 2, 3))
    fine, middle = [("ResidualBlock", 8, 16)] * 3, [("ResidualBlock", 16, 8)] * 3
    lowest = [("ResidualBlock", 24, 4)] * 2 + [("AttentionBlock", 24, 4), ("ResidualBlock", 24, 4)]
    assert visited(network.encoder, normal(1, 3, 32, 32)) == [*fine, *middle, *lowest]
    assert visited(network.decoder, normal(1, 4, 4, 4)) == [*lowest, *middle, *fine]
    assert visited(conv_pair(factor=8, width=8, blocks=3), normal(1, 3, 32, 32)) == [("ResidualBlock", 8, 4)] * 6


def test_the_decoder_ends_light() -> None:
    decoder = Decoder(4, 32, 16, 1, 3, "nearest", multipliers=(1, 2))
    widths = [layer.out_channels for layer in decoder.modules() if isinstance(layer, nn.Conv2d)]
    assert widths == [3 * 256, 64, 64, 64, 32, 32, 32, 16, 8, 8, 3]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_first_step_wakes_what_starts_at_zero(options: str) -> None:
    """Zero layers get a gradient at once, or nothing behind them ever would."""
    network = conv_pair(**OPTIONS[options])
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        (network(normal(2, 3, 16, 16, seed=step)) - 1).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("upsample", UPSAMPLES)
def test_channels_last_gives_the_same_and_stays(upsample: Upsample) -> None:
    network = randomised(conv_pair(upsample, **OPTIONS["both"]))
    x = normal(2, 3, 16, 16)
    expected = gradients(network, x)
    network = network.to(memory_format=torch.channels_last)
    kept: list[bool] = []
    for module in network.modules():
        if isinstance(module, ResidualBlock | AttentionBlock | nn.ConvTranspose2d):
            module.register_forward_hook(
                lambda _, given, out: kept.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    for a, b in zip(gradients(network, x.to(memory_format=torch.channels_last)), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert kept
    assert all(kept)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 3}, "power of two"),
        ({"upsample": "lanczos"}, "transposed"),
        ({"multipliers": ()}, "give 1 to 3"),
        ({"multipliers": (1, 1, 2, 2)}, "give 1 to 3"),
        ({"multipliers": (1, 0)}, "at least 1"),
        ({"width": 0}, "width 0"),
    ],
)
def test_unusable_settings_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_pair(**arguments)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_must_divide_the_width(heads: int) -> None:
    with pytest.raises(ValueError, match="divisor"):
        SelfAttention(8, heads)
