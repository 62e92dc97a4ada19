"""Reference statistics piece by piece: those of all features at once, from memory and from disk, with one pass or two."""

from pathlib import Path

import pytest
import torch
from many_images import store
from torch import Tensor

from midway.gen.data.images import ImageData
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.features import streaming
from midway.gen.features.pixels import Pixels
from midway.gen.features.reference import balanced, make_reference
from midway.gen.features.streaming import FeatureStream, measured, principal_axes_of
from midway.gen.metrics.class_share import between_class_share
from midway.gen.metrics.moments import FeatureStatistics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def train() -> ImageData:
    return load_splits(DataConfig()).train


class Counting(Pixels):
    """Notes how many images it is given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.given = list[int]()

    def features(self, images: Tensor) -> Tensor:
        self.given.append(len(images))
        return super().features(images)


def test_one_piece_has_the_bits_of_all_features_at_once(train: ImageData) -> None:
    """As they were before there were pieces, so that names and stored statistics stay."""
    network, kept = Counting(), balanced(train.labels)[:500]
    stream, x = FeatureStream(network, train.images), Pixels().features(train.images[:])
    statistics, sample, between = measured(stream, train.labels, kept)
    assert max(network.given) == 256 and sum(network.given) == len(x)
    whole = FeatureStatistics.of(x)
    assert torch.equal(statistics.scatter, whole.scatter) and torch.equal(statistics.mean, whole.mean)
    assert torch.equal(sample, x[kept]) and between == between_class_share(x, train.labels)
    axes = principal_axes_of(stream, 40)
    statistics, sample, between = measured(stream, train.labels, kept, axes)
    assert sum(network.given) == len(x), "features that are few are kept"
    y = axes.project(x)
    assert torch.equal(statistics.scatter, FeatureStatistics.of(y).scatter)
    assert torch.equal(sample, y[kept]) and between == between_class_share(y, train.labels)


@pytest.mark.parametrize("in_memory", [0, 1 << 30])
def test_pieces_are_merged_to_the_whole(in_memory: int, train: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding in float64; features kept or computed again have the same bits."""
    x, kept = Pixels().features(train.images[:]), balanced(train.labels)[:500]
    monkeypatch.setattr(streaming, "PIECE", 1000)
    monkeypatch.setattr(streaming, "PIECE_OF_MANY", 300)
    monkeypatch.setattr(streaming, "IN_MEMORY", in_memory)
    network = Counting()
    stream = FeatureStream(network, train.images)
    first, second = list(stream), list(stream)
    assert [len(piece) for piece in first] == [300, 300, 300, 300, 238]
    assert torch.equal(torch.cat(first), x) and torch.equal(torch.cat(second), x)
    assert sum(network.given) == len(x) * (1 if in_memory else 2)
    statistics, sample, between = measured(stream, train.labels, kept)
    whole = FeatureStatistics.of(x)
    torch.testing.assert_close(statistics.scatter, whole.scatter, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(statistics.mean, whole.mean, rtol=1e-13, atol=1e-15)
    assert torch.equal(sample, x[kept])
    assert between == pytest.approx(between_class_share(x, train.labels), rel=1e-12)


def test_sorted_classes_do_not_bias_the_share(train: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first piece has one class alone, and its mean is far from that of all."""
    order = train.labels.argsort(stable=True)
    images, labels = train.images[order], train.labels[order]
    monkeypatch.setattr(streaming, "PIECE", 0)
    monkeypatch.setattr(streaming, "PIECE_OF_MANY", 60)
    _, _, between = measured(FeatureStream(Pixels(), images), labels, labels[:0])
    assert between == pytest.approx(between_class_share(Pixels().features(images), labels), rel=1e-11)


def test_no_images_have_no_statistics() -> None:
    none = torch.empty(0, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no images"):
        measured(FeatureStream(Pixels(), none), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def test_a_reference_of_stored_images_is_that_of_images_in_memory(train: ImageData, tmp_path: Path) -> None:
    stored = ImageData(store(tmp_path, train.images[:]), train.labels, train.classes, train.name, train.fingerprint)
    one, other = (make_reference(Pixels(), Pixels.name, data) for data in (train, stored))
    assert one.id == other.id and one.between == other.between
    assert torch.equal(one.statistics.scatter, other.statistics.scatter)
    assert one.sample is not None and other.sample is not None and torch.equal(one.sample, other.sample)
