"""Tiles: equal to the whole where the network sees no further than the margin, blended where it does, one tile at a time."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from midway.tokenizers.networks import Decoder, Encoder
from midway.tokenizers.tiling import decode_tiled, encode_tiled, tile_starts, tile_weights
from midway.tokenizers.tokenizer import ImageTokenizer
from midway.tokenizers.vit import ViTDecoder

pytestmark = pytest.mark.usefixtures("one_thread")

# height, width, tile, overlap
LAYOUTS = [(12, 12, 8, 4), (13, 21, 8, 5), (9, 30, 8, 4), (16, 7, 8, 7), (5, 6, 8, 4), (8, 8, 8, 4), (20, 20, 9, 6)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("doublings", [0, 2])
@pytest.mark.parametrize(("height", "width", "tile", "overlap"), LAYOUTS)
def test_decoding_in_tiles_is_decoding_the_whole(
    height: int, width: int, tile: int, overlap: int, doublings: int, batch: int
) -> None:
    decoder, codes = small_decoder(doublings), normal(2, 4, height, width).double()
    out = decode_tiled(decoder, codes, tile, overlap, margin=2 if doublings else 1, batch=batch)
    torch.testing.assert_close(out, decoder(codes), atol=1e-12, rtol=0)


def test_the_margin_is_a_quarter_of_the_overlap_unless_given() -> None:
    decoder, codes = small_decoder(2), normal(1, 4, 25, 30).double()
    torch.testing.assert_close(decode_tiled(decoder, codes, 12, 8), decoder(codes), atol=1e-12, rtol=0)
    encoder, images = small_encoder(), normal(1, 3, 100, 84).double()
    torch.testing.assert_close(encode_tiled(encoder, images, 12, 8, 4), encoder(images), atol=1e-12, rtol=0)


@pytest.mark.parametrize("margin", [0, 1])
def test_a_network_that_sees_further_than_the_margin_differs_near_seams_only(margin: int) -> None:
    decoder, codes = small_decoder(2), normal(1, 4, 12, 12).double()
    error = (decode_tiled(decoder, codes, 8, 4, margin) - decoder(codes)).abs().amax((0, 1))
    assert error.max() > 1e-4
    outside = torch.cat([error[:16, :16].flatten(), error[32:, 32:].flatten()])  # covered by one tile
    assert outside.max() < 1e-12


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), LAYOUTS)
def test_encoding_in_tiles_is_encoding_the_whole(height: int, width: int, tile: int, overlap: int) -> None:
    encoder, images = small_encoder(), normal(2, 3, 4 * height, 4 * width).double()
    out = encode_tiled(encoder, images, tile, overlap, 4, margin=2, batch=2)
    torch.testing.assert_close(out, encoder(images), atol=1e-12, rtol=0)


@pytest.mark.parametrize("upsample", ["pixel_shuffle", "nearest", "bilinear", "transposed"])
def test_our_own_pair_without_its_norms_is_exact_too(upsample: str) -> None:
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
    torch.testing.assert_close(encode_tiled(encoder, images, 16, 12, 4, 5), z, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(decode_tiled(decoder, z, 16, 12, 6), decoder(z), atol=1e-10, rtol=1e-10)


def test_a_tokenizer_decodes_more_than_its_own_size() -> None:
    """At the start it is its shortcut, which is local: tiles are exact."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(1, 8, 8, 2, 1)
    images = normal(2, 1, 20, 26)
    z = encode_tiled(tokenizer.encode, images, tile=4, overlap=2, downsample=2)
    torch.testing.assert_close(z, tokenizer.encoder(images))
    codes = tokenizer.quantizer(z).codes
    torch.testing.assert_close(decode_tiled(tokenizer.decode, codes, 4, 2), tokenizer.decoder(codes))


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


def test_the_ramp_is_in_the_middle_of_all_that_two_tiles_share() -> None:
    """Tiles of 8 at 0 and 1 share 1 to 8, more than the 4 asked for: the ramp goes from 2.5 to 6.5."""
    _, second = tile_weights(9, 8, 4, 0, 1)
    torch.testing.assert_close(second, torch.tensor([0, 0, 0.25, 0.5, 0.75, 1, 1, 1]).double())


def test_two_answers_are_blended_by_their_weights() -> None:
    answers = iter([0.0, 1.0])
    out = decode_tiled(lambda tile: torch.full_like(tile, next(answers)), normal(1, 1, 4, 6), 4, 2, margin=0)
    torch.testing.assert_close(out, torch.tensor([0, 0, 0.25, 0.75, 1, 1]).expand(1, 1, 4, 6))


# One tile at a time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "calls"), [(1, [2] * 12), (5, [10, 10, 4]), (100, [24])])
def test_the_network_sees_tiles_of_one_size_and_so_many_at_once(batch: int, calls: list[int]) -> None:
    seen = []
    decoder, codes = small_decoder(1), normal(2, 4, 16, 20).double()

    def decode(tile: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(tuple(tile.shape))
        return decoder(tile)

    assert not decode_tiled(decode, codes.requires_grad_(), 8, 4, batch=batch).requires_grad
    assert seen == [(count, 4, 8, 8) for count in calls]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_blending_is_float32_or_wider(dtype: torch.dtype, expected: torch.dtype) -> None:
    out = decode_tiled(lambda tile: tile, normal(1, 2, 9, 9).to(dtype), 4, 2)
    assert out.dtype == expected
    torch.testing.assert_close(out, normal(1, 2, 9, 9).to(dtype).to(expected))


def test_an_empty_batch_is_one() -> None:
    assert decode_tiled(small_decoder(1), normal(0, 4, 9, 9).double(), 4, 2).shape == (0, 3, 18, 18)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tile", "overlap", "margin", "batch", "message"),
    [
        (4, 4, None, 1, "larger than"),
        (4, -1, None, 1, "larger than"),
        (0, 0, None, 1, "larger than"),
        (8, 4, 3, 1, "two margins"),
        (8, 4, -1, 1, "two margins"),
        (8, 4, None, 0, "batch 0"),
    ],
)
def test_unusable_tiles_are_refused(tile: int, overlap: int, margin: int | None, batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_tiled(small_decoder(1), normal(1, 4, 9, 9).double(), tile, overlap, margin, batch)


def test_images_that_are_not_whole_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="pad or crop"):
        encode_tiled(small_encoder(), normal(1, 3, 18, 16).double(), 4, 2, 4)
    with pytest.raises(ValueError, match="downsample 0"):
        encode_tiled(small_encoder(), normal(1, 3, 16, 16).double(), 4, 2, 0)
    with pytest.raises(ValueError, match="pad or crop"):
        decode_tiled(small_decoder(1), normal(1, 4, 9).double(), 4, 2)


def test_networks_that_keep_no_place_for_a_code_are_refused() -> None:
    with pytest.raises(ValueError, match="keep a place"):
        encode_tiled(lambda tile: tile.flatten(2), normal(1, 3, 16, 16), 4, 2, 1)
    with pytest.raises(ValueError, match="keep a place"):
        encode_tiled(nn.AvgPool2d(4), normal(1, 3, 16, 16), 4, 2, 2)
    with pytest.raises(ValueError, match=r"\(B, 4, 3, 3\)"):
        decode_tiled(ViTDecoder(4, 12, 4, 8, 1, 2, None, 1), normal(1, 4, 6, 6), 4, 2)
