"""DINOv2 and CLIP image encoders, the networks of FD-DINOv2 and of CLIP distances, built by timm.

    features = norm(ViT((resize_224(x) / 255 - mean) / std))[class token]          DINOv2: Stein et al., arXiv:2306.04675
    features = P norm(ViT(...))[class token], P the projection to CLIP's space     CLIP: Radford et al., arXiv:2103.00020

The feature map has the other tokens, after the same norm and before P.

resize_224 is bicubic with antialiasing, without rounding, as in EDM2's FD-DINOv2 (Karras et al., arXiv:2312.02696); other
aspect ratios are stretched. DINOv2 was trained at 518 pixels: its 37 x 37 position embedding is resampled to 16 x 16 as the
authors' code does (bicubic without antialiasing, at scale 16.1 / 37), not as timm does (antialiased, at 16 / 37), which
would change every feature. CLIP's weights are OpenAI's, whose activation is x sigmoid(1.702 x).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from midway.gen.core.errors import one_line
from midway.gen.core.files import state_hash
from midway.gen.features.extractor import Activations, PublishedExtractor, other_label
from midway.gen.features.weights import (
    Published,
    bad_weights,
    check_floats,
    find_weights,
    not_installed,
    read_weights,
)

SIZE = 224
BLOCK = 32
"""Images per block."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
OFFSET = 0.1
"""Added to the target size by the authors of DINOv2, in the scale at which its position embedding is resampled."""


@dataclass(frozen=True)
class Encoder:
    """A network of timm: `size` pixels in training, `dim` features; `projected` by a linear head from the class token."""

    network: str
    architecture: str
    repository: str
    size: int
    dim: int
    projected: bool
    mean_std: tuple[tuple[float, ...], tuple[float, ...]]

    @property
    def published(self) -> Published:
        """Its weights."""
        return Published(self.network, "model.safetensors", repository=self.repository)


def _dinov2(size: str, word: str, dim: int) -> Encoder:
    name = f"vit_{word}_patch14_dinov2"
    return Encoder(f"dinov2-vit{size}14", name, f"timm/{name}.lvd142m", 518, dim, False, IMAGENET)


def _clip(size: str, word: str, patch: int, dim: int) -> Encoder:
    name, title = f"vit_{word}_patch{patch}_clip", f"clip-vit{size}{patch}"
    return Encoder(title, f"{name}_quickgelu_224", f"timm/{name}_224.openai", SIZE, dim, True, OPENAI)


ENCODERS = {
    encoder.network: encoder
    for encoder in (
        _dinov2("b", "base", 768),
        _dinov2("l", "large", 1024),
        _clip("b", "base", 32, 512),
        _clip("l", "large", 14, 768),
    )
}


class VisionTransformer(PublishedExtractor):
    """The encoder above; `network` returns the features of float images (N, 3, 224, 224)."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, network: Any, name: str, block: int = BLOCK) -> None:
        super().__init__(name, other_label(name), block)
        self.dim, self.map_channels = encoder.dim, network.num_features
        self.network = network
        mean, std = (torch.tensor(values)[:, None, None] for values in encoder.mean_std)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def block_activations(self, images: Tensor) -> Activations:
        """Activations of one block of uint8 images (block, 3, H, W)."""
        with sdpa_kernel(SDPBackend.MATH):  # fused kernels have a precision of their own
            return Activations(self.network(self._input(images)), None)

    def block_map(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            tokens = self.network.forward_features(self._input(images))
        height, width = self.network.patch_embed.grid_size
        return tokens[:, self.network.num_prefix_tokens :].mT.unflatten(2, (height, width))

    def _input(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images.float(), (SIZE, SIZE), mode="bicubic", antialias=True)
        return (resized / 255 - self.mean) / self.std


def open_vision_transformer(name: str, given: Path | None = None, block: int = BLOCK) -> VisionTransformer:
    """The encoder with the weights `given`, or found. DataError if there are none or they do not fit."""
    encoder = ENCODERS[name]
    path = find_weights(encoder.published, given)
    network = build_encoder(encoder, read_weights(path), path)
    protocol = f"{name}@{state_hash(name, network.state_dict())}+bicubic-{SIZE}"  # of the weights as trained
    resample_positions(network, encoder)
    return VisionTransformer(encoder, network.eval().requires_grad_(False), protocol, block)


def build_encoder(encoder: Encoder, state: dict[str, Tensor], path: Path) -> Any:
    """timm's network at its training size with these tensors, named as timm or the authors of DINOv2 name them.

    DataError naming their file if they do not fit.
    """
    try:
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn
    except ImportError:
        raise not_installed("timm", encoder.network) from None
    classes = encoder.dim if encoder.projected else 0
    with torch.device("meta"):  # without initial weights, which would be drawn and replaced
        network: Any = timm.create_model(encoder.architecture, img_size=encoder.size, num_classes=classes)
    check_floats(path, state)
    full = {key: value.float() for key, value in state.items()}
    try:
        network.load_state_dict(checkpoint_filter_fn(full, network), assign=True)
    except (RuntimeError, KeyError, ValueError) as error:
        why = f"they are not those of {encoder.network} ({one_line(error)})"
        raise bad_weights(path, why) from None
    return network


def resample_positions(network: Any, encoder: Encoder) -> None:
    """Set a network trained at another size to 224 pixels, with DINOv2's own resampling of its position embedding."""
    if encoder.size == SIZE:
        return
    trained = network.pos_embed.detach()
    network.set_input_size((SIZE, SIZE))
    network.pos_embed = nn.Parameter(resampled(trained, SIZE // network.patch_embed.patch_size[0]))


def resampled(positions: Tensor, side: int) -> Tensor:
    """(1, 1 + side^2, D) of (1, 1 + n^2, D): the class token's as it is, the others bicubic at scale (side + 0.1) / n."""
    first, grid = positions[:, :1], positions[:, 1:]
    n = math.isqrt(grid.shape[1])
    scale = (side + OFFSET) / n
    planes = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2)
    small = F.interpolate(planes, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([first, small.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)
