"""Damages are what they are named."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensors import pixels
from torch import Tensor

from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.evaluation.damages import (
    DAMAGES,
    blurred,
    class_means,
    compressed,
    half_deviations,
    noisy,
    repeated,
    shifted,
    undamaged,
    without_half,
    without_one,
)
from midway.gen.features.reference import Subject, balanced_subject


@pytest.fixture(scope="module")
def digits() -> Subject:
    return balanced_subject(load_splits(DataConfig()).held_out)


def subject(images: Tensor, labels: list[int] | None = None) -> Subject:
    labels = labels or [0] * len(images)
    return Subject(images, torch.tensor(labels), torch.arange(len(images)), "some")


def test_required_damages_are_those_of_the_page() -> None:
    assert {damage.name: damage.required for damage in DAMAGES} == {
        "class means": 20,
        "deviations x 0.5": 1.5,
        "half the classes missing": 1.5,
        "one class missing": 1.5,
        "50 images repeated": 1.5,
        "blur 3x3": 1.5,
        "noise 0.05": 1.5,
        "noise 0.02": None,
        "shift of 1 pixel": None,
        "JPEG 75": None,
    }


def test_class_means_are_one_picture_per_class(digits: Subject) -> None:
    found = class_means(digits)
    assert len(found.flatten(1).unique(dim=0)) == 10
    for label in range(10):
        mine = digits.labels == label
        mean = digits.images[mine].double().mean(0)
        assert (found[mine].double() - mean).abs().max() <= 0.5 + 1e-4


def test_half_of_every_deviation_is_gone(digits: Subject) -> None:
    """Half-way to the class mean, to within rounding; of class means nothing changes."""
    found, x = half_deviations(digits).double(), digits.images[:].double()
    for label in range(10):
        mine = digits.labels == label
        assert (found[mine] - (x[mine] + x[mine].mean(0)) / 2).abs().max() <= 0.5 + 1e-4
    alike = subject(pixels(1, 3, 8).expand(4, -1, -1, -1), [0, 0, 3, 3])
    assert torch.equal(half_deviations(alike), alike.images[:])


def test_blur_is_the_mean_of_nine_pixels_with_edges_repeated() -> None:
    images = pixels(2, 3, 6)
    padded = torch.nn.functional.pad(images.double(), (1, 1, 1, 1), mode="replicate")
    expected = sum(padded[..., i : i + 6, j : j + 6] for i in range(3) for j in range(3)) / 9
    assert (blurred(subject(images)).double() - expected).abs().max() <= 0.5 + 1e-4
    flat = torch.full((1, 1, 5, 5), 77, dtype=torch.uint8)
    assert torch.equal(blurred(subject(flat)), flat)


def test_noise_has_its_deviation_and_follows_the_image() -> None:
    grey = torch.full((400, 1, 8, 8), 128, dtype=torch.uint8)
    found = noisy(0.05)(subject(grey)).double()
    expected = ((255 * 0.05) ** 2 + 1 / 12) ** 0.5  # rounding adds 1/12
    assert found.std().item() == pytest.approx(expected, rel=0.02) and abs(found.mean().item() - 128) < 0.3
    some = Subject(grey[:3], torch.zeros(3).long(), torch.tensor([7, 1, 9]), "some")
    assert torch.equal(noisy(0.05)(some).double(), found[[7, 1, 9]])


def test_a_shift_moves_every_column() -> None:
    images = pixels(2, 3, 5)
    found = shifted(subject(images))
    assert torch.equal(found[..., 1:], images[..., :-1]) and torch.equal(found[..., 0], images[..., 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(channels: int) -> None:
    images = pixels(2, channels, 16)
    file = io.BytesIO()
    array = images[1].permute(1, 2, 0).numpy()
    Image.fromarray(array if channels == 3 else array[..., 0]).save(file, "JPEG", quality=75)
    with Image.open(file) as opened:
        expected = np.asarray(opened).reshape(16, 16, channels)
    found = compressed(subject(images))
    assert found.dtype == torch.uint8 and np.array_equal(found[1].permute(1, 2, 0).numpy(), expected)
    assert not torch.equal(found, images)
    flat = torch.full((1, channels, 16, 16), 120, dtype=torch.uint8)
    assert (compressed(subject(flat)).int() - 120).abs().max() <= 1


def test_missing_classes_are_missing() -> None:
    labels = torch.tensor([0, 4, 2, 0, 9, 4, 2, 2, 7])
    left = [set(labels[places].tolist()) for places in without_one(labels)]
    assert left == [{0, 2, 4, 7, 9} - {c} for c in (0, 2, 4, 7, 9)]
    first, second = (set(labels[places].tolist()) for places in without_half(labels))
    assert (first, second) == ({4, 7, 9}, {0, 2})
    assert sum(map(len, without_half(labels))) == len(labels)
    assert sum(map(len, without_one(labels))) == len(labels) * 4


def test_repeated_images_are_fifty() -> None:
    (places,) = repeated(torch.zeros(120).long())
    assert len(places) == 120 and torch.bincount(places).tolist() == [3] * 20 + [2] * 30


def test_undamaged_sets_are_as_large_and_different() -> None:
    """They leave out one run after another, so that of images whose classes take turns none is missing."""
    chosen = [torch.arange(90), torch.arange(80), torch.arange(100)]
    found = undamaged(100, chosen)
    assert [len(places) for places in found] == [90, 80, 100]
    left_out = [set(range(100)) - set(places.tolist()) for places in found]
    assert left_out == [set(range(10)), set(range(33, 53)), set()]
    labels = torch.arange(100) % 10
    assert all(len(labels[places].unique()) == 10 for places in found)
