"""Windows of larger images: what `--crop` uses outside of training, which errors it raises, and the commands that have it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import Script

from midway.gen.core.errors import UsageError
from midway.gen.data.crops import cropped
from midway.gen.data.images import describe, image_data
from midway.gen.data.pixels import LazyImages, part_of
from midway.gen.data.splits import DataConfig, flags_of, load_splits, same_images
from midway.gen.data.stored import KIND, StoredImages
from midway.gen.files.record_writer import RecordFormat, seal, write_shard
from midway.gen.files.records import open_records

PIXELS = torch.arange(2 * 3 * 5 * 7).to(torch.uint8).view(2, 3, 5, 7)
DATA = image_data(PIXELS, torch.tensor([0, 1]), ("a", "b"), "two", ())


def test_the_window_is_in_the_centre() -> None:
    """4 of 5 rows from row 0 on, 4 of 7 columns from column 1 on."""
    found = cropped(DATA, 4)
    assert torch.equal(found.images[:], PIXELS[:, :, 0:4, 1:5])
    assert found.whole is PIXELS
    assert "2 images: 4x4 of 7x5" in describe(found)
    assert "4x4" in describe(found).splitlines()[0]


def test_windows_of_images_on_the_disk_are_those_of_images_in_memory(tmp_path: Path) -> None:
    form = RecordFormat("uint8", tuple(PIXELS.shape[1:]))
    seal(tmp_path, KIND, form, [write_shard(tmp_path, 0, form, [(PIXELS, {})])], {})
    stored = StoredImages(open_records(tmp_path, KIND, "build it again"), torch.arange(2))
    found, expected = cropped(replace(DATA, images=stored), 4), cropped(DATA, 4)
    assert isinstance(found.images, LazyImages) and found.whole is stored
    assert (found.fingerprint, found.conversions) == (expected.fingerprint, expected.conversions)
    assert found.images.shape == expected.images.shape and len(found.images) == 2
    assert found.images.dtype == torch.uint8
    for items in (torch.tensor([1, 0, 1]), torch.tensor([False, True]), slice(1, None)):
        assert torch.equal(found.images[items], expected.images[items])
        assert found.images[items].is_contiguous()
    assert torch.equal(torch.cat(list(found.images.split(1))), expected.images[:])
    assert torch.equal(part_of(found.images, torch.tensor([1]))[:], expected.images[1:])


def test_the_fingerprint_is_that_of_the_images_and_the_window() -> None:
    names = {data.fingerprint for data in (DATA, cropped(DATA, 4), cropped(DATA, 3), cropped(cropped(DATA, 4), 3))}
    assert len(names) == 4
    assert cropped(DATA, 4).fingerprint == cropped(DATA, 4).fingerprint


def test_images_of_the_size_of_the_window_are_left_as_they_are() -> None:
    square = replace(DATA, images=PIXELS[..., :5])
    assert cropped(square, 5) is square
    assert cropped(DATA, None) is DATA
    assert cropped(DATA, 5).images.shape[2:] == (5, 5), "cut off at the sides alone"


def test_a_window_larger_than_the_images_raises() -> None:
    with pytest.raises(UsageError) as caught:
        cropped(DATA, 6)
    assert (caught.value.what, caught.value.why) == ("--crop 6", "the images of two are 7x5")
    assert "--crop 5" in caught.value.fix and "--resize 6" in caught.value.fix


def test_the_window_is_part_of_what_the_data_are() -> None:
    plain, window = DataConfig(), DataConfig(crop=6)
    assert not same_images(plain, window)
    assert "--crop 6" in flags_of(window)
    splits, larger = load_splits(window), load_splits(plain)
    for part, whole in ((splits.train, larger.train), (splits.held_out, larger.held_out)):
        assert torch.equal(part.images[:], whole.images[:][:, :, 1:7, 1:7])
        assert part.fingerprint != whole.fingerprint


def test_the_check_of_a_source_raises_too_and_a_build_takes_no_window(script: Script, tmp_path: Path) -> None:
    found = script("data", "check", "digits", "--crop", 9)
    assert found.code == 2 and "the images of digits are 8x8" in found.err
    assert script("data", "check", "digits", "--crop", 8).code == 0
    found = script("data", "build", "digits", "--crop", 6, "--out", tmp_path / "built")
    assert found.code == 2 and "--crop 6" in found.err and not (tmp_path / "built").exists()


@pytest.mark.usefixtures("one_thread")
def test_commands_use_the_window(script: Script, tmp_path: Path) -> None:
    """A tokenizer on windows of 4x4; its evaluation, latents, a model of them, a solver, without the flag again; by threads."""
    tokenizer, model = tmp_path / "tokenizer", tmp_path / "model"
    small = ("--crop", 4, "--workers", 2, "--steps", 4, "--batch-size", 32)
    made = script(
        "train_tokenizer", "digits-fsq", "--model.width", 8, "--model.downsample", 2, *small, "--out", tokenizer
    )
    assert made.code == 0, made.err
    assert "4x4 of 8x8" in (tokenizer / "log.txt").read_text()
    encoded = script("encode", "--tokenizer", tokenizer)
    assert encoded.code == 0, encoded.err
    flags = ("--tokenizer", tokenizer, "--model.dit.width", 16, "--model.dit.depth", 1, "--model.dit.heads", 2)
    trained = script("train_latent", "digits-dit", *flags, "--steps", 2, "--workers", 1, "--out", model)
    assert trained.code == 0, trained.err
    measured = script(
        "evaluate_tokenizer", "--tokenizers", tokenizer, "--features", "none", "--out", tmp_path / "report"
    )
    assert measured.code == 0, measured.err
    again = script(
        "train_tokenizer", "--config", tokenizer / "config.yaml", "--crop", 6, "--out", tokenizer, "--resume", "auto"
    )
    assert again.code == 2 and "data.crop" in again.err


@pytest.mark.usefixtures("one_thread")
def test_features_train_on_windows(script: Script, tmp_path: Path) -> None:
    flags = ("--resize", 10, "--crop", 8, "--width", 8, "--dim", 8, "--steps", 2, "--batch-size", 32, "--workers", 2)
    made = script("train_features", "--data", "digits", *flags, "--out", tmp_path / "run")
    assert made.code == 0, made.err


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("recipe", ["digits-vae", "digits-nice"])
def test_baselines_train_on_windows(recipe: str, script: Script, tmp_path: Path) -> None:
    flags = ("--crop", 4, "--steps", 2, "--validate-every", 0, "--patience-validations", 0, "--batch-size", 32)
    made = script("train_baseline", recipe, *flags, "--validation-images", 20, "--out", tmp_path / "run")
    assert made.code == 0, made.err
    assert (
        '"image_shape": [\n    1,\n    4,\n    4\n  ]' in (tmp_path / "run/checkpoints/step-2/model.json").read_text()
    )
