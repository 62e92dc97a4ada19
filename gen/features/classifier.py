"""A small convolutional classifier whose penultimate layer gives features of images, and its file format.

    x = uint8 / 127.5 - 1
    h = 3 x [conv 3x3, group norm, SiLU, conv 3x3 stride 2, group norm, SiLU],   channels width, 2 width, 4 width
    features = SiLU(W1 mean_space(h) + b1)  (dim),     logits = W2 features + b2  (classes)

Its feature map is what enters the last halving: 4 width channels at a quarter of the images' side.

Retraining changes every distance, so the name of a feature network contains a hash of its weights: `cnn-digits@3fa2c1ab90de`.
Features are computed in blocks of 256 images (extractor.py).
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.core.config import from_file
from midway.gen.core.errors import DataError, raising
from midway.gen.core.files import DAMAGE, read_tensors, state_hash, write_atomically
from midway.gen.core.ranges import WIDTH, check_ranges
from midway.gen.data.images import to_float
from midway.gen.data.pixels import Images
from midway.gen.features.extractor import Activations, Extractor, in_blocks, map_in_blocks, other_label
from midway.gen.training.batches import ImageBatch
from midway.tokenizers.losses import mean
from midway.tokenizers.weights import building, load_weights

BLOCK = 256
FORMAT = "midway-features"
VERSION = 1


@dataclass(frozen=True)
class FeatureConfig:
    """Images (in_channels, image_size, image_size); `classes` labels; `width` channels at first; `dim` features."""

    in_channels: int
    image_size: int
    classes: int
    width: int = 32
    dim: int = 32

    def __post_init__(self) -> None:
        if self.image_size < 8:
            raise ValueError(
                f"image_size is {self.image_size}: the feature network halves images three times, use >= 8"
            )
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width is {self.width}: use a multiple of 8, the number of normalisation groups")
        if self.in_channels < 1 or self.classes < 2 or self.dim < 2:
            raise ValueError(
                f"in_channels={self.in_channels}, classes={self.classes}, dim={self.dim}: use at least 1, 2 and 2"
            )
        check_ranges(self, width=WIDTH, dim=WIDTH)


def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
    """(B, channels_in, H, W) -> (B, channels_out, ceil(H / 2), ceil(W / 2))."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
        nn.Conv2d(channels_out, channels_out, 3, stride=2, padding=1),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
    )


class FeatureNetwork(Extractor):
    """The classifier above, an Extractor of images of its own shape.

    Results depend neither on the mode (train or eval) nor on other images of the batch. `name` is that of the protocol once
    the network has been loaded.
    """

    compilable: ClassVar[bool] = True
    """A function of tensors alone, which torch.compile can take whole."""
    name = label = ""
    has_logits = True
    note = (
        "The distance uses a feature network trained on this data set; it compares models of this data set and cannot "
        "be compared with published figures."
    )

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config, self.dim = config, config.dim
        self.image_shape = (config.in_channels, config.image_size, config.image_size)
        width = config.width
        self.stages = nn.Sequential(
            _stage(config.in_channels, width), _stage(width, 2 * width), _stage(2 * width, 4 * width)
        )
        self.embed = nn.Sequential(nn.Linear(4 * width, config.dim), nn.SiLU())
        self.classify = nn.Linear(config.dim, config.classes)
        self.map_channels = 4 * width

    def forward(self, x: Tensor) -> Tensor:
        """Penultimate features (B, dim) of float images x (B, C, H, W) in [-1, 1]."""
        return self.embed(self.stages(x).mean(dim=(2, 3)))

    def activations(self, images: Tensor) -> Activations:
        """Features and their class logits; as `features`."""
        self._need(images)
        return in_blocks(images, BLOCK, self.classify.weight.device, self._block_activations)

    @torch.no_grad()
    def feature_map(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        self._need(images)
        return map_in_blocks(images, BLOCK, self.classify.weight.device, self._block_map)

    def _need(self, images: Tensor) -> None:
        if not self._takes(images):
            raise ValueError(
                f"features need uint8 images (B, {', '.join(map(str, self.image_shape))}), not {images.dtype} "
                f"{tuple(images.shape)}: convert floats with midway.gen.data.images, and use a feature network of this size"
            )

    def check(self, images: Images, what: str = "the images are") -> None:
        """DataError unless these are uint8 images (N, C, H, W) of the network's shape; `what` names their source."""
        if not self._takes(images):
            raise DataError(
                f"{self.name} measures {self.image_shape} images",
                f"{what} {tuple(images.shape[1:])}" + ("" if images.dtype == torch.uint8 else f" of {images.dtype}"),
                "train features on the same data with midway train features",
            )

    def _takes(self, images: Images) -> bool:
        return images.dtype == torch.uint8 and images.shape[1:] == self.image_shape

    def _block_activations(self, images: Tensor) -> Activations:
        features = self(to_float(images))
        return Activations(features, self.classify(features))

    def _block_map(self, images: Tensor) -> Tensor:
        last = cast(nn.Sequential, self.stages[2])
        return last[:3](self.stages[:2](to_float(images)))

    def loss(self, batch: ImageBatch, context: object) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy (nats) and its logs, with the accuracy in [0, 1]."""
        logits = self.classify(self(to_float(batch.images)))
        loss = F.cross_entropy(logits.float(), batch.labels, reduction="mean" if len(logits) else "sum")
        accuracy = mean((logits.argmax(dim=1) == batch.labels).float())
        return loss, {"loss": loss.detach(), "accuracy": accuracy}

    def after_step(self, step_ok: Tensor) -> None:
        """Nothing to update between steps."""


def feature_hash(network: FeatureNetwork) -> str:
    """12 hexadecimal digits: sha256 of the config and of every weight's name, dtype, shape and bytes."""
    return state_hash(_config_json(network.config), network.state_dict())


def protocol_name(network: FeatureNetwork, data_name: str) -> str:
    """The name of this protocol in every report: `cnn-digits@3fa2c1ab90de`."""
    return f"cnn-{data_name}@{feature_hash(network)}"


def _config_json(config: FeatureConfig) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def save_features(network: FeatureNetwork, path: Path, data_name: str) -> None:
    """Write weights and metadata as one safetensors file, all or nothing. DiskError if that fails."""
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": _config_json(network.config),
        "data": data_name,
        "hash": feature_hash(network),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomically(path, save(tensors, metadata))


def load_features(path: Path) -> FeatureNetwork:
    """The network (CPU, eval, frozen) with its protocol name.

    DataError if the file is missing, damaged or of another kind, and unless the weights match the stored hash.
    """
    what, fix = f"cannot use the feature network {path}", "train it again with midway train features"
    with raising(DataError, what, fix, *DAMAGE, why="the file cannot be read ({})".format):
        tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise DataError(what, "its metadata are not those of a feature network", fix)
    if metadata.get("version") != str(VERSION):
        found = metadata.get("version")
        raise DataError(what, f"its format version is {found}; this program reads {VERSION}", fix)
    with raising(DataError, what, fix, *DAMAGE, why="its configuration and weights do not fit ({})".format):
        config = from_file(FeatureConfig, json.loads(metadata["config"]), path, fix)
        with building(path, tensors):
            network = FeatureNetwork(config)
            load_weights(network, tensors)
    if feature_hash(network) != metadata.get("hash"):
        why = f"its weights hash to {feature_hash(network)}, not to the stored {metadata.get('hash')}"
        raise DataError(what, why, fix)
    network.name = protocol_name(network, metadata.get("data", "unknown"))
    network.label = other_label(network.name)
    return network.eval().requires_grad_(False)
