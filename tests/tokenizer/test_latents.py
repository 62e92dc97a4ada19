"""Latents and tokenizer quality: statistics by definition, caches that raise for other data, numbers, grids of pixels."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from stored_latents import encoded, read_whole
from torch import Tensor, nn

from midway.gen.commands import encode as encode_script
from midway.gen.core.errors import DataError, DivergedError
from midway.gen.core.runs import Run
from midway.gen.data.images import ImageData, load_images, to_float, to_uint8
from midway.gen.data.pictures import grid_png, save_grid
from midway.gen.data.splits import DataConfig, load_splits, split
from midway.gen.metrics.psnr_ssim import PSNR_CAP
from midway.gen.tokenizer.encoding import Encoding, encode, latent_statistics
from midway.gen.tokenizer.latents import cache_path, open_latents
from midway.gen.tokenizer.objective import TokenizerObjective, evaluate_tokenizer, reconstruct
from midway.gen.tokenizer.statistics import ChannelMoments, give_statistics, merged
from midway.gen.tokenizer.stored import Views, tokenizer_hash
from midway.gen.training.batches import Context, ImageBatch
from midway.tokenizers.base import bits_per_image, perplexity, usage
from midway.tokenizers.networks import Encoder
from midway.tokenizers.tokenizer import ImageTokenizer

FSQ = {"type": "fsq", "levels": [4, 3]}
IDENTITY = {"type": "identity", "dim": 1}


def data(count: int = 40, start: int = 0) -> ImageData:
    """Some digits, with a fingerprint of their own."""
    digits = load_images("digits")
    part = slice(start, start + count)
    return replace(digits, images=digits.images[part], labels=digits.labels[part], fingerprint=f"{start}-{count}" * 9)


def tokenizer(quantizer: dict[str, object] = FSQ, seed: int = 0, **options: object) -> ImageTokenizer:
    torch.manual_seed(seed)
    return ImageTokenizer(width=16, blocks=1, quantizer=quantizer, **options).eval()  # pyright: ignore[reportArgumentType]


def pixels() -> ImageTokenizer:
    return tokenizer(IDENTITY, downsample=1)


def assert_standard(latents: Tensor) -> None:
    """Zero mean and unit deviation in both channels."""
    y, zero, one = latents.double(), torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close((y.mean((0, 2, 3)), y.std((0, 2, 3))), (zero, one), rtol=0, atol=1e-6)


# ---- encoding ----


@pytest.mark.parametrize("space", ["pre", "post"])
def test_standardised_latents_have_zero_mean_and_unit_deviation_per_channel(space: str) -> None:
    model = tokenizer(latent_space=space)
    latents = encoded(model, data(), batch_size=7)
    assert_standard(latents.standardised)
    assert latents.raw.dtype == latents.mean.dtype == latents.std.dtype == torch.float32
    assert (latents.mean[0] - latents.mean[1]).abs() > 1e-3, "channels differ, or the test would not see a mix-up"


def test_latents_keep_the_order_of_the_images_whatever_the_batch() -> None:
    model, images = tokenizer(), data()
    with torch.no_grad():
        one_by_one = torch.cat([model.raw_latents(to_float(image[None])) for image in images.images[:]])
    for batch_size in (7, 40, 512):
        latents = encoded(model, images, batch_size)
        torch.testing.assert_close(latents.raw, one_by_one, rtol=0, atol=1e-5)
        assert torch.equal(latents.labels, images.labels)


def test_pixel_latents_are_the_images_and_their_statistics_those_of_the_bytes() -> None:
    images = data()
    latents = encoded(pixels(), images)
    assert torch.equal(latents.raw, to_float(images.images[:]))
    exact = images.images[:].double().numpy() / 127.5 - 1
    assert latents.mean.item() == pytest.approx(exact.mean(), abs=1e-7)
    assert latents.std.item() == pytest.approx(exact.std(ddof=1), rel=1e-6)


def test_statistics_in_the_tokenizer_give_the_standardised_latents_and_lead_back() -> None:
    model, images = tokenizer(), data()
    latents = encoded(model, images)
    model.set_latent_statistics(latents.mean, latents.std)
    with torch.no_grad():
        y = model.encode_latents(to_float(images.images[:]))
        back, direct = model.decode_latents(y), model(to_float(images.images[:])).reconstruction
    torch.testing.assert_close(y, latents.standardised, rtol=0, atol=1e-5)
    torch.testing.assert_close(back, direct, rtol=0, atol=1e-4)


# ---- channels that do not vary ----


def coloured(*values: int | None) -> Tensor:
    """uint8 images (20, C, 8, 8): noise where the value is None."""
    images = torch.randint(
        0, 256, (20, len(values), 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    for channel, value in enumerate(values):
        if value is not None:
            images[:, channel] = value
    return images


def measured(model: ImageTokenizer, images: Tensor) -> ImageTokenizer:
    give_statistics(model, *latent_statistics(model, images, batch_size=7), images)
    return model


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((None, None, 0), ["channel 3 of 3 (blue) is 0 in every pixel", "--channels 1"]),
        ((77, None, None), ["channel 1 of 3 (red) is 77 in every pixel", "--channels 1"]),  # its mean is rounded
        ((1, None, 99), ["(red) is 1 and channel 3 of 3 (blue) is 99 in every pixel", "--channels 1"]),
        ((255, 255, 255), ["(red) is 255", "(green) is 255", "(blue) is 255", "use other images"]),
        ((13,), ["channel 1 of 1 (grey) is 13", "use other images"]),
    ],
)
def test_a_channel_of_the_images_that_does_not_vary_is_named(values: tuple[int | None, ...], words: list[str]) -> None:
    images, dim = coloured(*values), len(values)
    for model in (
        tokenizer({"type": "identity", "dim": dim}, in_channels=dim, downsample=1),
        tokenizer({"type": "identity", "dim": dim}, in_channels=dim, downsample=1, latent_space="post"),
    ):
        with pytest.raises(DataError) as raised:
            measured(model, images)
        assert all(word in str(raised.value) for word in words)
        assert "longer" not in str(raised.value)
        assert not bool(model.latents_measured)


def test_a_constant_channel_that_leaves_the_latents_varying_is_no_error() -> None:
    assert bool(measured(tokenizer(in_channels=3), coloured(None, None, 0)).latents_measured)


@pytest.mark.parametrize("space", ["pre", "post"])
def test_a_channel_of_the_latents_that_does_not_vary_is_named(space: str) -> None:
    model = tokenizer(latent_space=space)
    encoder = cast(Encoder, model.encoder)
    with torch.no_grad():
        for layer, bias in ((encoder.shortcut, 0.3), (cast(nn.Conv2d, encoder.layers[-1]), 0.0)):
            layer.weight[1] = 0
            cast(Tensor, layer.bias)[1] = bias
    with pytest.raises(DataError, match=r"latent channel 2 of 2 is .*\n.*longer") as raised:
        measured(model, data().images[:])
    assert "every channel of the images varies" in str(raised.value)


def test_latents_that_are_not_finite_are_those_of_a_training_that_diverged() -> None:
    model = tokenizer()
    with torch.no_grad():
        cast(Tensor, cast(Encoder, model.encoder).shortcut.bias)[0] = math.nan
    with pytest.raises(DivergedError, match="not finite"):
        measured(model, data().images[:])


def test_statistics_of_equal_numbers_and_of_one_number() -> None:
    parts = [torch.full((count, 2, 7, 7), 77 / 127.5 - 1) for count in (3, 0, 5)]  # one without images changes nothing
    equal = merged(map(ChannelMoments.of, parts), 2)
    assert equal.result()[1].abs().max() < 1e-12
    assert bool(((equal + ChannelMoments.of(torch.zeros(1, 2, 1, 1))).result()[1] > 0).all())
    alone = merged([ChannelMoments.of(torch.ones(1, 1, 1, 1))], 1)
    assert [value.item() for value in alone.result()] == [1, 0]


# ---- mirrored ----


def test_mirrored_latents_are_those_of_the_mirrored_images() -> None:
    """Not mirrored latents, which a convolution does not give."""
    images = data()
    for model in (pixels(), tokenizer()):
        latents = encoded(model, images, batch_size=7, flip=True)
        other = encoded(model, replace(images, images=images.images[:].flip(-1)), batch_size=7)
        assert latents.mirrored is not None
        assert torch.equal(latents.mirrored, other.raw)
        assert torch.equal(latents.raw, encoded(model, images, batch_size=7).raw)
    assert not torch.equal(latents.mirrored, latents.raw.flip(-1))


def test_with_mirrored_latents_both_together_have_zero_mean_and_unit_deviation() -> None:
    latents = encoded(tokenizer(), data(), flip=True)
    assert latents.mirrored is not None
    both = torch.cat([latents.raw, latents.mirrored])
    assert_standard((both - latents.mean.view(-1, 1, 1)) / latents.std.view(-1, 1, 1))
    assert latents.standardised.mean((0, 2, 3)).abs().max() > 1e-3, "alone they do not, or the test would see nothing"


def test_a_folder_without_mirrored_latents_raises_where_they_are_needed(tmp_path: Path) -> None:
    model, images, path = tokenizer(), data(), tmp_path / "cache"
    encode(path, model, images, Encoding())
    with pytest.raises(
        DataError, match=r"no latents of mirrored images\n.*made without --flip\n.*midway encode --flip --over"
    ):
        open_latents(path, images, model, flip=True)
    with pytest.raises(DataError, match=r"make them with midway encode --flip"):
        open_latents(tmp_path / "absent", images, model, flip=True)


def test_the_script_encodes_mirrored_images_into_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = tokenizer(), DataConfig(held_out=0.9)
    train = load_splits(config).train
    for name, found in (
        ("load_tokenizer", (model, config)),
        ("images_at", config),
        ("splits_of", load_splits(config)),
        ("unfinished", ()),
    ):
        monkeypatch.setattr(encode_script, name, lambda *_, found=found: found)
    monkeypatch.setattr(encode_script.Run, "open", lambda *_: Run(tmp_path, "tokenizer"))
    paths = [encode_script.run(encode_script.EncodeTask(tmp_path, flip=flip)) for flip in (False, True)]
    assert paths == [cache_path(tmp_path, train, model, Views(mirrored=flip)) for flip in (False, True)]
    assert read_whole(paths[1], train, model, flip=True).mirrored is not None
    with pytest.raises(DataError, match="no latents of mirrored"):
        open_latents(paths[0], train, model, flip=True)


# ---- folders of something else ----


def test_latents_of_other_images_or_another_tokenizer_raise_by_name(tmp_path: Path) -> None:
    model, images, path = tokenizer(), data(), tmp_path / "cache"
    encode(path, model, images, Encoding())
    with pytest.raises(DataError, match=r"stale.*\n.*its data is") as caught:
        open_latents(path, data(start=40), model)
    assert caught.value.exit_code == 3
    with pytest.raises(DataError, match=r"stale.*\n.*its tokenizer is"):
        open_latents(path, images, tokenizer(seed=1))
    with pytest.raises(DataError, match=r"stale.*\n.*its tokenizer is"):
        open_latents(path, images, tokenizer(latent_space="post"))
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    with pytest.raises(DataError, match=r"stale.*\n.*its tokenizer is"):
        open_latents(path, images, model)


def test_what_is_no_folder_of_latents_raises(tmp_path: Path) -> None:
    """Also the single file of earlier versions."""
    model, images = tokenizer(), data()
    save_file({"raw": torch.zeros(1)}, tmp_path / "old.safetensors", {"format": "midway-latents-1"})
    with pytest.raises(DataError, match=r"is not a latent cache\n.*encoded again\n.*midway encode"):
        open_latents(tmp_path / "old.safetensors", images, model)
    with pytest.raises(DataError, match="no latents at"):
        open_latents(tmp_path / "absent", images, model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no finished set of latents[\s\S]*midway encode"):
        open_latents(tmp_path / "empty", images, model)


def test_the_hash_is_of_weights_and_configuration_and_not_of_latent_statistics(tmp_path: Path) -> None:
    model = tokenizer()
    before = tokenizer_hash(model)
    model.set_latent_statistics(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert tokenizer_hash(model) == before
    model.save_pretrained(tmp_path / "t")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "t")
    assert isinstance(loaded, ImageTokenizer)
    assert tokenizer_hash(loaded) == before, "a saved tokenizer finds its cache again"
    others = [tokenizer(seed=1), tokenizer(latent_space="post"), tokenizer({"type": "fsq", "levels": [3, 4]})]
    assert len({before, *map(tokenizer_hash, others)}) == 4


def test_places_differ_by_data_by_tokenizer_by_views_and_by_dtype(tmp_path: Path) -> None:
    pairs = [(d, t) for d in (data(), data(start=40)) for t in (tokenizer(), tokenizer(seed=1))]
    forms = [(views, dtype) for views in (Views(), Views(1, True), Views(5, True)) for dtype in ("float32", "float16")]
    assert len({cache_path(tmp_path, *pair, *form) for pair in pairs for form in forms}) == 24
    assert {cache_path(tmp_path, d, t, Views(1, True)).name[-5:] for d, t in pairs} == {"-flip"}


# ---- splits ----


def test_a_split_is_a_function_of_its_configuration() -> None:
    a, b = load_splits(DataConfig(held_out=0.25, split_seed=3)), load_splits(DataConfig(held_out=0.25, split_seed=3))
    assert a.train.fingerprint == b.train.fingerprint
    assert a.held_out.fingerprint == b.held_out.fingerprint
    assert a.train.fingerprint == split(load_images("digits"), 0.25, 3)[0].fingerprint
    assert len(a.held_out.labels) == round(0.25 * 1797)
    assert load_splits(DataConfig(held_out=0.25, split_seed=4)).train.fingerprint != a.train.fingerprint


# ---- quality ----


def test_the_pixel_model_reconstructs_exactly_and_has_no_codes() -> None:
    images = data().images[:]
    assert torch.equal(reconstruct(pixels(), images, 7), images)
    assert evaluate_tokenizer(pixels(), images) == {"mse": 0.0, "psnr": pytest.approx(PSNR_CAP)}


@pytest.mark.parametrize("batch_size", [7, 40, 512])
def test_quality_is_that_of_the_8_bit_images_and_of_all_codes_together(batch_size: int) -> None:
    """Unequal batches must not be averaged; counts are added before usage and perplexity."""
    model, images = tokenizer(), data().images[:]
    report = evaluate_tokenizer(model, images, batch_size)
    with torch.no_grad():
        out = model(to_float(images))
    shown = to_uint8(out.reconstruction).double().numpy()
    errors = np.square((shown - images.double().numpy()) / 127.5).mean((1, 2, 3))
    counts = torch.bincount(model.encode_indices(to_float(images)).flatten(), minlength=12)
    assert report["mse"] == pytest.approx(errors.mean(), rel=1e-5)
    assert report["psnr"] == pytest.approx(10 * np.log10(4 / errors).mean(), rel=1e-5)
    assert report["psnr"] != pytest.approx(10 * np.log10(4 / errors.mean()), abs=0.01), "not the PSNR of the mean error"
    assert report["usage"] == (counts > 0).sum().item() / 12
    p = counts[counts > 0].double() / counts.sum()
    assert report["perplexity"] == pytest.approx((p ** (-p)).prod().item())
    assert report["bits_per_image"] == pytest.approx(16 * math.log2(12))
    assert (report["usage"], report["perplexity"]) == (usage(counts), perplexity(counts))
    assert report["bits_per_image"] == bits_per_image(16, 12)


def test_the_objective_is_the_error_plus_the_loss_of_the_quantizer() -> None:
    model = tokenizer({"type": "kl", "dim": 2, "weight": 0.5})
    images = data(8)
    context = Context(0, 3, torch.arange(8))
    loss, logs = TokenizerObjective(model).loss(ImageBatch(images.images[:], images.labels), context)
    out = model(to_float(images.images[:]), context.normal("posterior", (2, 4, 4)))
    mse = (out.reconstruction - to_float(images.images[:])).square().mean()
    assert out.quantized.losses["kl"] > 0
    torch.testing.assert_close(loss, mse + 0.5 * out.quantized.losses["kl"])
    torch.testing.assert_close(logs["mse"], mse)
    assert set(logs) == {"mse", "kl"}


def test_the_posterior_draw_of_an_image_does_not_depend_on_its_batch() -> None:
    model, images = TokenizerObjective(tokenizer({"type": "kl", "dim": 2})), data(8)
    whole = model.loss(ImageBatch(images.images[:], images.labels), Context(0, 3, torch.arange(8)))[0]
    halves = [
        model.loss(ImageBatch(images.images[part], images.labels[part]), Context(0, 3, torch.arange(8)[part]))[0]
        for part in (slice(4), slice(4, 8))
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


# ---- pictures ----


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def numbered(count: int, channels: int, height: int, width: int) -> Tensor:
    """Images of which every byte is a function of its place."""
    values = torch.arange(count * channels * height * width) * 7 % 251
    return values.to(torch.uint8).view(count, channels, height, width)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns", "scale"), [(6, 3, 1), (5, 3, 2), (1, 4, 1), (7, 1, 3)])
def test_every_pixel_of_a_grid_is_in_its_place(channels: int, count: int, columns: int, scale: int) -> None:
    """Image n is in row n // columns and column n % columns, 2 white pixels from the next; missing ones are white."""
    height, width = 4, 5
    images = numbered(count, channels, height, width)
    picture = opened(grid_png(images, columns, scale))
    cell = (height * scale + 2, width * scale + 2)
    rows = math.ceil(count / columns)
    expected = np.full((rows * cell[0], columns * cell[1], 3), 255, np.uint8)
    for n, image in enumerate(images):
        top, left = n // columns * cell[0] + 1, n % columns * cell[1] + 1
        large = np.kron(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), np.ones((scale, scale, 1), np.uint8))
        expected[top : top + height * scale, left : left + width * scale] = large
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, expected)


@pytest.mark.parametrize(("side", "factor"), [(8, 6), (28, 2), (32, 2), (48, 1), (64, 1)])
def test_small_images_are_enlarged_until_they_can_be_seen(side: int, factor: int) -> None:
    assert opened(grid_png(numbered(1, 1, side, side), 1)).shape == (side * factor + 2, side * factor + 2, 3)


@pytest.mark.parametrize(
    ("caption", "lines"), [("step 7", 1), ("step 7 supercalifragilistic", 2), ("step\u00a07\u00a0and\u00a0more", 1)]
)
def test_a_caption_is_a_strip_above_the_picture(caption: str, lines: int) -> None:
    """Of 30 pixels a line, broken at spaces only, wider than the picture where it must be; the picture is as without it."""
    images = numbered(4, 1, 8, 8)
    bare, picture = opened(grid_png(images, 2)), opened(grid_png(images, 2, caption=caption))
    height, width, _ = bare.shape
    assert picture.shape[0] == height + 30 * lines and picture.shape[1] >= width
    assert np.array_equal(picture[30 * lines :, :width], bare)
    assert (picture[30 * lines :, width:] == 255).all()
    rows = (picture[: 30 * lines] < 128).any((1, 2)).reshape(lines, 30)
    assert rows.any(1).all(), "every line has letters"
    assert (picture[: 30 * lines, 0] == 255).all() and (picture[: 30 * lines, -1] == 255).all(), "none is cut"
    assert not np.array_equal(picture, opened(grid_png(images, 2, caption=caption.replace("7", "8"))))


def test_a_saved_grid_is_the_picture_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    images = numbered(2, 1, 8, 8)
    save_grid(tmp_path / "samples" / "a.png", images, 2)
    assert (tmp_path / "samples" / "a.png").read_bytes() == grid_png(images, 2)
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["a.png"]


def test_the_report_of_a_tokenizer_can_be_written_as_a_line() -> None:
    report = evaluate_tokenizer(tokenizer(), data().images[:])
    assert json.loads(json.dumps(report, allow_nan=False)) == report
