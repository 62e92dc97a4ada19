"""Feature maps of networks, and folders of them: which features lie where, views like those of latents, and stale folders."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensors import pixels
from torch import Tensor
from torch.nn import functional as F

from midway.gen.core.errors import DataError, UsageError
from midway.gen.data.crops import cropped
from midway.gen.data.images import ImageData, load_images, to_float
from midway.gen.data.pixels import Images
from midway.gen.features.classifier import FeatureConfig, FeatureNetwork
from midway.gen.features.efficientnet import EfficientNet, Network
from midway.gen.features.extractor import Activations, Extractor, weights_of
from midway.gen.features.pixels import Pixels
from midway.gen.features.vit import ENCODERS, VisionTransformer
from midway.gen.tokenizer import feature_maps
from midway.gen.tokenizer.encoding import Encoding, encode
from midway.gen.tokenizer.feature_maps import MapSource, open_maps, resized, with_maps, write_maps
from midway.gen.tokenizer.latents import open_latents
from midway.gen.tokenizer.stored import Views
from midway.gen.training.batches import Context, LatentBatch
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- networks ----


def test_the_map_of_a_classifier_is_what_enters_its_last_halving() -> None:
    torch.manual_seed(0)
    network = FeatureNetwork(FeatureConfig(1, 8, 10, width=8, dim=4)).eval().requires_grad_(False)
    images, seen = pixels(3), list[Tensor]()
    network.stages[2][3].register_forward_hook(lambda _, given, __: seen.append(given[0]))  # pyright: ignore
    with torch.no_grad():
        network(to_float(images))
    found = network.feature_map(images, (2, 2))
    assert found.shape == (3, network.map_channels, 2, 2) == (3, 32, 2, 2)
    torch.testing.assert_close(found, seen[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(network.feature_map(images[1:2], (2, 2)), found[1:2]), "the same bits for any number of images"
    with pytest.raises(ValueError, match="features need uint8 images"):
        network.feature_map(pixels(1, 3), (2, 2))


def test_the_map_of_efficientnet_has_the_grid_that_is_wanted() -> None:
    """A bright corner on the right of the top moves what is there most: the map is not transposed."""
    torch.manual_seed(0)
    network = EfficientNet(Network().eval(), "effnet@0", block=2)
    images = torch.zeros(3, 1, 32, 48, dtype=torch.uint8)
    plain = network.feature_map(images, (4, 6))
    images[:, :, :8, 40:] = 255
    changed = network.feature_map(images, (4, 6))
    assert plain.shape == (3, network.map_channels, 4, 6)
    moved = (changed - plain).abs().amax(1)[0]
    assert moved[:, 3:].sum() > 3 * moved[:, :3].sum() and moved[:2].sum() > 1.5 * moved[2:].sum()
    assert torch.equal(network.feature_map(images[:1], (4, 6)), changed[:1])


def test_the_map_of_a_transformer_has_its_tokens_row_by_row() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).eval().requires_grad_(False)
    extractor = VisionTransformer(ENCODERS["dinov2-vitb14"], network, "vit@0", block=2)
    images = pixels(3, 3, 16)
    found = extractor.feature_map(images, (7, 7))
    resized = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True) / 255
    tokens = network.forward_features((resized - extractor.mean) / extractor.std)
    assert found.shape == (3, extractor.map_channels, 14, 14)
    torch.testing.assert_close(found[:, :, 3, 5], tokens[:, 1 + 3 * 14 + 5], rtol=1e-4, atol=1e-4)


def test_networks_without_a_map_raise() -> None:
    with pytest.raises(UsageError, match="pixels-32 has no feature map"):
        Pixels().check_map()


def test_protocols_of_one_network_have_one_hash() -> None:
    names = {
        "cnn-my@set@3fa2c1ab90de": "3fa2c1ab90de",
        "effnet-lite0@579344248a93+bicubic-32": "579344248a93",
        "effnet-lite0-full@579344248a93+bicubic-32": "579344248a93",
        "effnet-lite0@579344248a93+bicubic-32, 64 axes": "579344248a93",
        "cnn@3fa2c1ab90de, 64 axes": "3fa2c1ab90de",
        "pixels-32": "pixels-32",
    }
    assert {name: weights_of(name) for name in names} == names


# ---- folders ----


class Itself(Extractor):
    """A network whose feature map is the image in [-1, 1]."""

    name, map_channels = "itself@0123456789ab", 1

    def check(self, images: Images, what: str = "") -> None:
        """All."""

    def activations(self, images: Tensor) -> Activations:
        return Activations(images.flatten(1).float(), None)

    def feature_map(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        return to_float(images)


def digits(count: int = 70) -> ImageData:
    found = load_images("digits")
    return replace(found, images=found.images[:count], labels=found.labels[:count], fingerprint=f"{count}" * 20)


def identity(side: int = 8) -> ImageTokenizer:
    """Latents are pixels."""
    quantizer = {"type": "identity", "dim": 1}
    return ImageTokenizer(width=8, blocks=1, image_size=side, quantizer=quantizer, downsample=1).eval()


def drawn(folder: Path, data: ImageData, side: int, views: Views, flip: bool) -> LatentBatch:
    """A batch of a step, of latents and maps that are both pixels."""
    tokenizer = identity(side)
    encode(folder / "latents", tokenizer, data, Encoding(views))
    latents = open_latents(folder / "latents", data, tokenizer, flip)
    source = MapSource(Itself(), data, Views(views.windows, flip), side, (side, side))
    write_maps(source.folder(folder), source)
    items = with_maps(latents, open_maps(source.folder(folder), source), flip)
    assert items.fingerprint == latents.items(flip).fingerprint and items.augment is not None
    found = items.augment(
        items.read(torch.arange(len(data.images)).flip(0)), Context(3, 5, torch.arange(len(data.images)))
    )
    pixel = found.latents * latents.std.view(-1, 1, 1) + latents.mean.view(-1, 1, 1)
    return replace(found, latents=pixel)


@pytest.mark.parametrize(("views", "flip"), [(Views(), False), (Views(1, True), True), (Views(1, True), False)])
def test_a_sample_has_the_map_of_its_own_view(views: Views, flip: bool, tmp_path: Path) -> None:
    data = digits()
    found = drawn(tmp_path, data, 8, views, flip)
    assert found.features is not None and found.features.dtype == torch.float32
    torch.testing.assert_close(found.features, found.latents, rtol=0, atol=4e-3)  # bfloat16
    plain = to_float(data.images[:]).flip(0)
    mirrored = (found.latents - plain).flatten(1).abs().amax(1) > 1e-3
    assert mirrored.any() == flip and not mirrored.all()


def test_a_sample_has_the_map_of_its_own_window(tmp_path: Path) -> None:
    """Five windows of larger images, and their mirror images."""
    whole = digits()
    data = cropped(whole, 6)
    found = drawn(tmp_path, data, 6, Views(5, True), True)
    assert found.features is not None
    torch.testing.assert_close(found.features, found.latents, rtol=0, atol=4e-3)
    assert len({tuple(x.flatten().tolist()) for x in found.latents}) > 40


def test_maps_are_resized_to_the_tokens_by_means_or_between_them() -> None:
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    assert resized(maps, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resized(maps, (4, 4)) is maps
    assert resized(maps.square(), (1, 1)).item() == 77.5, "of all places, not of the middle"
    wide = resized(torch.tensor([[[[0.0, 4.0]]]]), (1, 4))
    assert wide.flatten().tolist() == [0, 1, 3, 4]


def test_folders_are_made_once_read_from_the_disk_and_raise_if_they_are_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = digits(20)
    source = MapSource(Itself(), data, Views(), 8, (4, 4))
    folder = source.folder(tmp_path)
    write_maps(folder, source)
    kept = open_maps(folder, source)
    monkeypatch.setattr(feature_maps, "IN_MEMORY", 0)
    stored = open_maps(folder, source)
    assert kept.kept is not None and stored.kept is None
    assert torch.equal(kept.read(torch.tensor([3, 1])), stored.read(torch.tensor([3, 1])))
    monkeypatch.setattr(Itself, "feature_map", lambda *_: pytest.fail("made twice"))
    write_maps(folder, source)
    others = [replace(source, data=replace(data, fingerprint="other")), replace(source, grid=(2, 2))]
    network = Itself()
    network.name = "itself@ffffffffffff"
    for other in (*others, replace(source, network=network), replace(source, views=Views(1, True))):
        assert other.folder(tmp_path) != folder
        with pytest.raises(DataError, match="has other feature maps"):
            open_maps(folder, other)
