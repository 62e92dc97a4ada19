"""Tiles: equal to the whole image where the receptive field is within the margin, blended otherwise, one tile at a time."""

from itertools import pairwise

import pytest
import torch
from tensors import normal
from torch import Tensor, nn

from midway.tokenizers.networks import Decoder, Encoder
from midway.tokenizers.tiling import apply_tiled, tile_networks, tile_starts, tile_weights
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

# height, width, tile, overlap
LAYOUTS = [(12, 12, 8, 4), (13, 21, 8, 5), (9, 30, 8, 4), (16, 7, 8, 7), (5, 6, 8, 4), (8, 8, 8, 4), (20, 20, 9, 6)]


def small_decoder(doublings: int) -> nn.Module:
    """Zero-padded 3x3 convolutions without norms: a position depends on those up to 1 + 1/2 + 1/4 away, less than 2."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(4, 6, 3, padding=1), nn.SiLU()]
    for _ in range(doublings):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(6, 6, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(6, 3, 1)).double()


def small_encoder() -> nn.Module:
    """Pixels to codes, f = 4: a code depends on pixels up to two codes away."""
    torch.manual_seed(0)
    fold = nn.PixelUnshuffle(4)
    return nn.Sequential(fold, nn.Conv2d(48, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 4, 3, padding=1)).double()


# Equal to the whole ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["decoder", "decoder of the same size", "encoder"])
@pytest.mark.parametrize(("height", "width", "tile", "overlap"), LAYOUTS)
def test_tiles_equal_the_whole(height: int, width: int, tile: int, overlap: int, network: str) -> None:
    codes, images = normal(2, 4, height, width).double(), normal(2, 3, 4 * height, 4 * width).double()
    function, x, pixels, margin = {
        "decoder": (small_decoder(2), codes, 1, 2),
        "decoder of the same size": (small_decoder(0), codes, 1, 1),
        "encoder": (small_encoder(), images, 4, 2),
    }[network]
    out = apply_tiled(function, x, pixels, tile, overlap, margin)
    torch.testing.assert_close(out, function(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("margin", [0, 1])
def test_a_receptive_field_beyond_the_margin_changes_only_seams(margin: int) -> None:
    decoder, codes = small_decoder(2), normal(1, 4, 12, 12).double()
    error = (apply_tiled(decoder, codes, 1, 8, 4, margin) - decoder(codes)).abs().amax((0, 1))
    assert error.max() > 1e-4
    outside = torch.cat([error[:16, :16].flatten(), error[32:, 32:].flatten()])  # covered by one tile
    assert outside.max() < 1e-12


@pytest.mark.parametrize("upsample", ["pixel_shuffle", "nearest", "bilinear", "transposed"])
def test_convolutional_networks_without_norms_are_exact(upsample: str) -> None:
    """Radius: of the encoder 4 codes, of the decoder 4 + 1/2 + 1/4 + ..., less than 6. Norms over the map see all of it."""
    torch.manual_seed(0)
    encoder, decoder = Encoder(3, 8, 4, 1, 4), Decoder(4, 8, 4, 1, 3, upsample)  # pyright: ignore[reportArgumentType]
    for network in (encoder, decoder):
        for module in network.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, nn.Identity())
        for parameter in network.double().parameters():
            nn.init.normal_(parameter, std=0.2)
    images = normal(1, 3, 100, 80).double()
    z = encoder(images)
    torch.testing.assert_close(apply_tiled(encoder, images, 4, 16, 12, 5), z, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(apply_tiled(decoder, z, 1, 16, 12, 6), decoder(z), atol=1e-10, rtol=1e-10)


def test_a_tiled_tokenizer_is_near_the_whole_one() -> None:
    """At initialisation it is its shortcut, which is local: then tiles are exact. Trained, GroupNorm depends on the tile."""
    torch.manual_seed(0)
    tokenizer, tiled = ImageTokenizer(1, 32, 8, 2, 1), ImageTokenizer(1, 32, 8, 2, 1)
    tiled.load_state_dict(tokenizer.state_dict())
    tile_networks(tiled, 16, 2)
    images = normal(2, 1, 32, 32)
    assert torch.equal(tiled.encode_indices(images), tokenizer.encode_indices(images))
    torch.testing.assert_close(tiled(images).reconstruction, tokenizer(images).reconstruction)


# Blending -------------------------------------------------------------------------------------------------------------


AXES = [(size, tile, overlap) for size in (1, 7, 8, 9, 31) for tile in (1, 4, 8) for overlap in range(tile)]


def test_tiles_cover_an_axis_evenly_with_enough_overlap_and_are_as_few_as_possible() -> None:
    for size, tile, overlap in AXES:
        starts = tile_starts(size, tile, overlap)
        gaps = [after - before for before, after in pairwise(starts)]
        assert (starts[0], starts[-1]) == (0, max(size - tile, 0))
        assert all(0 < gap <= tile - overlap for gap in gaps)
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
        assert (len(starts) - 2) * (tile - overlap) + tile < size or len(starts) == 1


@pytest.mark.parametrize("scale", [1, 3])
def test_weights_sum_to_one_and_are_zero_within_the_margin_of_a_seam(scale: int) -> None:
    for size, tile, overlap in AXES:
        for margin in range(overlap // 2 + 1):
            weights, total = tile_weights(size, tile, overlap, margin, scale), torch.zeros(size * scale).double()
            length, cut = min(tile, size) * scale, margin * scale
            for start, weight in zip(tile_starts(size, tile, overlap), weights, strict=True):
                total[start * scale :][:length] += weight
                assert start == 0 or bool((weight[:cut] == 0).all())
                assert start + tile >= size or bool((weight[length - cut :] == 0).all())
            assert (weights >= 0).all()
            torch.testing.assert_close(total, torch.ones_like(total), atol=1e-12, rtol=0)


def test_the_ramp_is_linear() -> None:
    """Tiles of 8 with 4 in common, from 4 to 8: without margins the ramp has all 4, with margins of 1 the middle 2."""
    first, second = tile_weights(12, 8, 4, 0, 2)
    expected = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    torch.testing.assert_close(second[:8], expected)
    torch.testing.assert_close(first[8:], 1 - expected)
    assert (first[:8] == 1).all()
    assert (second[8:] == 1).all()
    _, second = tile_weights(12, 8, 4, 1, 2)
    torch.testing.assert_close(second[:8], torch.tensor([0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1]).double())
    _, second = tile_weights(12, 8, 4, 2, 2)
    torch.testing.assert_close(second[:8], torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).double())


def test_the_ramp_is_in_the_middle_of_the_shared_part() -> None:
    """Tiles of 8 at 0 and 1 share 1 to 8, more than the required 4: the ramp goes from 2.5 to 6.5."""
    _, second = tile_weights(9, 8, 4, 0, 1)
    torch.testing.assert_close(second, torch.tensor([0, 0, 0.25, 0.5, 0.75, 1, 1, 1]).double())


def test_two_outputs_are_blended_by_their_weights() -> None:
    outputs = iter([0.0, 1.0])
    out = apply_tiled(lambda tile: torch.full_like(tile, next(outputs)), normal(1, 1, 4, 6), 1, 4, 2, 0)
    torch.testing.assert_close(out, torch.tensor([0, 0, 0.25, 0.75, 1, 1]).expand(1, 1, 4, 6))


# One tile at a time ---------------------------------------------------------------------------------------------------


def test_the_network_is_applied_to_one_tile_at_a_time_without_gradient() -> None:
    shapes = []
    decoder, codes = small_decoder(1), normal(2, 4, 16, 20).double()

    def decode(tile: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        shapes.append(tuple(tile.shape))
        return decoder(tile)

    assert not apply_tiled(decode, codes.requires_grad_(), 1, 8, 4, 1).requires_grad
    assert shapes == [(2, 4, 8, 8)] * 12


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_blending_is_float32_or_wider(dtype: torch.dtype, expected: torch.dtype) -> None:
    out = apply_tiled(lambda tile: tile, normal(1, 2, 9, 9).to(dtype), 1, 4, 2, 0)
    assert out.dtype == expected
    torch.testing.assert_close(out, normal(1, 2, 9, 9).to(dtype).to(expected))


def test_an_empty_batch_gives_an_empty_batch() -> None:
    assert apply_tiled(small_decoder(1), normal(0, 4, 9, 9).double(), 1, 4, 2, 0).shape == (0, 3, 18, 18)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tile", "overlap", "margin", "message"),
    [
        (4, 4, 0, "larger than"),
        (4, -1, 0, "larger than"),
        (0, 0, 0, "larger than"),
        (8, 4, 3, "two margins"),
        (8, 4, -1, "two"),
    ],
)
def test_invalid_tiles_raise(tile: int, overlap: int, margin: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_tiled(small_decoder(1), normal(1, 4, 9, 9).double(), 1, tile, overlap, margin)


@pytest.mark.parametrize(
    ("shape", "pixels"), [((1, 3, 18, 16), 4), ((1, 3, 16, 16), 0), ((3, 16, 16), 1), ((1, 3, 0, 4), 4)]
)
def test_images_that_are_not_whole_codes_raise(shape: tuple[int, ...], pixels: int) -> None:
    with pytest.raises(ValueError, match="pad or crop"):
        apply_tiled(small_encoder(), normal(*shape).double(), pixels, 4, 2, 0)


def test_networks_without_a_proportional_output_grid_raise() -> None:
    for network, pixels in ((lambda tile: tile.flatten(2), 1), (nn.AvgPool2d(4), 2)):
        with pytest.raises(ValueError, match="proportional"):
            apply_tiled(network, normal(1, 3, 16, 16), pixels, 4, 2, 0)


@pytest.mark.parametrize(
    ("network", "tile", "margin", "message"),
    [("vit", 16, 2, "ViT"), ("conv", 15, 2, "factor 2"), ("conv", 16, 1, "factor 2"), ("conv", 16, 4, "larger than")],
)
def test_a_tokenizer_that_cannot_be_tiled_so_raises(network: str, tile: int, margin: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tile_networks(ImageTokenizer(1, 32, 8, 2, 1, network=network), tile, margin)
