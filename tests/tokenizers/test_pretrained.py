"""A folder of `save_pretrained` is loaded bit for bit, or not at all: every tensor, every option, and no pickle."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import DAMAGES, damage, read, shard
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers_models import AUTOENCODER, unet
from endless import ENDLESS, guarded
from safetensors import SafetensorError
from safetensors.torch import save_file
from traps import Trap

from midway.gen.core.errors import DataError
from midway.gen.diffusion.load import read_tokenizer
from midway.tokenizers.arguments import check_arguments
from midway.tokenizers.diffusers_import import read_model
from midway.tokenizers.pretrained import read_diffusers
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

FILE, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
KINDS: dict[str, dict[str, Any]] = {
    "vq": {"quantizer": {"type": "vq", "codebook_size": 8, "dim": 3}, "width": 8, "blocks": 1},
    "vit": {"network": "vit", "width": 16, "depth": 1, "heads": 2, "latent_tokens": 3},
    "diffusers": {
        "in_channels": 3,
        "image_size": 16,
        "quantizer": {"type": "kl", "dim": 4},
        "network": "diffusers",
        "foreign": {"class": "AutoencoderKL", **AUTOENCODER, "latent_channels": 4},
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tokenizer of each kind, an autoencoder and a U-Net of diffusers."""
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    for name, options in KINDS.items():
        ImageTokenizer(**options).save_pretrained(root / name)
    AutoencoderKL(**AUTOENCODER, latent_channels=2).save_pretrained(root / "autoencoder")
    import diffusers

    unet(diffusers).save_pretrained(root / "unet")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tokenizer with a learned codebook."""
    return Path(shutil.copytree(folders["vq"], tmp_path / "vq"))


def refused(folder: Path, words: str = ".") -> None:
    """By from_pretrained, and by the command line with the name of the folder and what to do."""
    with pytest.raises((ValueError, OSError, SafetensorError), match=words):
        ImageTokenizer.from_pretrained(folder)
    with pytest.raises(DataError, match=str(folder)):
        read_tokenizer(folder)


def same(folder: Path, expected: Path, **options: Any) -> None:
    """Both hold the same numbers in the same types."""
    first, second = (ImageTokenizer.from_pretrained(path, **options).state_dict() for path in (folder, expected))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_list_of_anything_is_a_list() -> None:
    def build(levels: list, shape: tuple = ()) -> None:  # pyright: ignore[reportMissingTypeArgument, reportUnusedParameter]
        pass

    check_arguments(build, {"levels": [1, "a"], "shape": [2]}, "it")
    for wrong in ({"levels": 3}, {"levels": None}, {"levels": [], "shape": "ab"}):
        with pytest.raises(ValueError, match="it takes"):
            check_arguments(build, wrong, "it")


# ---- tensors ----


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_tensor_raises(name: str, sharded: bool, folder: Path) -> None:
    damage(folder / FILE, name)
    if sharded:
        shard(folder / FILE)
    refused(folder)


@pytest.mark.parametrize("name", [n for n in DAMAGES if "bfloat16" not in n])
@pytest.mark.parametrize(("source", "kind"), [("autoencoder", AutoencoderKL), ("unet", UNet2DModel)])
def test_so_it_does_in_models_of_diffusers(
    name: str, source: str, kind: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folders[source], tmp_path / source))
    assert read_diffusers(kind, copy).dtype == torch.float32
    damage(copy / FILE, name)
    with pytest.raises(ValueError):
        read_diffusers(kind, copy)
    if source == "autoencoder":
        with pytest.raises(ValueError):
            read_model(copy)


def test_a_counter_of_another_type_raises(folder: Path) -> None:
    tensors, header = read(folder / FILE)
    for name, kind in (("latents_measured", torch.float32), ("bottleneck.step", torch.int32)):
        save_file({**tensors, name: tensors[name].to(kind)}, folder / FILE, header)
        refused(folder, name)


@pytest.mark.parametrize("name", KINDS)
def test_whole_and_in_parts_it_is_the_same(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders[name], tmp_path / name))
    shard(copy / FILE)
    assert len(list(copy.glob("*.safetensors"))) == 2
    same(copy, folders[name])


def test_parts_by_diffusers_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    ImageTokenizer.from_pretrained(folders["vit"]).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same(tmp_path, folders["vit"])


INDICES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a part that is not there": lambda index: {
        "weight_map": {**index["weight_map"], "another.weight": "gone.safetensors"}
    },
    "a tensor that is not there": lambda index: {
        "weight_map": {**index["weight_map"], "another.weight": next(iter(index["weight_map"].values()))}
    },
    "a tensor left out": lambda index: {"weight_map": dict(list(index["weight_map"].items())[1:])},
    "one part alone": lambda index: {"weight_map": dict(sorted(index["weight_map"].items(), key=lambda p: p[1])[:3])},
    "a file elsewhere": lambda index: {"weight_map": dict.fromkeys(index["weight_map"], "../vq/x.safetensors")},
    "no map": lambda index: {"metadata": {}},
    "a list": lambda index: [],
    "numbers": lambda index: {"weight_map": dict.fromkeys(index["weight_map"], 3)},
}


@pytest.mark.parametrize("change", INDICES.values(), ids=INDICES)
def test_an_index_that_its_parts_do_not_fit_raises(change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    shard(folder / FILE)
    (folder / INDEX).write_text(json.dumps(change(json.loads((folder / INDEX).read_text()))))
    refused(folder)


# ---- types ----


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_where_it_is_meant(kind: torch.dtype, folder: Path, tmp_path: Path) -> None:
    """By torch_dtype; a file of whole precision gives the same numbers."""
    ImageTokenizer.from_pretrained(folder, torch_dtype=kind).save_pretrained(tmp_path / "half")
    refused(tmp_path / "half", str(kind).removeprefix("torch."))
    same(tmp_path / "half", folder, torch_dtype=kind)
    loaded = ImageTokenizer.from_pretrained(tmp_path / "half", torch_dtype=kind)
    assert {p.dtype for p in loaded.encoder.parameters()} == {kind}
    assert loaded.latent_mean.dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_published_half_precision_becomes_float32(kind: torch.dtype, folders: dict[str, Path], tmp_path: Path) -> None:
    whole = read_model(folders["autoencoder"])
    AutoencoderKL.from_pretrained(folders["autoencoder"], torch_dtype=kind).save_pretrained(tmp_path)
    state = whole.state_dict()
    for name, value in read_model(tmp_path).state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].to(kind).float())


def test_loading_draws_no_random_numbers(folders: dict[str, Path]) -> None:
    before = torch.get_rng_state()
    for name in KINDS:
        ImageTokenizer.from_pretrained(folders[name])
    assert torch.equal(torch.get_rng_state(), before)


# ---- pickles ----


def test_a_pickle_is_not_loaded_and_never_runs(folder: Path, tmp_path: Path) -> None:
    """An honest one neither, alone or beside half of the tensors; and none by the name of the safetensors."""
    tensors, _ = read(folder / FILE)
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    damage(folder / FILE, "half the tensors")
    refused(folder)
    (folder / FILE).unlink()
    refused(folder, "pickled weights")
    torch.save(Trap(tmp_path / "sprung"), folder / "diffusion_pytorch_model.bin")
    torch.save(Trap(tmp_path / "sprung"), folder / FILE)
    refused(folder)
    assert not (tmp_path / "sprung").exists()


def test_half_a_file_an_empty_one_and_a_folder_in_its_place_raise(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"{}"):
        (folder / FILE).write_bytes(damaged)
        refused(folder)
    (folder / FILE).unlink()
    (folder / FILE).mkdir()
    refused(folder)


# ---- options ----


WRONG: dict[str, Any] = {
    "a string for a truth value": {"attention": "no"},
    "a number for a truth value": {"snap_on_decode": 0},
    "a string for a number": {"width": "8"},
    "a truth value for a number": {"blocks": True},
    "a fraction": {"width": 8.5},
    "null": {"image_size": None},
    "a negative number": {"width": -8},
    "nothing": {"width": 0},
    "a huge number": {"width": 10**12},
    "a number beyond 64 bits": {"width": 10**30},
    "many blocks": {"blocks": 10**9},
    "another size": {"width": 16},
    "a list for a number": {"blocks": [1]},
    "numbers in a string": {"multipliers": "12"},
    "strings in a list": {"multipliers": ["1"]},
    "no quantizer's name": {"quantizer": {"codebook_size": 8, "dim": 3}},
    "another quantizer": {"quantizer": {"type": "fsq", "levels": [8, 5, 5]}},
    "a quantizer's name alone": {"quantizer": "vq"},
    "a list of names": {"quantizer": {"type": ["vq"], "codebook_size": 8, "dim": 3}},
    "a string for a weight": {"quantizer": {"type": "vq", "codebook_size": 8, "dim": 3, "commitment": "0.25"}},
    "a truth value for a size": {"quantizer": {"type": "vq", "codebook_size": 8, "dim": True}},
    "an unknown option": {"widht": 8},
    "another class": {"_class_name": "AutoencoderKL"},
    "no class": {"_class_name": None},
    "another network": {"network": "vit"},
    "a network of none": {"network": "diffusers"},
    "a foreign list": {"foreign": [1]},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_an_option_of_another_type_or_size_raises(change: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "[" * 100_000, '{"a":' * 100_000, "\0\1", "{}"])
def test_a_configuration_that_is_no_object_raises(
    text: str, folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    (folder / "config.json").write_text(text)
    refused(folder)
    copy = Path(shutil.copytree(folders["autoencoder"], tmp_path / "autoencoder"))
    (copy / "config.json").write_text(text)
    with pytest.raises(ValueError):
        read_model(copy)


@pytest.mark.parametrize("key", ["depth", "heads", "latent_tokens", "width"])
def test_a_transformer_far_larger_than_its_weights_is_given_up(
    key: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Before it takes memory, or the time to build a billion blocks."""
    copy = Path(shutil.copytree(folders["vit"], tmp_path / "vit"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, key: 2**31}))
    refused(copy)


@pytest.mark.parametrize("option", ["use_safetensors", "variant", "ignore_mismatched_sizes", "low_cpu_mem_usage"])
def test_options_of_diffusers_that_would_load_otherwise_raise(option: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"without {option}"):
        ImageTokenizer.from_pretrained(folder, **{option: False})  # pyright: ignore[reportArgumentType]


# ---- files that never end ----


LOADERS: dict[str, Callable[[Path], object]] = {"vq": ImageTokenizer.from_pretrained, "autoencoder": read_model}


@pytest.mark.parametrize("kind", [*ENDLESS, "terabytes"])
@pytest.mark.parametrize("name", ["config.json", FILE, INDEX])
@pytest.mark.parametrize("source", LOADERS)
def test_what_is_no_regular_file_is_never_opened(
    folders: dict[str, Path], tmp_path: Path, source: str, name: str, kind: str
) -> None:
    folder = Path(shutil.copytree(folders[source], tmp_path / "copy"))
    (folder / name).unlink(missing_ok=True)
    if kind == "terabytes":
        (folder / name).touch()
        os.truncate(folder / name, 1 << 42)
    else:
        ENDLESS[kind][0](folder / name)
    with pytest.raises((OSError, ValueError), match=r"is not a regular file|more than the limit of"):
        guarded(lambda: LOADERS[source](folder))
    if source == "vq":
        with pytest.raises(DataError, match=r"is not a regular file|more than the limit of"):
            guarded(lambda: read_tokenizer(folder))
