"""LPIPS: a perceptual distance of images (Zhang et al. 2018, arXiv 1801.03924, eq. 1).

    d(a, b) = sum_l mean_{h, w} sum_c w_{l, c} (f_{l, c}(a) - f_{l, c}(b))^2,      f_l(x) = F_l(x) / (|F_l(x)| + 1e-10)

F_l are five activations of an ImageNet classifier (the backbone), |F_l| the norm over channels at a position, w_l the heads.
The heads, version 0.1, are those of the package `lpips`, the backbone's weights torchvision's; the values are those of
`lpips.LPIPS`, whose network is not used: it loads weights through a deprecated torchvision argument, and `.train()` enables its
dropout.

The weights are neither parameters nor buffers, so checkpoints and weight averages leave them out; they do follow `.to()`.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from midway.tokenizers.base import float32_island
from midway.tokenizers.precision import Convert, at_least_float32
from midway.tokenizers.weights import HALVES, WEIGHTS_LIMIT, check_tensors, readable, receive

Net = Literal["vgg", "alex"]

_MEAN, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet's channels, for images in [-1, 1]


@dataclass(frozen=True)
class _Convolution:
    """Max pooling by `pool` (None: without), convolution, ReLU; `index` is its place among torchvision's features.

    `shape` is that of its weight: (channels out, channels in, height, width).
    """

    index: int
    shape: tuple[int, int, int, int]
    padding: int
    pool: int | None = None
    stride: int = 1
    compared: bool = True  # whether the activation is part of the distance

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.pool:
            x = F.max_pool2d(x, self.pool, 2)
        return F.relu(F.conv2d(x, weight, bias, self.stride, self.padding))


@dataclass(frozen=True)
class _Backbone:
    """A classifier's convolutions; `file` is torchvision's name for its weights, with 8 digits of their sha256."""

    convolutions: tuple[_Convolution, ...]
    file: str
    least_size: int


_BACKBONES: Mapping[str, _Backbone] = {
    "vgg": _Backbone(
        tuple(
            _Convolution(
                first + 2 * i,
                (width, width if i else before, 3, 3),
                1,
                pool=2 if first and not i else None,
                compared=i == count - 1,
            )
            for first, count, before, width in (
                *((0, 2, 3, 64), (5, 2, 64, 128), (10, 3, 128, 256)),
                *((17, 3, 256, 512), (24, 3, 512, 512)),
            )
            for i in range(count)
        ),
        "vgg16-397923af.pth",
        16,
    ),
    "alex": _Backbone(
        (
            _Convolution(0, (64, 3, 11, 11), 2, stride=4),
            _Convolution(3, (192, 64, 5, 5), 2, pool=3),
            _Convolution(6, (384, 192, 3, 3), 1, pool=3),
            _Convolution(8, (256, 384, 3, 3), 1),
            _Convolution(10, (256, 256, 3, 3), 1),
        ),
        "alexnet-owt-7be5be79.pth",
        31,
    ),
}


class Perceptual(nn.Module):
    """LPIPS with the backbone "vgg" (VGG-16) or "alex" (AlexNet). It has no parameters, no state and no training mode.

    `weights`: torchvision's .pth file of the backbone, recognised by its sha256, or a .safetensors file with torchvision's names
    (`features.0.weight`, ...). None: torchvision's file in torch.hub's cache, downloaded if absent (vgg 528 MB, alex 233 MB).

    `protocol` names the distance in reports, with a hash of backbone and heads: `LPIPS-vgg@3fa2c1ab90de`.
    """

    def __init__(self, net: Net = "vgg", weights: Path | None = None) -> None:
        super().__init__()
        if net not in get_args(Net):
            raise ValueError(f"the perceptual network is {net!r}; choose one of: {', '.join(get_args(Net))}")
        self.backbone = _BACKBONES[net]
        heads = _read_heads(net)
        state = _read_backbone(self.backbone, _download(self.backbone.file) if weights is None else weights)
        scaling = [torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _SCALE)]
        self.protocol = f"LPIPS-{net}@{_hash([*state, *heads])}"
        self._held = {"scaling": scaling, "backbone": state, "heads": heads}  # a dict, in which no parent finds tensors
        self.training = False

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) of images in [-1, 1], (B, 1 or 3, H, W), float32 whatever the autocast; grey counts as equal RGB.

        In float64 after `.to(torch.float64)`. ValueError for other shapes and for images too small for the backbone.
        """
        _check_images(a, b)
        self.check_size(*a.shape[2:])
        with float32_island(a):
            pairs = zip(self._held["heads"], self._activations(a), self._activations(b), strict=True)
            parts = [F.conv2d((of_a - of_b).square(), head).mean((1, 2, 3)) for head, of_a, of_b in pairs]
            return torch.stack(parts).sum(0)

    def check_size(self, *sides: int) -> None:
        """ValueError unless images with these `sides`, in pixels, are large enough for the backbone."""
        if min(sides) < self.backbone.least_size:
            least = self.backbone.least_size
            raise ValueError(
                f"images are {' x '.join(map(str, sides))}; this backbone halves them until nothing is left: give at least "
                f"{least} x {least} pixels, or no perceptual loss"
            )

    def train(self, mode: bool = True) -> Self:
        """No effect: there is no training mode."""
        return super().train(False)

    def _activations(self, images: Tensor) -> list[Tensor]:
        """Each compared activation, of unit length at every position; images (B, 1 or 3, H, W) in [-1, 1]."""
        (mean, scale), tensors = self._held["scaling"], self._held["backbone"]
        x, compared = (images.to(mean.dtype) - mean) / scale, []
        for convolution, weight, bias in zip(self.backbone.convolutions, tensors[::2], tensors[1::2], strict=True):
            x = convolution(x, weight, bias)
            if convolution.compared:
                compared.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return compared

    def _apply(self, fn: Convert, recurse: bool = True) -> Self:
        """`.to()`, also of a parent: follows devices and float64, not half precision, which would make it another distance."""
        convert = at_least_float32(fn)
        self._held = {name: [convert(tensor) for tensor in tensors] for name, tensors in self._held.items()}
        return super()._apply(convert, recurse)


def _check_images(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] not in (1, 3):
        raise ValueError(
            f"images have shapes {tuple(a.shape)} and {tuple(b.shape)}; LPIPS compares (B, 3, H, W) or (B, 1, H, W), one to one"
        )


# ---- weights ----


def _read_heads(net: str) -> list[Tensor]:
    """w_l (1, C_l, 1, 1) of the package `lpips`, which is found but not imported."""
    spec = importlib.util.find_spec("lpips")
    folders = (spec.submodule_search_locations if spec else None) or []
    path = next((p for p in (Path(folder, "weights", "v0.1", f"{net}.pth") for folder in folders) if p.exists()), None)
    if path is None:
        raise ValueError(
            "the package lpips, which holds the heads of LPIPS, is missing: pip install 'midway[perceptual]'"
        )
    state = _load(path)
    return [state[f"lin{i}.model.1.weight"].float() for i in range(len(state))]


def _read_backbone(backbone: _Backbone, path: Path) -> list[Tensor]:
    """Weight and bias of each convolution in turn, float32 on the CPU. ValueError if the file does not match the backbone."""
    expected = {
        f"features.{c.index}.{kind}": torch.empty(shape, device="meta")
        for c in backbone.convolutions
        for kind, shape in (("weight", c.shape), ("bias", c.shape[:1]))
    }
    try:
        readable(path, WEIGHTS_LIMIT)
        state = _read_safetensors(path, expected) if path.suffix == ".safetensors" else _read_pth(path, backbone.file)
        check_tensors({name: state[name] for name in expected if name in state}, expected, HALVES)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"cannot use the backbone's weights {path} ({error}): give those of {backbone.file}, under torchvision's names"
        ) from error
    return [state[name].detach().float().contiguous() for name in expected]


def _read_safetensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in set(names) & set(file.keys())}


def _read_pth(path: Path, expected: str) -> dict[str, Tensor]:
    """torchvision's file; its sha256 is verified before it is read."""
    digits = Path(expected).stem.rpartition("-")[2]
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(digits):
        raise ValueError(
            f"{path} is not {expected}: its sha256 begins with {found[:8]}, not with {digits}; "
            "fetch it again, or give a .safetensors file with other weights"
        )
    return _load(path)


def _load(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _download(file: str) -> Path:
    """torchvision's `file` in torch.hub's cache, downloaded if missing."""
    path, url = Path(torch.hub.get_dir(), "checkpoints", file), f"https://download.pytorch.org/models/{file}"
    if path.exists():
        return path
    temporary = path.with_name(f".{file}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (found := receive(url, temporary)).startswith(Path(file).stem.rpartition("-")[2]):
            raise ValueError(f"it sends another file, of sha256 {found}")
        temporary.replace(path)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(
            f"cannot download {url}, the backbone of the perceptual loss\n  why: {error}\n  fix: connect to the network once; or "
            f"copy {file} here and give it with --loss.perceptual-weights FILE; or set the perceptual weight to 0"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _hash(tensors: list[Tensor]) -> str:
    """12 hexadecimal digits: sha256 of every tensor's shape and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
