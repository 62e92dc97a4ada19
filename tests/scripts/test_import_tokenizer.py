"""An imported autoencoder is a tokenizer run like any other: evaluated, encoded, and a latent model trains on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers_models import AUTOENCODER
from pipelines import Script
from safetensors.torch import load_file
from stored_latents import encoded

from midway.gen.data.images import to_float
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.diffusion.load import load_model, load_tokenizer, read_tokenizer
from midway.gen.tokenizer.objective import evaluate_tokenizer
from midway.tokenizers import weights

GREY = {**AUTOENCODER, "in_channels": 1, "out_channels": 1}
DIGITS = ("--data", "digits", "--held-out", "0.9")
TINY_FLAGS = ("--steps", 3, "--batch-size", 16, "--warmup", 0, "--log-every", 1, "--preview-every", 0)
SMALL = ("--model.dit.width", 16, "--model.dit.depth", 1, "--model.dit.heads", 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of diffusers: vae, of RGB images, and vq, of grey ones."""
    root = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    AutoencoderKL(**AUTOENCODER, latent_channels=2).save_pretrained(root / "vae")
    VQModel(**GREY, num_vq_embeddings=16).save_pretrained(root / "vq")
    return root


@pytest.mark.slow
def test_an_imported_autoencoder_is_a_run_that_everything_works_on(
    source: Path, tmp_path: Path, script: Script, succeed: Script
) -> None:
    out = tmp_path / "run"
    flags = ("--source", source, "--subfolder", "vae", "--out", out, *DIGITS, "--channels", 3, "--resize", 16)
    done = succeed("import_tokenizer", *flags)
    assert "published: mean 0 0, std 5.49 5.49" in done.out
    tokenizer, data = load_tokenizer(out)
    splits = load_splits(data)
    assert data == DataConfig(held_out=0.9, channels=3, resize=16)
    original: Any = AutoencoderKL.from_pretrained(source / "vae").eval()
    x = to_float(splits.held_out.images[:5])
    with torch.no_grad():
        assert torch.equal(tokenizer.raw_latents(x), original.encode(x).latent_dist.mean)
    latents = encoded(tokenizer, splits.train)
    torch.testing.assert_close(tokenizer.latent_mean, latents.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokenizer.latent_std, latents.std, rtol=1e-5, atol=1e-6)

    quality = evaluate_tokenizer(tokenizer, splits.held_out.images, 64)
    (logged,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert logged == {"step": 0, "final": True, "held_out_mse": quality["mse"], "held_out_psnr": quality["psnr"]}
    assert f"imported weights): mse {quality['mse']:.4g}, psnr {quality['psnr']:.4g}" in done.out
    assert [p.name for p in (out / "samples").iterdir()] == ["reconstructions-imported-000000.png"]
    card = (out / "tokenizer" / "README.md").read_text()
    assert "| weights | imported |" in card and "| source | vae |" in card and str(source) not in card
    assert f"| mean and std of | {len(splits.train.images)} training images" in card
    finished = read_tokenizer(out / "tokenizer").state_dict()
    assert all(torch.equal(value, finished[key]) for key, value in tokenizer.state_dict().items())

    assert script("import_tokenizer", *flags).code == 2, "a second time only with --overwrite"
    succeed("import_tokenizer", *flags, "--overwrite")
    succeed("encode", "--tokenizer", out)
    model = tmp_path / "model"
    succeed("train_latent", "digits-flow", "--tokenizer", out, "--out", model, *TINY_FLAGS, *SMALL)
    inside = load_model(model, torch.device("cpu"))
    assert inside.model.latent_shape == (2, 8, 8)
    with torch.no_grad():
        again = inside.tokenizer.decode_latents(torch.zeros(1, 2, 8, 8))
        assert torch.equal(again, original.decode(latents.mean.view(1, 2, 1, 1).expand(1, 2, 8, 8)).sample)


def test_a_vq_model_has_its_codes_in_the_run(source: Path, tmp_path: Path, succeed: Script) -> None:
    done = succeed("import_tokenizer", "--source", source / "vq", "--out", tmp_path / "run", *DIGITS)
    assert "published: none" in done.out and "bits_per_image 64" in done.out
    codes = load_file(source / "vq" / "diffusion_pytorch_model.safetensors")["quantize.embedding.weight"]
    assert torch.equal(load_tokenizer(tmp_path / "run")[0].state_dict()["bottleneck.codebook"], codes)


def test_without_a_network_a_hub_id_exits_with_3(
    tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise OSError("cannot reach the Hub")

    monkeypatch.setattr(weights.huggingface_hub, "snapshot_download", offline)
    done = script("import_tokenizer", "--source", "someone/vae", *DIGITS, "--out", tmp_path / "run")
    assert done.code == 3
    assert "error: someone/vae cannot be imported\n  why: " in done.err
    assert "cannot reach the Hub" in done.err and "fix: give the directory of a diffusers model" in done.err
