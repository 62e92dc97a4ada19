"""Inception-v3 of 2015-12-05, the network of FID and of the Inception Score.

    features = mean_space(Mixed_7c((resize_299(x) - 128) / 128))   (2048)      Heusel et al., arXiv:1706.08500
    logits   = features W^T, without the bias                      (1008)      Salimans et al., arXiv:1606.03498

resize_299 is TensorFlow 1's bilinear: source = target * in / out, without half-pixel centres or antialiasing. Network and
resize are torch-fidelity's. The distance is called FID only with the published file, identified by the first 32 bits of its
sha256, which are in its name; with other weights it is called a Fréchet distance, with their hash.

`inception-pytorch` is pytorch-fid's reading of the same file: features = mean_space(Mixed_7c(2 torch_299(x / 255) - 1)), with
torch's bilinear, source = (target + 1/2) in / out - 1/2. Enlarged from 32 pixels, the two differ by 7.5 grey levels on average
(of 20 images of CIFAR-10), so these features have another name and their distance is not called FID.
"""

from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.core.errors import one_line
from midway.gen.core.files import file_hash, state_hash
from midway.gen.features.extractor import Activations, PublishedExtractor, other_label
from midway.gen.features.weights import (
    Published,
    bad_weights,
    check_floats,
    find_weights,
    not_installed,
    read_weights,
)

INCEPTION = Published(
    "inception",
    "weights-inception-2015-12-05-6726825d.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    digits="6726825d",
)
PYTORCH = "inception-pytorch"
SIZE = 299
BLOCK = 64
"""Images per block: 0.4 GB of activations."""


class Inception(PublishedExtractor):
    """The network above; `network` returns features and unbiased logits of uint8 images (N, 3, H, W)."""

    dim = 2048
    has_logits = True

    def __init__(self, network: nn.Module, name: str, label: str, block: int = BLOCK) -> None:
        super().__init__(name, label, block)
        self.network = network

    def block_activations(self, images: Tensor) -> Activations:
        """Activations of one block of uint8 images (block, 3, H, W)."""
        return Activations(*self.network(images))


class PytorchInception(PublishedExtractor):
    """The same network as pytorch-fid reads images; `stages` returns Mixed_7c's means (N, 2048, 1, 1) of floats in [-1, 1]."""

    dim = 2048

    def __init__(self, network: nn.Module, name: str, block: int = BLOCK) -> None:
        super().__init__(name, other_label(name), block)
        self.stages = nn.Sequential(*(child for child in network.children() if not isinstance(child, nn.Linear)))

    def block_activations(self, images: Tensor) -> Activations:
        """Activations of one block of uint8 images (block, 3, H, W)."""
        resized = F.interpolate(images.float() / 255, (SIZE, SIZE), mode="bilinear", align_corners=False)
        return Activations(self.stages(2 * resized - 1).flatten(1), None)


def open_inception(given: Path | None = None, block: int = BLOCK) -> Inception:
    """The network with the weights `given`, or found. DataError if there are none or they are damaged."""
    network, digits, official = _read(given)
    name = protocol_name(digits)
    return Inception(network, name, "FID" if official else other_label(name), block)


def open_pytorch_inception(given: Path | None = None, block: int = BLOCK) -> PytorchInception:
    """The network as pytorch-fid reads images, with the same weights; errors as `open_inception`."""
    network, digits, _ = _read(given)
    return PytorchInception(network, f"{PYTORCH}-v3-2015-12-05@{digits}+torch-bilinear-{SIZE}", block)


def _read(given: Path | None) -> tuple[nn.Module, str, bool]:
    """The network, the digits that name its weights, and whether they are the published ones."""
    path = find_weights(INCEPTION, given)
    state, digest = read_weights(path), file_hash(path)
    network = build_inception(state, path)
    official = digest.startswith(INCEPTION.digits)
    if not official:
        check_floats(path, state)
    return network, digest[:12] if official else state_hash("inception", network.state_dict()), official


def protocol_name(digits: str) -> str:
    """The name of these weights: by the file's sha256 if it is the published one, else by a hash of the tensors."""
    return f"inception-v3-2015-12-05@{digits}+tf1-bilinear-{SIZE}"


def build_inception(state: dict[str, Tensor], path: Path) -> nn.Module:
    """torch-fidelity's network, frozen, with these tensors; DataError naming their file if they do not fit.

    The constructor of torch-fidelity downloads weights and unpickles them, which can run code. During construction its download
    function is therefore replaced by one that returns these tensors.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as theirs
    except ImportError:
        raise not_installed("torch-fidelity", INCEPTION.network) from None
    try:
        with (
            torch.random.fork_rng(devices=[]),  # the constructor draws initial weights
            patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: state),
        ):
            return theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    except RuntimeError as error:
        why = f"they are not those of Inception-v3 ({one_line(error)})"
        raise bad_weights(path, why) from None
