"""Model cards hold the measured facts and code that runs; latent statistics are streamed."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from nobody import NOBODY
from safetensors.torch import load_file
from stored_latents import encoded
from torch import Tensor

from midway.gen.cards import parts
from midway.gen.cards.parts import training_rows
from midway.gen.cards.tokenizer import finish, tokenizer_card
from midway.gen.core import files
from midway.gen.core.errors import DataError, DiskError
from midway.gen.core.runs import Run
from midway.gen.data.images import ImageData, load_images
from midway.gen.data.splits import DataConfig, Splits, load_splits
from midway.gen.tokenizer.encoding import latent_statistics
from midway.gen.training.config import TrainConfig
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

QUANTIZERS: dict[str, dict[str, Any]] = {
    "fsq": {"type": "fsq", "levels": [4, 3]},
    "kl": {"type": "kl", "dim": 2},
    "grouped": {"type": "grouped", "base": {"type": "vq", "codebook_size": 16, "dim": 1}, "groups": 2},
}
BITS = {"fsq": "57.3594", "kl": "continuous", "grouped": "128"}
"""16 log2 12; nothing; 16 positions of 2 codes of 4 bits."""


def digits(count: int) -> ImageData:
    data = load_images("digits")
    return replace(data, images=data.images[:count], labels=data.labels[:count])


def tokenizer(name: str = "fsq", measured: bool = True) -> ImageTokenizer:
    torch.manual_seed(0)
    model = ImageTokenizer(width=16, blocks=1, quantizer=QUANTIZERS[name])
    if measured:
        model.set_latent_statistics(torch.tensor([0.25, -1.5]), torch.tensor([0.5, 3.0]))
    return model.eval()


DATA = DataConfig(held_out=0.25, split_seed=7)
TRAINING = TrainConfig(batch_size=256, seed=5, precision="bf16")
ENVIRONMENT = {
    "command": "midway train tokenizer x | tee <log>",
    "python": "3.11.9",
    "hardware": "a machine",
    "git": "abc123-dirty",
    "packages": {"torch": "2.15", "midway": "0.1.0"},
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "environment", lambda: ENVIRONMENT)


@cache
def splits() -> Splits:
    made = load_splits(DATA)
    return replace(made, train=replace(made.train, name="dig|its"))


def make_card(model: ImageTokenizer, weights: Mapping[str, object] | None = None, flip: bool = True) -> str:
    quality = {"mse": 0.0123456, "psnr": 25.125}
    trained = training_rows("averaged", 1234, TRAINING, ("mse 1", "lpips 0.1"))
    return tokenizer_card(model, DATA, splits(), quality, weights or trained, flip)


# ---- statistics ----


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_streamed_statistics_are_those_of_all_latents_at_once(batch_size: int, flip: bool) -> None:
    model, data = tokenizer("kl"), digits(40)
    latents = encoded(model, data, flip=flip)
    mean, std = latent_statistics(model, data.images, batch_size, flip)
    torch.testing.assert_close(mean, latents.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std, latents.std, rtol=1e-6, atol=1e-6)
    plain = latent_statistics(model, data.images, batch_size)
    assert torch.equal(plain[0], mean) == (not flip), "mirrored images count"


def test_statistics_lose_nothing_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean 1e6 times the deviation: sums of float32 squares would give anything."""
    model, values = tokenizer("kl"), torch.randn(30, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    shifted = values.double() * torch.tensor([1e-2, 1.0]).view(2, 1, 1) + torch.tensor([1e4, -5.0]).view(2, 1, 1)
    shifted = shifted.float()
    parts = iter(shifted.split(4))
    monkeypatch.setattr(model, "raw_latents", lambda images: next(parts))
    mean, std = latent_statistics(model, digits(30).images, batch_size=4)
    rows = shifted.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), rows.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(std.double(), rows.std(1), rtol=1e-6, atol=0)


# ---- the card ----


def rows_of(made: str) -> dict[str, str]:
    """As Markdown shows them."""
    found = re.findall(r"^\| (.+?) \| (.*) \|$", made, re.MULTILINE)
    return {name: re.sub(r"\\(.)", r"\1", value) for name, value in found}


def test_every_fact_is_in_the_card() -> None:
    model = tokenizer()
    rows = rows_of(make_card(model))
    assert rows == {
        "network": "conv",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "images": "1 channels, 8x8",
        "latents": "2 channels, 4x4",
        "quantizer": "type fsq, levels [4, 3]",
        "bits per image": "57.3594",
        "latent mean": "0.25 -1.5",
        "latent std": "0.5 3",
        "mean and std of": "2696 training images, mirrored ones counted",
        "name": "dig|its",
        "fingerprint of the training images": splits().train.fingerprint,
        "training images": "1348",
        "held-out images": "449",
        "split": "share 0.25 held out, seed 7",
        "weights": "averaged",
        "optimizer steps": "1234",
        "effective batch": "256",
        "seed": "5",
        "precision": "bf16",
        "losses": "mse 1, lpips 0.1",
        "mse": "0.0123456",
        "psnr": "25.125",
        "command": "midway train tokenizer x | tee <log>",
        "python": "3.11.9",
        "hardware": "a machine",
        "git": "abc123-dirty",
        "packages": "torch 2.15, midway 0.1.0",
    }


def test_the_header_is_yaml_and_the_licence_is_named() -> None:
    _, header, body = make_card(tokenizer()).split("---\n", 2)
    tags = ["image-tokenizer", "fsq"]
    assert yaml.safe_load(header) == {"license": "apache-2.0", "library_name": "midway", "tags": tags}
    assert "# Image tokenizer: fsq, 8x8, dig\\|its\n" in body
    assert "## Quality on 449 held-out images\n" in body
    assert body.endswith("## Licence\n\napache-2.0, for the weights; the licence of the data applies too.\n")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_bits_per_image_count_every_group(name: str) -> None:
    assert rows_of(make_card(tokenizer(name)))["bits per image"] == BITS[name]


def test_imported_weights_have_a_source_and_no_training() -> None:
    rows = rows_of(make_card(tokenizer(), {"weights": "imported", "source": "someone/vae"}, flip=False))
    assert (rows["weights"], rows["source"]) == ("imported", "someone/vae")
    assert rows["mean and std of"] == "1348 training images, mirrored ones counted"
    assert not {"seed", "losses", "effective batch"} & rows.keys()
    assert training_rows("newest", 1, replace(TRAINING, precision="no"), ())["precision"] == "float32"


def test_the_networks_are_named() -> None:
    """Ours, none, or another's."""
    pixels = ImageTokenizer(downsample=1, quantizer={"type": "identity", "dim": 1})
    foreign = {"class": "AutoencoderTiny", "in_channels": 1, "out_channels": 1}
    theirs = ImageTokenizer(
        downsample=8, quantizer={"type": "identity", "dim": 4}, network="diffusers", foreign=foreign
    )
    for model in (pixels, theirs):
        dim = model.quantizer.dim
        model.set_latent_statistics(torch.zeros(dim), torch.ones(dim))
    networks = [rows_of(make_card(model))["network"] for model in (tokenizer(), pixels, theirs)]
    assert networks == ["conv", "none, pixels are the latents", "AutoencoderTiny of diffusers"]


def test_an_unmeasured_tokenizer_gets_no_card() -> None:
    with pytest.raises(DataError, match=r"have not been measured.*\n.*\n.*set_latent_statistics"):
        make_card(tokenizer(measured=False))


# ---- the folder ----


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", "tokenizer", {})


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_lines_of_the_card_load_the_artefact(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenizer(name)
    folder = finish(run, model, make_card(model))
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    block = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(block) == 1
    assert len(block[0].splitlines()) == 5
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(block[0], names)
    grey = torch.zeros(1, 1, 8, 8)
    assert torch.equal(names["latents"], model.encode_latents(grey))
    assert torch.equal(names["images"], model.decode_latents(model.encode_latents(grey)))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_a_newer_tokenizer_replaces_an_older_one_and_leaves_nothing_else(run: Run) -> None:
    before = sorted(run.path.iterdir())
    first, second = tokenizer("fsq"), tokenizer("kl")
    (finish(run, first, make_card(first)) / "extra").write_text("of the older one")
    folder = finish(run, second, make_card(second))
    assert folder == run.path / "tokenizer"
    assert sorted(run.path.iterdir()) == sorted([*before, folder])
    assert "type kl" in (folder / "README.md").read_text()
    assert not (folder / "extra").exists()
    assert weights(folder).keys() == second.state_dict().keys()
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {folder.stat().st_mode & 0o666}


def fail(*arguments: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["save", "card", "disk"])
@pytest.mark.parametrize("older", [False, True])
def test_a_failing_disk_leaves_the_older_one_or_nothing(
    where: str, older: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tokenizer("fsq"), tokenizer("kl")
    if older:
        finish(run, first, make_card(first))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        if where == "save":
            patched.setattr(second, "write", fail)
        else:
            patched.setattr(*((Path, "write_text") if where == "card" else (files, "sync")), fail)
        with pytest.raises(DiskError, match=r"tokenizer was not written.*\n.*No space.*\n.*free space"):
            finish(run, second, make_card(second))
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert [path.name for path in run.path.glob(".*")] == [".lock"]
    finish(run, second, make_card(second))


def test_a_replacement_that_was_killed_between_its_renames_is_undone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tokenizer("fsq"), tokenizer("kl")
    folder = finish(run, first, make_card(first))
    folder.rename(run.path / f".tokenizer.{NOBODY}.old")
    (run.path / f".tokenizer.{NOBODY}.tmp").mkdir()
    monkeypatch.setattr(second, "write", fail)
    with pytest.raises(DiskError):
        finish(run, second, make_card(second))
    assert weights(folder).keys() == first.state_dict().keys()
    assert [path.name for path in run.path.glob(".*")] == [".lock"]
