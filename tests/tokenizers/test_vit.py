"""The transformer pair: where patches and tokens go, positions, reach of attention, and independence of how it is run."""

import math
from typing import Any

import pytest
import torch
from networks import vit_pair
from tensors import normal, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from midway.tokenizers.attention import TransformerBlock
from midway.tokenizers.vit import ViTConfig, ViTDecoder, ViTEncoder, positions_2d

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = [None, 1, 5]


# Layout ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size", "patch"), [(1, 8, 2), (3, 8, 8), (1, 32, 4), (3, 32, 8), (3, 64, 16)])
@pytest.mark.parametrize("tokens", MODES)
def test_shapes(tokens: int | None, channels: int, size: int, patch: int) -> None:
    sizes = ViTConfig(size, patch, 8, 1, 2, tokens)
    z = ViTEncoder(channels, sizes, 5)(normal(2, channels, size, size))
    assert z.shape == (2, 5, *((size // patch,) * 2 if tokens is None else (tokens,)))
    assert ViTDecoder(5, sizes, channels)(z).shape == (2, channels, size, size)


def test_without_blocks_a_code_is_that_of_its_own_patch() -> None:
    pair = vit_pair(None)
    pair.encoder.blocks, pair.decoder.blocks = nn.ModuleList(), nn.ModuleList()
    images = normal(1, 3, 12, 12).requires_grad_()
    z = pair.encoder(images)
    (pixels,) = torch.autograd.grad(z[0, :, 1, 2].square().sum(), images)
    reached = pixels[0].abs().amax(0) > 0
    assert reached[4:8, 8:12].all()
    assert reached.sum() == 16
    codes = normal(1, 6, 3, 3).requires_grad_()
    (used,) = torch.autograd.grad(pair.decoder(codes)[0, :, 4:8, 8:12].square().sum(), codes)
    assert (used[0].abs().amax(0) > 0).nonzero().tolist() == [[1, 2]]


def test_a_patch_is_read_and_written_in_the_same_order() -> None:
    """With inverse linear maps alone the pair is the identity, up to the norms, which these images do not change."""
    pair = vit_pair(None, width=48)
    pair.encoder.blocks, pair.decoder.blocks = nn.ModuleList(), nn.ModuleList()
    encoder, decoder = pair.encoder, pair.decoder
    encoder.head, decoder.embed = nn.Linear(48, 48), nn.Linear(48, 48)
    decoder.code_shape = (48, 3, 3)
    with torch.no_grad():
        for layer in (encoder.embed, encoder.head, decoder.embed, decoder.head):
            layer.weight.copy_(torch.eye(48))
            layer.bias.zero_()
        encoder.positions.zero_()
        decoder.positions.zero_()
        patches = F.normalize(normal(9, 48) - normal(9, 48).mean(1, keepdim=True), dim=1) * 48**0.5
        images = patches.view(3, 3, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(1, 3, 12, 12)
        torch.testing.assert_close(pair(images), images, atol=1e-4, rtol=1e-4)


def test_positions_are_sinusoids_of_row_and_column() -> None:
    positions = positions_2d(5, 12)
    assert positions.shape == (25, 12)
    for row, column in ((0, 0), (2, 3), (4, 1)):
        frequencies = [10000 ** (-i / 3) for i in range(3)]
        waves = [wave(f * x) for x in (row, column) for wave in (math.cos, math.sin) for f in frequencies]
        torch.testing.assert_close(positions[5 * row + column], torch.tensor(waves))
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1


def test_positions_are_no_part_of_an_artefact() -> None:
    assert not any("positions" in name for name in vit_pair(5).state_dict())


# What sees what -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", MODES)
def test_every_code_depends_on_every_pixel_and_every_pixel_on_every_code(tokens: int | None) -> None:
    pair = randomised(vit_pair(tokens))
    images = normal(1, 3, 12, 12).requires_grad_()
    z = pair.encoder(images)
    for code in z.flatten(2).unbind(2):
        (reached,) = torch.autograd.grad(code.square().sum(), images, retain_graph=True)
        assert reached.abs().min() > 0
    codes = z.detach().requires_grad_()
    for patch in F.pixel_unshuffle(pair.decoder(codes), 4).flatten(2).unbind(2):
        (used,) = torch.autograd.grad(patch.square().sum(), codes, retain_graph=True)
        assert used.abs().min() > 0


@pytest.mark.parametrize("tokens", MODES)
def test_images_of_a_batch_do_not_see_one_another(tokens: int | None) -> None:
    pair, images = randomised(vit_pair(tokens)), normal(3, 3, 12, 12)
    torch.testing.assert_close(pair(images)[1:2], pair(images[1:2]), atol=1e-5, rtol=1e-5)


def test_permuted_latent_tokens_give_permuted_codes() -> None:
    encoder, images, order = randomised(vit_pair(5).encoder), normal(2, 3, 12, 12), torch.tensor([3, 0, 4, 1, 2])
    before = encoder(images)
    assert (before.unsqueeze(3) - before.unsqueeze(2)).abs().amax((0, 1)).fill_diagonal_(1).min() > 1e-3
    with torch.no_grad():
        assert encoder.latents is not None
        encoder.latents.copy_(encoder.latents[order])
    torch.testing.assert_close(encoder(images), before[:, :, order], atol=1e-5, rtol=1e-5)


def test_the_order_of_codes_matters_because_each_has_a_position() -> None:
    decoder, codes, order = randomised(vit_pair(5).decoder), normal(2, 6, 5), torch.tensor([3, 0, 4, 1, 2])
    before = decoder(codes)
    assert (decoder(codes[:, :, order]) - before).abs().max() > 1e-3
    with torch.no_grad():
        assert decoder.latents is not None
        decoder.latents.copy_(decoder.latents[order])
    torch.testing.assert_close(decoder(codes[:, :, order]), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [None, 5])
def test_shifted_images_are_told_apart_by_position(tokens: int | None) -> None:
    """Attention alone would give permuted patches the same set of codes."""
    encoder, images = randomised(vit_pair(tokens).encoder), normal(1, 3, 12, 12)
    before, after = encoder(images).flatten(2), encoder(images.roll(4, 3)).flatten(2)
    assert torch.cdist(before[0].T, after[0].T).min() > 1e-3


def test_one_code_everywhere_still_gives_different_patches() -> None:
    patches = F.pixel_unshuffle(randomised(vit_pair(1).decoder)(normal(1, 6, 1)), 4).flatten(2)[0].T
    assert torch.cdist(patches, patches).fill_diagonal_(1).min() > 1e-3


# Arithmetic -----------------------------------------------------------------------------------------------------------


def test_a_block_adds_attention_and_then_an_mlp_of_what_was_normalised() -> None:
    block = randomised(TransformerBlock(8, 2)).double()
    x, state = normal(2, 5, 8).double(), block.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * state[f"{name}.weight"] + state[f"{name}.bias"]

    middle = x + block.attention(norm(x, "norm_1"))
    inner = norm(middle, "norm_2") @ state["mlp.0.weight"].T + state["mlp.0.bias"]
    gelu = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    expected = middle + gelu @ state["mlp.2.weight"].T + state["mlp.2.bias"]
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [None, 32])
def test_at_the_start_latents_have_about_unit_variance_and_images_are_near_grey(tokens: int | None) -> None:
    torch.manual_seed(0)
    sizes = ViTConfig(32, 4, 64, 2, 2, tokens)
    encoder, decoder = ViTEncoder(1, sizes, 16), ViTDecoder(16, sizes, 1)
    with torch.no_grad():
        z = encoder(2 * torch.rand(4, 1, 32, 32) - 1)
        assert 0.7 < z.square().mean().sqrt() < 1.3
        assert 0.05 < decoder(z).square().mean().sqrt() < 0.35


@pytest.mark.parametrize("tokens", [None, 5])
def test_positions_may_stay_in_float32_when_parameters_are_converted(tokens: int | None) -> None:
    """As `from_pretrained(torch_dtype=torch.bfloat16)` leaves them."""
    network, x = randomised(vit_pair(tokens)).to(torch.bfloat16), normal(2, 3, 12, 12).bfloat16()
    for half in (network.encoder, network.decoder):
        half.positions = positions_2d(3, 16)
    assert network(x).dtype == torch.bfloat16


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": 3}, "divisor"),
        ({"patch": 0}, "divisor"),
        ({"heads": 3}, "divisor of the width"),
        ({"width": 18, "heads": 2}, "multiple of 4"),
        ({"depth": 0}, "depth 0"),
        ({"tokens": 0}, "tokens=None"),
    ],
)
def test_unusable_settings_raise(arguments: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"image_size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2, "tokens": 2} | arguments
    with pytest.raises(ValueError, match=message):
        ViTConfig(**sizes)


@pytest.mark.parametrize("tokens", [None, 5])
def test_other_sizes_raise(tokens: int | None) -> None:
    pair = vit_pair(tokens)
    with pytest.raises(ValueError, match=r"images .* \(B, 3, 12, 12\)"):
        pair.encoder(normal(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"codes .* \(B, 6, "):
        pair.decoder(normal(1, 6, 4))
