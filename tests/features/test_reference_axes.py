"""Distances on principal axes of the reference, of pixels: closed forms, stored axes, names, and the class share's warning."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensors import pixels
from torch import Tensor

from midway.gen.core.errors import DataError
from midway.gen.data.images import ImageData
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.features.classifier import FeatureConfig, FeatureNetwork
from midway.gen.features.pixels import Pixels
from midway.gen.features.reference import make_reference
from midway.gen.metrics.frechet import frechet_distance
from midway.gen.metrics.moments import FeatureStatistics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def train() -> ImageData:
    return load_splits(DataConfig()).train


def first(images: ImageData, n: int) -> ImageData:
    return replace(images, images=images.images[:n], labels=images.labels[:n])


def rows(images: Tensor) -> Tensor:
    return images.flatten(1) / 255


def test_pixels_are_pixels() -> None:
    images = pixels(3, 1, 8)
    extractor = Pixels()
    assert torch.equal(extractor.features(images), rows(images))
    assert extractor.dim_of(images) == 64 and extractor.dim_of(pixels(1, 3, 64)) == 3 * 32 * 32
    assert torch.equal(extractor.features(images[2:]), extractor.features(images)[2:])
    assert extractor.features(images[:0]).shape == (0, 64)
    for bad in (images.float(), images[0], pixels(2, 2, 8)):
        with pytest.raises(ValueError, match="needs uint8 images"):
            extractor.features(bad)
        with pytest.raises(DataError, match=r"the model makes torch\."):
            extractor.check(bad, "the model makes")


def test_large_images_are_means_over_areas() -> None:
    images = pixels(2, 3, 64)
    expected = images.double().view(2, 3, 32, 2, 32, 2).mean((3, 5)).flatten(1) / 255
    torch.testing.assert_close(Pixels().features(images).double(), expected, rtol=0, atol=1e-6)
    wide = Pixels().features(images[:, :, :16])
    torch.testing.assert_close(
        wide.double().view(2, 3, 16, 32), images[:, :, :16].double().view(2, 3, 16, 32, 2).mean(4) / 255
    )


def test_on_all_axes_the_distance_is_that_of_the_features(train: ImageData) -> None:
    """64 pixels have 64 axes: a rotation, under which the Fréchet distance does not change."""
    reference = make_reference(Pixels(), Pixels.name, train)
    images = train.images[::3].flip(-1)
    plain = frechet_distance(FeatureStatistics.of(rows(images)), FeatureStatistics.of(rows(train.images[:])))
    assert reference.distance(images) == pytest.approx(plain, rel=1e-6)
    assert reference.features == "pixels-32, 64 axes" and reference.statistics.dim == 64


def test_the_distance_is_that_of_coordinates_on_eigenvectors(train: ImageData) -> None:
    """Of 40 images 39 axes; coordinates by a plain eigendecomposition, whose signs do not matter."""
    few = first(train, 40)
    reference = make_reference(Pixels(), Pixels.name, few)
    assert reference.features == "pixels-32, 39 axes" == f"{Pixels.name}, {Pixels().measured_dim(few.images)} axes"
    x, y = rows(few.images[:]).double(), rows(train.images[:][100:400]).double()
    basis = torch.linalg.eigh(torch.cov(x.T)).eigenvectors[:, -39:]
    own, other = ((z - x.mean(0)) @ basis for z in (x, y))
    expected = frechet_distance(FeatureStatistics.of(other), FeatureStatistics.of(own))
    assert reference.distance(train.images[100:400]) == pytest.approx(expected, rel=1e-6)
    found = reference.activations(train.images[100:140]).features
    torch.testing.assert_close(found.double().abs().flip(1), other[:40].abs(), rtol=0, atol=1e-5)


def test_axes_are_stored_and_named(train: ImageData, tmp_path: Path) -> None:
    reference = make_reference(Pixels(), Pixels.name, train, tmp_path)
    again = make_reference(Pixels(), Pixels.name, train, tmp_path)
    assert reference.axes is not None and again.axes is not None
    assert torch.equal(reference.axes.basis, again.axes.basis) and torch.equal(reference.axes.mean, again.axes.mean)
    assert reference.id == again.id and "axes=" in reference.id
    images = train.images[:70]
    assert again.distance(images) == reference.distance(images)
    turned = replace(again, axes=replace(again.axes, basis=again.axes.basis.roll(1, 1)))
    assert turned.id != again.id
    other = make_reference(Pixels(), Pixels.name, first(train, 100))
    assert other.id.split("axes=")[1] != reference.id.split("axes=")[1]


def test_axes_of_another_shape_raise(train: ImageData, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from midway.gen.core.files import state_hash

    make_reference(Pixels(), Pixels.name, train, tmp_path)
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["axes.basis"] = tensors["axes.basis"][:, :3].contiguous()
    save_file(tensors, path, header | {"hash": state_hash("reference", tensors)})
    with pytest.raises(DataError, match=r"axes\.basis"):
        make_reference(Pixels(), Pixels.name, train, tmp_path)


class Parity(FeatureNetwork):
    """Features that are functions of the label alone, but for `noise` times a pixel."""

    def __init__(self, noise: float) -> None:
        super().__init__(FeatureConfig(1, 8, 10, width=8, dim=2))
        self.noise, self.name = noise, "cnn-parity@0"

    def features(self, images: Tensor) -> Tensor:
        mean = images.float().mean((1, 2, 3))
        return torch.stack([images[:, 0, 0, 0].float(), self.noise * mean], dim=1)


@pytest.mark.parametrize("noise", [0.0, 100.0])
def test_collapsed_features_are_warned_about(noise: float, train: ImageData) -> None:
    marked = train.images[:].clone()
    marked[:, 0, 0, 0] = train.labels.to(torch.uint8)
    reference = make_reference(Parity(noise), "cnn-parity@0", replace(train, images=marked))
    assert reference.axes is None and reference.features == "cnn-parity@0"
    if noise:
        assert reference.between is not None and reference.between < 0.5 and not reference.warnings
    else:
        assert reference.between == pytest.approx(1) and "100% of the variance" in reference.warnings[0]
