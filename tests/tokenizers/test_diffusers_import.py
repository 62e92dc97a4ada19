"""Imported tokenizers are the diffusers models they came from: every value, from every kind of file, or a useful refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers_models import AUTOENCODER
from safetensors.torch import load_file, save_file
from torch import Tensor

from midway.tokenizers import weights
from midway.tokenizers.diffusers_import import import_tokenizer, published_statistics, read_model
from midway.tokenizers.kl import KL
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS: dict[str, Any] = {**AUTOENCODER, "latent_channels": 4}
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
}
CODES = {**BLOCKS, "num_vq_embeddings": 24, "vq_embed_dim": 3}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "kl": (AutoencoderKL, BLOCKS),
    "kl-bare": (AutoencoderKL, {**BLOCKS, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.5}),
    "kl-grey": (AutoencoderKL, {**BLOCKS, "in_channels": 1, "out_channels": 1}),
    "tiny": (AutoencoderTiny, TINY),
    "vq": (VQModel, CODES),
    "vq-spatial": (
        VQModel,
        {
            **CODES,
            "vq_embed_dim": 4,
            "norm_type": "spatial",
            "lookup_from_codebook": True,
            "block_out_channels": (32, 32),
        },
    ),
}
POSTERIOR = [name for name, (kind, _) in MODELS.items() if kind is AutoencoderKL]
VQ = [name for name, (kind, _) in MODELS.items() if kind is VQModel]


def diffusers_model(name: str, **options: Any) -> Any:
    """A diffusers model whose weights are all random: none is left at the zero or one it starts with."""
    kind, config = MODELS[name]
    torch.manual_seed(3)
    model = kind(**{**config, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if kind is VQModel:  # spread over what the encoder gives
            model.quantize.embedding.weight.copy_(
                model.encode(pictures(model)).latents.transpose(0, 1).flatten(1).T[:24]
            )
    return model


def pictures(model: Any, count: int = 3, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return 2 * torch.rand(count, model.config.in_channels, size, size, generator=generator) - 1


def grid(model: Any, tokenizer: ImageTokenizer) -> Tensor:
    """Something to decode, far enough out for the tiny decoder's tanh to matter."""
    return 3 * torch.randn(2, *tokenizer.latent_shape, generator=torch.Generator().manual_seed(1))


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


# ---- the same values ----


@pytest.mark.parametrize("name", [*POSTERIOR, "tiny"])
@torch.no_grad()
def test_a_continuous_autoencoder_gives_the_same_latents_and_the_same_images(name: str, tmp_path: Path) -> None:
    model = diffusers_model(name)
    tokenizer, x = import_tokenizer(saved(model, tmp_path), 32), pictures(model)
    encoded, z = model.encode(x), grid(model, tokenizer)
    latents = encoded.latents if name == "tiny" else encoded.latent_dist.mean
    assert torch.equal(tokenizer.raw_latents(x), latents)
    assert torch.equal(tokenizer.decode(z), model.decode(z).sample)
    assert torch.equal(tokenizer(x).reconstruction, model.decode(latents).sample)
    if name == "tiny":
        assert not torch.equal(tokenizer(x).reconstruction, model(x).sample), "whose forward rounds to bytes"
    else:
        assert isinstance(tokenizer.quantizer, KL)
        mean, log_variance = tokenizer.quantizer.moments(tokenizer.encode(x))
        assert torch.equal(mean, latents) and torch.equal(log_variance, encoded.latent_dist.logvar)
        assert torch.equal(tokenizer(x).reconstruction, model(x).sample)


@pytest.mark.parametrize("name", VQ)
@torch.no_grad()
def test_a_vq_model_gives_the_same_indices_and_the_same_images(name: str, tmp_path: Path) -> None:
    model = diffusers_model(name)
    tokenizer, x = import_tokenizer(saved(model, tmp_path), 32), pictures(model)
    h, indices = model.encode(x).latents, tokenizer.encode_indices(x)
    assert torch.equal(tokenizer.raw_latents(x), h)
    assert torch.equal(indices, model.quantize(h)[2][2].view(3, 16, 16))
    assert len(indices.unique()) > 12, "or equal indices would say little"
    code = model.quantize.embedding.weight[indices].movedim(-1, 1).contiguous()  # as there
    exact = model.decoder(model.post_quant_conv(code), code if name == "vq-spatial" else None)
    assert torch.equal(tokenizer.decode_indices(indices), exact)
    assert torch.equal(tokenizer(x).reconstruction, exact)
    # theirs sums in another order, and without lookup its codes are z + (e - z), rounded
    lookup = {"force_not_quantize": True, "shape": (3, 16, 16, code.shape[1])}
    theirs = model.decode(indices.flatten(), **lookup) if model.config.lookup_from_codebook else model.decode(h)
    torch.testing.assert_close(exact, theirs.sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_our_artefact_is_read_back_bit_for_bit_without_the_original(name: str, tmp_path: Path) -> None:
    model = diffusers_model(name)
    tokenizer, x = import_tokenizer(model, 32), pictures(model)
    tokenizer.set_latent_statistics(
        torch.full_like(tokenizer.latent_mean, 0.3), torch.full_like(tokenizer.latent_std, 2)
    )
    again = ImageTokenizer.from_pretrained(saved(tokenizer, tmp_path / "ours")).eval()  # pyright: ignore
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["foreign"]["class"] == type(model).__name__
    assert again.config["foreign"] == tokenizer.config["foreign"]
    assert again.state_dict().keys() == tokenizer.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in tokenizer.state_dict().items())
    assert torch.equal(again.encode(x), tokenizer.encode(x))
    assert torch.equal(
        again.decode_latents(again.encode_latents(x)), tokenizer.decode_latents(tokenizer.encode_latents(x))
    )


@torch.no_grad()
def test_the_size_of_images_is_the_callers() -> None:
    model = diffusers_model("kl")
    tokenizer, x = import_tokenizer(model, 48), pictures(model, size=48)
    assert (tokenizer.image_shape, tokenizer.latent_shape) == ((3, 48, 48), (4, 24, 24))
    assert torch.equal(tokenizer.raw_latents(x), model.encode(x).latent_dist.mean)


@pytest.mark.parametrize("name", ["kl", "vq"])
def test_a_model_is_copied_and_not_shared(name: str) -> None:
    model = diffusers_model(name).half()
    tokenizer = import_tokenizer(model, 32)
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    assert {p.dtype for p in tokenizer.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, tokenizer.state_dict()[key]) for key, value in before.items())


@torch.no_grad()
def test_half_precision_files_and_old_names_of_attention_weights_are_read(tmp_path: Path) -> None:
    """to_q, to_k, to_v, to_out.0 were query, key, value, proj_attn: Stable Diffusion's files still say so."""
    model = diffusers_model("kl").half()
    saved(model, tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(path)
    for new, name in old.items():
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in state.items()}
    assert any("proj_attn" in key for key in state)
    save_file(state, path)
    x = pictures(model)
    expected = model.float().encode(x).latent_dist.mean
    assert torch.equal(import_tokenizer(tmp_path, 32, subfolder="vae").raw_latents(x), expected)


# ---- statistics ----


@pytest.mark.parametrize(
    ("name", "options", "mean", "std"),
    [
        ("kl", {}, [0.0] * 4, [1 / 0.18215] * 4),
        ("kl", {"shift_factor": 0.1159, "scaling_factor": 0.3611}, [0.1159] * 4, [1 / 0.3611] * 4),
        (
            "kl",
            {"latents_mean": [1.0, 2, 3, 4], "latents_std": [5.0, 6, 7, 8], "scaling_factor": 0.5},
            [1, 2, 3, 4],
            [5, 6, 7, 8],
        ),
        ("tiny", {}, [0.0] * 4, [1.0] * 4),
        ("tiny", {"shift_factor": 0.5, "scaling_factor": 0.25}, [0.5] * 4, [4.0] * 4),
    ],
)
@torch.no_grad()
def test_published_scaling_standardises_the_latents(
    name: str, options: dict[str, Any], mean: list[float], std: list[float]
) -> None:
    model = diffusers_model(name, **options)
    tokenizer, x = import_tokenizer(model, 32), pictures(model)
    torch.testing.assert_close(tokenizer.latent_mean, torch.tensor(mean, dtype=torch.float32))
    torch.testing.assert_close(tokenizer.latent_std, torch.tensor(std, dtype=torch.float32))
    raw = model.encode(x).latents if name == "tiny" else model.encode(x).latent_dist.mean
    expected = (raw.double() - torch.tensor(mean).double().view(-1, 1, 1)) / torch.tensor(std).double().view(-1, 1, 1)
    torch.testing.assert_close(tokenizer.encode_latents(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_latents_without_published_statistics_have_to_be_measured() -> None:
    model = diffusers_model("vq")
    with pytest.raises(ValueError, match="have not been measured"):
        import_tokenizer(model, 32).encode_latents(pictures(model))
    assert published_statistics({"class": "AutoencoderKL", "scaling_factor": None}) is None


# ---- fine-tuning ----


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_recomputed_activations_change_no_gradient(name: str) -> None:
    """Every weight of the networks and the codes get a gradient."""
    model = diffusers_model(name)
    x = pictures(model)
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(2)) if name in POSTERIOR else None
    if name in VQ:
        noise = torch.zeros(3, 1, 16, 16)
    gradients = []
    for recomputed in (False, True):
        tokenizer = import_tokenizer(model, 32).train()
        for part in tokenizer.modules():
            if recomputed and hasattr(part, "gradient_checkpointing"):
                part.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]
        out = tokenizer(x, noise)
        ((out.reconstruction - x).square().mean() + out.quantized.loss).backward()
        gradients.append({key: p.grad for key, p in tokenizer.named_parameters()})
        assert all(g is not None and g.isfinite().all() for g in gradients[-1].values())
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)
    assert sum(bool((g != 0).any()) for g in gradients[0].values()) > 0.9 * len(gradients[0])  # type: ignore[operator]


def test_the_first_training_step_keeps_the_imported_codes() -> None:
    model = diffusers_model("vq")
    tokenizer = import_tokenizer(model, 32).train()
    tokenizer.start(pictures(model))
    tokenizer(pictures(model), torch.zeros(3, 1, 16, 16))
    tokenizer.update()
    assert torch.equal(tokenizer.quantizer.codebook, model.quantize.embedding.weight)  # pyright: ignore


# ---- refusals ----


def changed(folder: Path, **options: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    return folder


def test_pickled_weights_raise(tmp_path: Path) -> None:
    diffusers_model("tiny").save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises(
        ValueError,
        match=r"no diffusion_pytorch_model\.safetensors, and pickled weights .* are not loaded.*\n?.*convert",
    ):
        import_tokenizer(tmp_path, 32)


def test_what_cannot_be_found_or_read_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(diffusers_model("tiny"), tmp_path / "tiny")
    with pytest.raises(
        ValueError, match="of class 'UNet2DModel'; choose one of: AutoencoderKL, AutoencoderTiny, VQModel"
    ):
        import_tokenizer(changed(folder, _class_name="UNet2DModel"), 32)
    with pytest.raises(ValueError, match=r"do not fit .* AutoencoderTiny has \{'missing keys': \['decoder"):
        import_tokenizer(changed(folder, _class_name="AutoencoderTiny", num_decoder_blocks=[1, 1, 2]), 32)
    with pytest.raises(ValueError, match="do not fit"):
        import_tokenizer(changed(folder, num_decoder_blocks=[1, 1, 1], latent_channels=5), 32)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="has no configuration"):
        read_model(folder)
    with pytest.raises(ValueError, match="empty/vae has no configuration"):
        (tmp_path / "empty").mkdir()
        read_model(tmp_path / "empty", "vae")

    def offline(*arguments: object, **options: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(weights.huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"someone/vae has no configuration .*connect.*Hub id, which needs a network"):
        import_tokenizer("someone/vae", 32)


def test_other_modules_raise() -> None:
    with pytest.raises(ValueError, match="the model is of class Conv2d; choose one of"):
        import_tokenizer(torch.nn.Conv2d(1, 1, 1), 32)


@pytest.mark.parametrize("size", [30, 0, 2])
def test_sizes_that_the_networks_cannot_halve_raise(size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size is {size}; this AutoencoderTiny makes sides 4 times smaller"):
        import_tokenizer(diffusers_model("tiny"), size)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kl", {"out_channels": 1}, "3 channels in and 1 out"),
        ("vq", {"norm_type": "spatial"}, "'spatial' with codes of 3 and latents of 4"),
        ("vq", {"norm_type": "ada_group", "vq_embed_dim": 4}, "norm_type 'ada_group'"),
        (
            "tiny",
            {"num_decoder_blocks": [1, 1], "decoder_block_out_channels": [8, 8]},
            "4 times smaller.*2 times larger",
        ),
        ("kl", {"down_block_types": ["DownEncoderBlock2D"]}, "1 down blocks, 2 up blocks and 2 widths"),
        ("kl", {"block_size": 3}, "has no option block_size: upgrade diffusers"),
        ("kl", {"norm_num_groups": 3}, "diffusers cannot build this AutoencoderKL .*divisible"),
        ("kl", {"class": "AutoencoderDC"}, "class is 'AutoencoderDC'; choose one of"),
    ],
)
def test_networks_that_cannot_be_run_raise(name: str, options: dict[str, Any], message: str) -> None:
    foreign = {"class": MODELS[name][0].__name__, **MODELS[name][1], **options}
    with pytest.raises(ValueError, match=message):
        ImageTokenizer(3, 32, downsample=2, quantizer={"type": "kl", "dim": 4}, network="diffusers", foreign=foreign)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 1}, "need .*not"),
        ({"downsample": 4}, "need .*not"),
        ({"quantizer": {"type": "kl", "dim": 3}}, "need .*not"),
        ({"quantizer": {"type": "identity", "dim": 4}}, "need .*not"),
        ({"foreign": None}, "only it, needs foreign"),
        ({"network": "conv"}, "only it, needs foreign"),
    ],
)
def test_a_description_that_does_not_fit_its_networks_raises(options: dict[str, Any], message: str) -> None:
    fitting: dict[str, Any] = {
        "in_channels": 3,
        "image_size": 32,
        "downsample": 2,
        "quantizer": {"type": "kl", "dim": 4, "weight": 1e-3},
        "network": "diffusers",
        "foreign": {"class": "AutoencoderKL", **BLOCKS},
    }
    assert ImageTokenizer(**fitting).config["foreign"]["scaling_factor"] == 0.18215, "defaults are written out"
    with pytest.raises(ValueError, match=message):
        ImageTokenizer(**{**fitting, **options})


def test_a_tiny_autoencoder_of_one_resolution_is_no_pixel_model() -> None:
    one = {"num_encoder_blocks": (1,), "num_decoder_blocks": (1,), "latent_channels": 3}
    widths = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    model = diffusers_model("tiny", **one, **widths)
    with torch.no_grad():
        x = pictures(model, size=8)
        assert torch.equal(import_tokenizer(model, 8).raw_latents(x), model.encode(x).latents)
