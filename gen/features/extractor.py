"""Feature networks: one interface to trained and published ones, from images to features and logits.

Every extractor computes in IEEE float32 with deterministic kernels, for all autocast, TF32 and benchmark settings, and in blocks
of one fixed size (the last one padded), because libraries choose kernels by batch size, which would change the last bits.
"""

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.core.errors import DataError, UsageError
from midway.gen.data.pixels import Images
from midway.tokenizers.precision import Convert, of_same_dtype


class Activations(NamedTuple):
    """Outputs of a feature network for N images: features float32 (N, D), and logits (N, K) of a classifier."""

    features: Tensor
    logits: Tensor | None


class ImageFeatures(Protocol):
    """A function of uint8 images (N, C, H, W)."""

    def features(self, images: Tensor) -> Tensor:
        """float32 (N, D) of uint8 images (N, C, H, W); the same bits for any N. ValueError on other images."""
        ...

    def activations(self, images: Tensor) -> Activations:
        """Features and logits, as `features`."""
        ...


class Extractor(nn.Module, ABC):
    """A feature network with its weights."""

    name: str
    """The protocol, with a hash of the weights; part of every reported distance."""
    label: str
    """The name of distances of these features: FID, or Fréchet distance (name)."""
    note: str
    """A sentence for reports: how distances may be compared."""
    dim: int
    """D, the number of features."""
    has_logits: bool = False
    """Whether there are logits."""
    axes: int | None = None
    """The number of principal axes of the reference on which images are compared; None: all features (reference.py)."""
    least_images: int = 0
    """The number of images from which on a distance of these features is more than its bias; below it `check_count` raises."""
    map_channels: int = 0
    """Channels of the feature map; 0: there is none."""

    @abstractmethod
    def check(self, images: Images, what: str = "the images are") -> None:
        """DataError for images unsupported by the network, uint8 (N, C, H, W), whose source `what` names."""

    @abstractmethod
    def activations(self, images: Tensor) -> Activations:
        """Features and logits, as `features`."""

    def features(self, images: Tensor) -> Tensor:
        """float32 (N, D) of uint8 images (N, C, H, W); the same bits for any N. ValueError on other images."""
        return self.activations(images).features

    def feature_map(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """float32 (N, map_channels, h, w) of uint8 images: features by place, on `grid` rows and columns where the network can
        have as many; the same bits for any N. Errors as `check_map` and `features`."""
        raise NotImplementedError

    def check_map(self) -> None:
        """UsageError of a network without a feature map."""
        if not self.map_channels:
            raise UsageError(
                f"{self.name} has no feature map",
                "hidden tokens are aligned with features by place, and it has none",
                "use effnet-lite0, dinov2-vitb14 or clip-vitb32, or a run of midway train features",
            )

    def dim_of(self, images: Images) -> int:
        """D of uint8 images (N, C, H, W)."""
        return self.dim

    def measured_dim(self, reference: Images) -> int:
        """Numbers per image that a distance to the images `reference` compares: D, or the axes that so many images have."""
        dim = self.dim_of(reference)
        return dim if self.axes is None else max(1, min(self.axes, dim, len(reference) - 1))

    def check_count(self, n: int) -> None:
        """UsageError for blocks of n images, if a distance of so few would be mostly bias."""
        if n < self.least_images:
            raise UsageError(
                f"{self.name} of {n} images a block",
                f"the distance of {self.dim} features is mostly bias below {self.least_images} images",
                "raise --n, or measure on principal axes: --features effnet-lite0",
            )

    def _apply(self, fn: Convert, recurse: bool = True) -> Self:
        """`.to()`, also of a parent: follows devices and stays in float32, since other features would have the same name."""
        return super()._apply(of_same_dtype(fn), recurse)


def weights_of(name: str) -> str:
    """The hash in the name of a protocol, equal for all protocols of one network; the name itself of one without weights."""
    return re.split("[+,]", name.rpartition("@")[2])[0]


def other_label(name: str) -> str:
    """The name of distances other than FID."""
    return f"Fréchet distance ({name})"


class PublishedExtractor(Extractor):
    """A published network for RGB images of any size, resized to its own; grey images are repeated to three channels."""

    def __init__(self, name: str, label: str, block: int) -> None:
        super().__init__()
        self.name, self.label, self.block = name, label, block
        self.note = (
            f"{label}: features of {name}, which was trained on other images. Distances compare only with those "
            "of the same network, the same number of images and the same reference images."
        )
        self.register_buffer("place", torch.empty(0), persistent=False)

    @abstractmethod
    def block_activations(self, images: Tensor) -> Activations:
        """Activations of exactly one block of uint8 images (block, 3, H, W)."""

    def check(self, images: Images, what: str = "the images are") -> None:
        """DataError unless these are uint8 images (N, 1 or 3, H, W); `what` names their source."""
        check_measurable(self.name, images, what)

    @torch.no_grad()
    def activations(self, images: Tensor) -> Activations:
        """Features and logits, as `features`."""
        need_measurable(self.name, images)
        device = self.get_buffer("place").device
        return in_blocks(images, self.block, device, lambda part: self.block_activations(part.expand(-1, 3, -1, -1)))

    def block_map(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The feature map of exactly one block of uint8 images (block, 3, H, W), of a network that has one."""
        raise NotImplementedError

    def feature_map(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        self.check_map()
        need_measurable(self.name, images)
        device = self.get_buffer("place").device
        return map_in_blocks(images, self.block, device, lambda part: self.block_map(part.expand(-1, 3, -1, -1), grid))


@torch.no_grad()
def in_blocks(
    images: Tensor, block: int, device: torch.device, activations: Callable[[Tensor], Activations]
) -> Activations:
    """`activations` of every block of exactly `block` images, the last one padded, in IEEE float32; also of no images."""
    found = []
    with plain_float32(device):
        for part in images.split(block):
            padded = F.pad(part.to(device), (0, 0, 0, 0, 0, 0, 0, block - len(part)))
            features, logits = activations(padded)
            found.append((features[: len(part)], None if logits is None else logits[: len(part)]))
    logits = [rows for _, rows in found if rows is not None]
    return Activations(torch.cat([rows for rows, _ in found]), torch.cat(logits) if logits else None)


def map_in_blocks(images: Tensor, block: int, device: torch.device, make: Callable[[Tensor], Tensor]) -> Tensor:
    """`in_blocks` of a function that gives feature maps."""
    return in_blocks(images, block, device, lambda part: Activations(make(part), None)).features


def check_measurable(name: str, images: Images, what: str) -> None:
    """DataError unless these are uint8 images (N, 1 or 3, H, W); `what` names their source."""
    if not _is_measurable(images):
        raise DataError(
            f"{name} measures uint8 images (N, 1 or 3, height, width)",
            f"{what} {images.dtype} {tuple(images.shape)}",
            "train on images of 1 or 3 channels (--channels 3), or use another feature network",
        )


def need_measurable(name: str, images: Tensor) -> None:
    """ValueError unless these are uint8 images (N, 1 or 3, H, W)."""
    if not _is_measurable(images):
        raise ValueError(
            f"{name} needs uint8 images (N, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}: "
            "convert floats with midway.gen.data.images"
        )


def _is_measurable(images: Images) -> bool:
    return (
        images.dtype == torch.uint8
        and len(images.shape) == 4
        and images.shape[1] in (1, 3)
        and min(images.shape[2:]) > 0
    )


@contextlib.contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """IEEE float32 and deterministic kernels inside, for all autocast, TF32 and benchmark settings outside."""
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
