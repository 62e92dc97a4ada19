"""What turns images into features and logits: one interface to trained and to published feature networks.

Every extractor computes in IEEE float32 with deterministic kernels, whatever autocast, TF32 and benchmark settings hold
outside, and in blocks of one fixed size (the last one padded): libraries choose kernels by batch size, and so a free batch
size would change the last bits.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.core.errors import DataError


@dataclass(frozen=True)
class Activations:
    """What a feature network makes of N images: features float32 (N, D), logits (N, K) if it is a classifier."""

    features: Tensor
    logits: Tensor | None


class Extractor(Protocol):
    """A feature network that is ready to measure."""

    @property
    def name(self) -> str:
        """The protocol, with a hash of the weights; every number measured carries it."""
        ...

    @property
    def label(self) -> str:
        """What a distance of these features is called: FID, or Fréchet distance (name)."""
        ...

    @property
    def note(self) -> str:
        """How to read the numbers: a sentence for reports."""
        ...

    @property
    def dim(self) -> int:
        """D."""
        ...

    @property
    def has_logits(self) -> bool:
        """Whether there are logits."""
        ...

    def check(self, images: Tensor, what: str = "the images are") -> None:
        """DataError unless it measures images like these uint8 (N, C, H, W), which `what` makes."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """float32 (N, D) of uint8 images (N, C, H, W); the same bits for any N. ValueError on other images."""
        ...

    def activations(self, images: Tensor) -> Activations:
        """Features and logits, as `features`."""
        ...

    def to(self, device: torch.device) -> Self:
        """Itself, moved."""
        ...


def other_label(name: str) -> str:
    """What a distance is called that is not FID."""
    return f"Fréchet distance ({name})"


class PublishedExtractor(nn.Module, ABC):
    """A published network for RGB images of any size, which it resizes; grey images are repeated to three channels."""

    dim: int
    has_logits = False

    def __init__(self, name: str, label: str, block: int) -> None:
        super().__init__()
        self.name, self.label, self.block = name, label, block
        self.register_buffer("place", torch.empty(0), persistent=False)

    @property
    def note(self) -> str:
        """How to read the numbers."""
        return (
            f"{self.label}: features of {self.name}, which was trained on other images. Distances compare only with those "
            "of the same network, the same number of images and the same reference images."
        )

    @abstractmethod
    def look(self, images: Tensor) -> Activations:
        """Activations of exactly one block of uint8 images (block, 3, H, W)."""

    def check(self, images: Tensor, what: str = "the images are") -> None:
        """DataError unless these are uint8 images (N, 1 or 3, H, W), which `what` makes."""
        if not _is_measurable(images):
            raise DataError(
                f"{self.name} measures uint8 images (N, 1 or 3, height, width)",
                f"{what} {images.dtype} {tuple(images.shape)}",
                "train on images of 1 or 3 channels (--channels 3), or use another feature network",
            )

    def features(self, images: Tensor) -> Tensor:
        """float32 (N, dim) of uint8 images (N, C, H, W), C 1 or 3; the same bits for any N. ValueError on other images."""
        return self.activations(images).features

    @torch.no_grad()
    def activations(self, images: Tensor) -> Activations:
        """Features and logits, as `features`."""
        if not _is_measurable(images):
            raise ValueError(
                f"{self.name} needs uint8 images (N, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}: "
                "convert floats with midway.gen.data.images"
            )
        device = self.get_buffer("place").device
        with plain_float32(device):
            parts = [self._padded(part.to(device)) for part in images.split(self.block)]
        logits = [part.logits for part in parts if part.logits is not None]
        return Activations(torch.cat([part.features for part in parts]), torch.cat(logits) if logits else None)

    def _padded(self, images: Tensor) -> Activations:
        """Of at most one block; of no images too, so that their shapes are known."""
        count = len(images)
        whole = F.pad(images, (0, 0, 0, 0, 0, 0, 0, self.block - count))
        seen = self.look(whole.expand(-1, 3, -1, -1))
        return Activations(seen.features[:count], None if seen.logits is None else seen.logits[:count])


def _is_measurable(images: Tensor) -> bool:
    return images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] in (1, 3) and min(images.shape[2:]) > 0


@contextlib.contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """IEEE float32 and deterministic kernels inside, whatever autocast, TF32 and benchmark settings hold outside."""
    backends = torch.backends
    named = (
        (backends.cuda, "matmul"),
        (backends.cudnn, "conv"),
        (backends.mkldnn, "matmul"),
        (backends.mkldnn, "conv"),
    )
    places = [getattr(backend, name) for backend, name in named]
    precisions = [place.fp32_precision for place in places]
    kernels = (backends.cudnn.benchmark, backends.cudnn.deterministic)
    try:
        for place in places:
            place.fp32_precision = "ieee"
        backends.cudnn.benchmark, backends.cudnn.deterministic = False, True
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for place, precision in zip(places, precisions, strict=True):
            place.fp32_precision = precision
        backends.cudnn.benchmark, backends.cudnn.deterministic = kernels
