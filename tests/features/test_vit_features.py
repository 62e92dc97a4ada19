"""DINOv2 and CLIP encoders with random weights: which token, which resize, which position embedding, and the same bits."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tensors import pixels
from torch import Tensor
from torch.nn import functional as F

from midway.gen.core.errors import DataError
from midway.gen.core.files import state_hash
from midway.gen.features.vit import (
    ENCODERS,
    IMAGENET,
    OPENAI,
    VisionTransformer,
    build_encoder,
    open_vision_transformer,
    resampled,
)

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK = 2


@functools.cache
def _random_state(name: str) -> dict[str, Tensor]:
    """Every tensor drawn, so that each matters: norms and layer scales about 1, all else about 0."""
    encoder = ENCODERS[name]
    with torch.device("meta"):
        classes = encoder.dim if encoder.projected else 0
        network = timm.create_model(encoder.architecture, img_size=encoder.size, num_classes=classes)
    generator = torch.Generator().manual_seed(0)

    def draw(key: str, value: Tensor) -> Tensor:
        drawn = torch.randn(value.shape, generator=generator)
        if value.dim() == 1 and ("norm" in key or "gamma" in key) and "bias" not in key:
            return 1 + 0.1 * drawn
        return drawn if key == "pos_embed" else 0.02 * drawn

    return {key: draw(key, value) for key, value in network.state_dict().items()}


def _filled(architecture: str, state: dict[str, Tensor], **options: Any) -> Any:
    """timm's network with these tensors."""
    with torch.device("meta"):
        network = timm.create_model(architecture, **options)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _file(name: str, folder: Path) -> Path:
    save_file(_random_state(name), folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = _file("clip-vitb32", tmp_path_factory.mktemp("clip"))
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def clip(clip_file: Path) -> VisionTransformer:
    return open_vision_transformer("clip-vitb32", clip_file, block=BLOCK)


def _prepared(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images as the encoders want them, written again."""
    resized = (
        F.interpolate(images.to(torch.float32), size=224, mode="bicubic", antialias=True, align_corners=False) / 255
    )
    return torch.stack([(resized[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)


def test_clip_projects_the_class_token(clip: VisionTransformer, clip_file: Path) -> None:
    state = _random_state("clip-vitb32")
    headless = {key: value for key, value in state.items() if "head" not in key}
    network = _filled("vit_base_patch32_clip_quickgelu_224", headless, num_classes=0)
    tokens = network.forward_features(_prepared(pixels(BLOCK, 3, 32), *OPENAI))
    expected = tokens[:, 0] @ state["head.weight"].T + state["head.bias"]
    found = clip.features(pixels(BLOCK, 3, 32))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.shape == (BLOCK, clip.dim) == (BLOCK, 512)
    assert found.std() > 0.05
    plain = _filled("vit_base_patch32_clip_224", state, num_classes=512)  # GELU: not what OpenAI trained
    assert (plain(_prepared(pixels(BLOCK, 3, 32), *OPENAI)) - expected).abs().max() > 1e-3


def test_bits_do_not_depend_on_the_batch_autocast_or_grey(clip: VisionTransformer) -> None:
    images = pixels(7, 1, 32)  # four blocks, of which the last is padded
    whole = clip.features(images)
    assert torch.equal(clip.features(images[:3]), whole[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clip.features(images[4:].expand(-1, 3, -1, -1)), whole[4:])
    assert whole.dtype == torch.float32
    assert clip.activations(images[:1]).logits is None
    assert not clip.has_logits
    assert clip.features(images[:0]).shape == (0, 512)


def test_the_name_follows_the_weights(clip: VisionTransformer, clip_file: Path, tmp_path: Path) -> None:
    assert re.fullmatch(r"clip-vitb32@[0-9a-f]{12}\+bicubic-224", clip.name)
    assert clip.label == f"Fréchet distance ({clip.name})"
    state = dict(_random_state("clip-vitb32"))
    torch.save(state, tmp_path / "same.pth")
    random_state = torch.random.get_rng_state()
    assert open_vision_transformer("clip-vitb32", tmp_path / "same.pth").name == clip.name
    assert torch.equal(torch.random.get_rng_state(), random_state)
    with pytest.raises(DataError, match=r"head\.bias int64"):
        build_encoder(ENCODERS["clip-vitb32"], {**state, "head.bias": state["head.bias"].long()}, tmp_path)
    state["head.bias"] = state["head.bias"] + 1
    other = build_encoder(ENCODERS["clip-vitb32"], state, tmp_path)
    assert state_hash("clip-vitb32", other.state_dict()) not in clip.name
    (tmp_path / "same.pth").unlink()


@pytest.mark.parametrize("name", ["clip-vitl14", "dinov2-vitb14"])
def test_weights_of_other_networks_raise(name: str, clip_file: Path) -> None:
    with pytest.raises(DataError, match=f"(?s)model.safetensors.*not those of {name}"):
        open_vision_transformer(name, clip_file)


def _dinov2_positions(positions: Tensor) -> Tensor:
    """The 256 positions of 224 pixels as the authors' code makes them: bicubic (a = -3/4) at sources (i + 1/2) 37/16.1 - 1/2."""
    grid = positions[0, 1:].double().view(37, 37, -1)

    def weight(t: float) -> float:
        t = abs(t)
        if t <= 1:
            return 1.25 * t**3 - 2.25 * t**2 + 1
        return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    matrix = torch.zeros(16, 37, dtype=torch.float64)
    for i in range(16):
        source = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(int(source) - 1, int(source) + 3):
            matrix[i, min(max(j, 0), 36)] += weight(source - j)
    return torch.einsum("ai,bj,ijd->abd", matrix, matrix, grid).reshape(1, 256, -1)


def test_positions_are_resampled_as_the_authors_do() -> None:
    positions = torch.randn(1, 1 + 37 * 37, 3, generator=torch.Generator().manual_seed(0))
    found = resampled(positions, 16)
    assert torch.equal(found[:, :1], positions[:, :1])
    torch.testing.assert_close(found[:, 1:].double(), _dinov2_positions(positions), rtol=0, atol=1e-5)
    from timm.layers.pos_embed import resample_abs_pos_embed

    theirs: Any = resample_abs_pos_embed(positions, [16, 16])
    assert (theirs - found).abs().max() > 0.5  # another embedding


def test_dinov2_gives_the_class_token_after_the_last_norm(tmp_path: Path) -> None:
    path = _file("dinov2-vitb14", tmp_path)
    extractor = open_vision_transformer("dinov2-vitb14", path, block=1)
    state = dict(_random_state("dinov2-vitb14"))
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], _dinov2_positions(state["pos_embed"]).float()], dim=1)
    network = _filled("vit_base_patch14_dinov2", state, img_size=224, num_classes=0, global_pool="")
    normed: list[Tensor] = []
    network.norm.register_forward_hook(lambda _, __, output: normed.append(output[:, 0]))
    network(_prepared(pixels(1, 3, 32), *IMAGENET))
    torch.testing.assert_close(extractor.features(pixels(1, 3, 32)), normed[0], rtol=1e-3, atol=1e-3)
    assert normed[0].std() > 0.1
    publishers = {
        **_random_state("dinov2-vitb14"),
        "mask_token": torch.zeros(1, 768),
    }  # as the authors' own file has them
    path.unlink()
    theirs = build_encoder(ENCODERS["dinov2-vitb14"], publishers, path)
    assert state_hash("dinov2-vitb14", theirs.state_dict()) in extractor.name


@pytest.mark.parametrize(
    ("name", "repository", "dim"),
    [
        ("dinov2-vitb14", "timm/vit_base_patch14_dinov2.lvd142m", 768),
        ("dinov2-vitl14", "timm/vit_large_patch14_dinov2.lvd142m", 1024),
        ("clip-vitb32", "timm/vit_base_patch32_clip_224.openai", 512),
        ("clip-vitl14", "timm/vit_large_patch14_clip_224.openai", 768),
    ],
)
def test_encoders_are_those_that_timm_publishes(name: str, repository: str, dim: int) -> None:
    encoder = ENCODERS[name]
    tag = repository.rsplit(".", 1)[1]
    config = timm.models.get_pretrained_cfg(f"{encoder.architecture}.{tag}")
    assert encoder.repository == config.hf_hub_id == repository
    assert (config.mean, config.std) == encoder.mean_std
    assert (config.input_size[1], config.interpolation) == (encoder.size, "bicubic")
    with torch.device("meta"):
        network = timm.create_model(encoder.architecture, num_classes=config.num_classes)
    assert encoder.dim == dim == (config.num_classes or network.num_features)
