"""Answers of metrics to damage: closed forms of the error and of the ratios."""

import pytest
import torch
from torch import Tensor

from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.evaluation.damages import Damage, without_one
from midway.gen.evaluation.metric_check import check_space, jackknife_error
from midway.gen.features.pixels import Pixels
from midway.gen.features.reference import FeatureReference, Subject, balanced_subject, make_reference

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*mostly bias")]


@pytest.fixture(scope="module")
def reference() -> FeatureReference:
    return make_reference(Pixels(), Pixels.name, load_splits(DataConfig()).train)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return balanced_subject(load_splits(DataConfig()).held_out, 200)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    """Exactly that of the mean of the groups' means, which estimates s / sqrt(n)."""
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def mean(rows: Tensor) -> float:
        return float(rows.mean())

    groups = x.view(200, 2).mean(1)  # of two rows each: the error of the mean of their means
    assert jackknife_error(mean, x, groups=200) == pytest.approx(float(groups.std()) / 200**0.5)
    assert jackknife_error(mean, x) == pytest.approx(float(x.view(10, 40).mean(1).std()) / 10**0.5)
    assert jackknife_error(mean, x) == pytest.approx(float(x.std()) / 20, rel=0.5)
    with pytest.raises(ValueError, match="at least 4"):
        jackknife_error(mean, x[:3])


def test_ratios_are_to_as_many_undamaged_images(reference: FeatureReference, subject: Subject) -> None:
    damages = (
        Damage("nothing", 1.5),
        Damage("black", 1.5, lambda its: torch.zeros_like(its.images[:])),
        Damage("one class missing", None, choose=without_one, classes=2),
        Damage("eleven classes", 1.5, classes=11),
    )
    check = check_space(reference, subject, damages)
    nothing, black, missing = check.rows
    assert check.features == reference.features and check.between == reference.between
    assert (nothing.distance_ratio, nothing.kid_errors, nothing.sliced_ratio) == (1, 0, 1) and not nothing.answers
    features = reference.activations(subject.images[:]).features
    assert check.floor.distance == reference.distance_of(features) and check.floor.n == 200
    assert check.floor.sliced == reference.slices.distance(features)
    dark = reference.distance(torch.zeros_like(subject.images[:]))
    assert black.distance == dark and black.distance_ratio == pytest.approx(dark / check.floor.distance)
    assert black.answers and black.kid_errors > 100
    chosen = without_one(subject.labels)
    runs = [(20 * i + torch.arange(200 - len(places))) % 200 for i, places in enumerate(chosen)]  # left out in turn
    alike = [features[~torch.isin(torch.arange(200), run)] for run in runs]
    kept = [reference.distance_of(features[places]) for places in chosen]
    assert missing.n == 180 and missing.answers  # nothing is required
    assert missing.distance == pytest.approx(sum(kept) / 10)
    assert missing.distance_ratio == pytest.approx(sum(kept) / sum(map(reference.distance_of, alike)))
    assert check.failed == (nothing,)
