"""midway import-model: a file of weights becomes a run that samples; pickles that hold more than tensors do not run."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers_models import AUTOENCODER
from pipelines import Script
from safetensors.torch import save_file
from test_foreign_layouts import TINY, dit_state, peer

from midway.gen.commands import import_tokenizer
from midway.gen.core.errors import DataError
from midway.gen.core.files import file_hash
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.load import load_model
from midway.gen.foreign.files import read_statistics, read_weights, weights_file

DIGITS = DataConfig(data="digits", held_out=0.9, channels=3, resize=16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(**AUTOENCODER, latent_channels=4).save_pretrained(root / "vae")
    import_tokenizer.run(import_tokenizer.ImportTask(str(root / "vae"), root / "run", data=DIGITS))
    return root / "run"


def test_a_file_becomes_a_run_that_samples(tokenizer: Path, tmp_path: Path, script: Script, succeed: Script) -> None:
    state, file, out = dit_state(), tmp_path / "dit.pt", tmp_path / "run"
    torch.save({"model": state, "ema": state, "args": argparse.Namespace(lr=1)}, file)
    flags = ("--weights", file, "--tokenizer", tokenizer, "--heads", 2, "--out", out)
    done = succeed("import_model", *flags, "--layout", "dit", "--license", "cc-by-nc-4.0")
    assert "without 528 of learned variances" in done.out and "std 5.49 5.49 5.49 5.49" in done.out
    found = load_model(out, CPU)
    assert found.weights == "imported from dit.pt, step 0"
    assert (
        torch.allclose(found.tokenizer.latent_std, torch.tensor(1 / 0.18215)) and not found.tokenizer.latent_mean.any()
    )
    card = (out / "model" / "README.md").read_text()
    assert file_hash(file) in card and "facebookresearch/DiT" in card and "cc-by-nc-4.0" in card
    succeed("sample", "--model", out, "--n", 4, "--nfe", 4, "--guidance", 2, "--out", tmp_path / "x.png")
    assert script("import_model", *flags, "--layout", "dit").code == 2, "a second time only with --overwrite"
    wrong = script("import_model", *flags, "--layout", "diffusers", "--overwrite")
    assert wrong.code == 3 and "--layout dit or sit or lightningdit has exactly these" in wrong.err
    bare = script("import_model", *flags, "--layout", "lightningdit", "--overwrite")
    assert bare.code == 2 and "--latent-statistics latents_stats.pt" in bare.err


def test_latents_of_another_shape_name_the_size(tokenizer: Path, tmp_path: Path, script: Script) -> None:
    theirs = peer(**TINY | {"side": 4})
    theirs.save_pretrained(tmp_path / "transformer")
    flags = ("--weights", tmp_path / "transformer", "--layout", "diffusers", "--tokenizer", tokenizer)
    done = script("import_model", *flags, "--out", tmp_path / "run")
    assert done.code == 2 and "import the tokenizer with --resize 8" in done.err and not (tmp_path / "run").exists()


# ---- files ----


class Runs:
    """A pickle of it runs a command."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_a_pickle_that_runs_code_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": dit_state(), "more": Runs()}, tmp_path / "bad.pt")
    with pytest.raises(DataError, match="cannot be read as weights") as raised:
        read_weights(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists() and "safetensors" in raised.value.fix


def test_files_hold_the_same_in_every_form(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1)}
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    torch.save(state, tmp_path / "plain.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": {"a": torch.zeros(1)}, "ema": wrapped}, tmp_path / "training.pt")
    save_file(state, tmp_path / "weights.safetensors")
    for file in tmp_path.iterdir():
        found = read_weights(file)
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state), file.name


def test_other_files_are_errors(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text(json.dumps({}))
    (tmp_path / "empty.pt").touch()
    for name in ("list.pt", "text.pt", "empty.pt", "absent.pt", "absent.safetensors"):
        with pytest.raises(DataError, match="cannot be read as weights"):
            read_weights(tmp_path / name)
    with pytest.raises(DataError, match="holds no weights"):
        weights_file(tmp_path)


def test_statistics_of_latents_are_read_by_channel(tmp_path: Path) -> None:
    mean, std = torch.randn(1, 3, 1, 1), torch.rand(1, 3, 1, 1)
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    found = read_statistics(tmp_path / "latents_stats.pt")
    assert torch.equal(found[0], mean.flatten()) and torch.equal(found[1], std.flatten())
    torch.save({"mean": mean}, tmp_path / "half.pt")
    with pytest.raises(DataError, match="no statistics"):
        read_statistics(tmp_path / "half.pt")
