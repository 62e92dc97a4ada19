"""Recipes for any images: sizes that fit, whatever the images are; flags override; the run records what was chosen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from midway.gen.core.config import read_yaml, to_dict
from midway.gen.core.errors import UsageError
from midway.gen.data.images import image_data
from midway.gen.recipes import generic
from midway.gen.recipes.generic import (
    GENERIC_LATENTS,
    GENERIC_TOKENIZERS,
    LATENT_SIZES,
    TOKENIZER_SIZES,
    Shape,
    downsample_of,
    patch_of,
    shape_of,
)
from midway.gen.training.config import flat
from midway.gen.trainings import train_latent, train_tokenizer
from midway.tokenizers.tokenizer import ImageTokenizer

SIDES = (8, 16, 28, 32, 48, 64, 96, 128, 224, 256, 512)


def folder(path: Path, count: int, size: tuple[int, int], mode: str = "L") -> Path:
    """Images of squares, each with its own shade."""
    path.mkdir()
    for i in range(count):
        image = Image.new(mode, size)
        image.paste((255 * (i + 1) // count,) * len(mode), (i % 5, i % 3, size[0] // 2 + i % 5, size[1] // 2 + i % 3))
        image.save(path / f"{i:03d}.png")
    return path


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["small", "base"])
def test_sizes_fit_all_usual_images(side: int, channels: int, name: str) -> None:
    """The tokenizer and the transformer can be built, of a bounded number of tokens."""
    task = GENERIC_TOKENIZERS[name](Shape(channels, side))
    factor = task.model.downsample
    assert side % factor == 0 and 4 <= side // factor <= 32
    assert len(task.model.multipliers) in (1, factor.bit_length())
    latent = (len(task.model.levels), side // factor, side // factor)
    dit = GENERIC_LATENTS[name](latent).model.dit
    assert latent[1] % dit.patch == 0
    assert 9 <= (latent[1] // dit.patch) ** 2 <= (64 if name == "small" else 256)
    with torch.device("meta"):
        network = ImageTokenizer(
            in_channels=channels,
            image_size=side,
            quantizer=task.quantizer_config(channels),
            **task.model.network_config(),
        )
        assert network.latent_shape == latent


def test_the_table_of_the_module_is_what_is_computed() -> None:
    lines = [line for line in (generic.__doc__ or "").splitlines() if line.startswith("    ")]
    table = {line[4:20].strip(): [int(word) for word in line[20:].split("at most")[0].split()] for line in lines}
    assert tuple(table["side"]) == SIDES
    assert table["downsample"] == [downsample_of(side) for side in SIDES]
    latent = table["latent side"]
    assert latent == [side // downsample_of(side) for side in SIDES]
    assert table["patch of small"] == [patch_of(side, 64) for side in latent]
    assert [patch_of(side, 64) for side in (13, 25, 2)] == [1, 5, 1]  # 169 tokens rather than 1
    assert table["patch of base"] == [patch_of(side, 256) for side in latent]


@pytest.mark.parametrize(("side", "fit"), [(45, 44), (63, 60), (90, 88), (300, 288), (3, 8)])
def test_a_side_that_nothing_divides_names_one_that_fits(side: int, fit: int) -> None:
    with pytest.raises(UsageError, match=f"--resize {fit}"):
        downsample_of(side)
    assert downsample_of(fit)


def test_images_that_are_not_square_name_a_size() -> None:
    images = image_data(torch.zeros(2, 3, 45, 64, dtype=torch.uint8), torch.zeros(2, dtype=torch.long), ("a",), "x", ())
    with pytest.raises(UsageError, match="--resize 44"):
        shape_of(images)


def test_a_run_records_what_was_chosen_and_flags_override(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """50 images without classes; config.yaml alone makes the same task, and resuming is no other run."""
    data, out = folder(tmp_path / "images", 50, (28, 28)), tmp_path / "tokenizer"
    call = ["small", "--data", str(data), "--out", str(out), "--steps", "3", "--model.width=16"]
    train_tokenizer.command(call)
    assert "small for 28x28 grey: downsample 4, width 16, 49 tokens, batch 64" in capsys.readouterr().out
    config = read_yaml(out / "config.yaml")
    assert (config["model"]["width"], config["model"]["downsample"], config["train"]["steps"]) == (16, 4, 3)
    assert train_tokenizer.read_task(["--config", str(out / "config.yaml")]) == train_tokenizer.read_fitted(call)[0]
    train_tokenizer.command([*call, "--resume", "auto"])
    model = tmp_path / "model"
    train_latent.command(["small", "--tokenizer", str(out), "--out", str(model), "--steps", "2", "--batch-size", "8"])
    assert "small for latents 3x7x7: patch 1, 49 tokens, width 96, depth 4, batch 8" in capsys.readouterr().out
    assert read_yaml(model / "config.yaml")["model"]["dit"]["patch"] == 1


@pytest.mark.parametrize(
    ("command", "needs"), [(train_tokenizer, "--out and --data"), (train_latent, "--out and --tokenizer")]
)
def test_what_a_recipe_for_any_images_needs_is_named_with_a_value(command: Any, needs: str) -> None:
    with pytest.raises(UsageError, match=f"needs {needs}") as caught:
        command.command(["small"])
    assert "--out runs/mine" in caught.value.fix


def test_a_dry_run_needs_no_images(capsys: pytest.CaptureFixture[str]) -> None:
    images = ["--data", "nowhere/at/all", "--resize", "32", "--channels", "1"]
    train_tokenizer.command(["small", *images, "--out", "runs/none", "--dry-run"])
    assert "parameters" in capsys.readouterr().out


def test_the_help_names_all_that_is_computed() -> None:
    """Whatever differs between two sizes of images is said to come from them."""
    for make, sizes in ((GENERIC_TOKENIZERS, TOKENIZER_SIZES),):
        for recipe in make.values():
            tasks = [flat(to_dict(recipe(Shape(c, side)))) for side in SIDES for c in (1, 3)]
            differing = {key for task in tasks for key in task if task[key] != tasks[0][key]} - {"model.levels"}
            assert differing <= {*sizes}
    for recipe in GENERIC_LATENTS.values():
        tasks = [flat(to_dict(recipe((c, side, side)))) for side in (4, 7, 8, 12, 14, 16, 32) for c in (3, 6)]
        assert {key for task in tasks for key in task if task[key] != tasks[0][key]} <= {*LATENT_SIZES}
