"""Guidance: what it computes for Gaussians, where an interval lets it act, and what it costs at the network."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from midway.samplers import grids
from midway.samplers.guidance import (
    Apart,
    ConditionalField,
    Together,
    autoguidance,
    classifier_free,
    conditional,
    interval,
    scale_of,
)
from midway.samplers.prediction import Field, NetworkField, Prediction, TimedField, acting, expand
from midway.samplers.sample import EvaluationCounter, sample
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule
from midway.samplers.solvers import ddim
from midway.samplers.table import Table

SCHEDULES = [Linear(), Cosine(), VP(), EDM()]
names = [type(s).__name__ for s in SCHEDULES]
MEANS = torch.tensor([[1.0, -2.0], [0.5, 0.5], [-1.0, 3.0], [0.25, -0.5]], dtype=torch.float64)  # the last is no class


def _gaussian(schedule: Schedule, mean: Tensor, variance: float = 0.25) -> Field:
    """The exact field of N(mean, variance)."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        gain = alpha * variance / (alpha.square() * variance + sigma.square())
        x0 = mean + gain * (x - alpha * mean)
        return Prediction(x0, (x - alpha * x0) / sigma, features=x0 + 1)

    return predict


def _network(schedule: Schedule) -> ConditionalField:
    return lambda x, t, labels: _gaussian(schedule, MEANS[labels])(x, t)


LABELS, NULL = torch.tensor([0, 1, 2, 0]), torch.full((4,), 3)


def _state(schedule: Schedule, time: float) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x * 2, torch.full((4,), time, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guided_gaussians_of_one_variance_are_a_gaussian_about_the_extrapolated_mean(
    schedule: Schedule, scale: float
) -> None:
    """x0, eps and the samples: those of N(m_null + w (m - m_null), variance), whichever of the two guides."""
    x, t = _state(schedule, 0.6)
    want = _gaussian(schedule, MEANS[NULL] + scale * (MEANS[LABELS] - MEANS[NULL]))
    network = _network(schedule)
    table = ddim(schedule, grids.karras(schedule, 6))
    for field in (
        classifier_free(network, LABELS, NULL, scale),
        autoguidance(conditional(network, LABELS), conditional(network, NULL), scale),
    ):
        got = field(x, t)
        torch.testing.assert_close(got.x0, want(x, t).x0, rtol=0, atol=1e-12)
        torch.testing.assert_close(got.eps, want(x, t).eps, rtol=0, atol=1e-12)
        torch.testing.assert_close(sample(field, table, x), sample(want, table, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_features_are_those_of_the_better_prediction(scale: float) -> None:
    schedule = Cosine()
    x, t = _state(schedule, 0.4)
    strong, weak = conditional(_network(schedule), LABELS), conditional(_network(schedule), NULL)
    want = strong(x, t).features
    assert want is not None
    for field in (classifier_free(_network(schedule), LABELS, NULL, scale), autoguidance(strong, weak, scale)):
        features = field(x, t).features
        assert features is not None
        torch.testing.assert_close(features, want, rtol=0, atol=1e-15)


def test_a_network_without_features_has_none_under_guidance() -> None:
    schedule = Cosine()
    x, t = _state(schedule, 0.4)

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Prediction:
        prediction = _network(schedule)(x, t, labels)
        return Prediction(prediction.x0, prediction.eps)

    bare = conditional(network, LABELS)
    assert classifier_free(network, LABELS, NULL, 2.0)(x, t).features is None
    assert autoguidance(bare, conditional(_network(schedule), NULL), 2.0)(x, t).features is None
    timed = interval(conditional(_network(schedule), LABELS), bare, schedule, 0.1, 1.0)
    assert timed(x, t).features is None


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 4), (2.5, 8)])
def test_classifier_free_guidance_counts_twice_and_at_scale_one_once(scale: float, passes: int) -> None:
    counter = EvaluationCounter(_network(EDM()))
    classifier_free(counter, LABELS, NULL, scale)(*_state(EDM(), 0.5))
    assert counter.evaluations == passes


def test_autoguidance_counts_at_both_networks_and_at_scale_one_only_at_its_own() -> None:
    schedule = EDM()
    strong = EvaluationCounter(_gaussian(schedule, MEANS[LABELS]))
    weak = EvaluationCounter(_gaussian(schedule, MEANS[LABELS], variance=0.5))
    table, (x, t) = ddim(schedule, grids.karras(schedule, 5)), _state(schedule, 0.5)
    sample(autoguidance(strong, weak, 2.0), table, x)
    assert (strong.evaluations, weak.evaluations) == (20, 20)
    got = autoguidance(strong, weak, 1.0)(x, t)
    assert (strong.evaluations, weak.evaluations) == (24, 20)
    assert torch.equal(got.x0, strong(x, t).x0)


def _timed(schedule: Schedule, low: float, high: float, counter: EvaluationCounter) -> Field:
    guided = classifier_free(counter, LABELS, NULL, 3.0)
    return interval(guided, conditional(counter, LABELS), schedule, low, high)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_an_interval_is_open_below_and_closed_above(schedule: Schedule) -> None:
    """`acting` chooses by the noise level, not by the time; both ends are times of the schedule itself."""
    low, high = (schedule.rho(torch.tensor(t, dtype=torch.float64)).item() for t in (0.25, 0.75))
    guided, plain = _gaussian(schedule, MEANS[LABELS]), _gaussian(schedule, MEANS[NULL])
    field = interval(guided, plain, schedule, low, high)
    assert isinstance(field, TimedField)
    chosen = [acting(field, t) is guided for t in (0.1, 0.25, 0.2500001, 0.5, 0.75, 0.7500001, 0.9)]
    assert chosen == [False, False, True, True, True, False, False]
    assert all(acting(field, t) in (guided, plain) for t in (0.1, 0.5))
    everywhere = interval(guided, plain, schedule, 0.0, math.inf)
    assert acting(everywhere, 1.0) is guided
    assert acting(plain, 0.5) is plain


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_called_with_tensors_of_times_it_chooses_for_each_sample(schedule: Schedule) -> None:
    x, _ = _state(schedule, 0.5)
    rho = torch.tensor([0.1, 0.5, 2.0, 8.0], dtype=torch.float64)
    t = schedule.time_of_rho(rho)
    field = _timed(schedule, 0.3, 3.0, EvaluationCounter(_network(schedule)))
    got = field(x, t)
    for b in range(4):
        want = acting(field, t[b].item())(x, t)
        torch.testing.assert_close(got.x0[b], want.x0[b], rtol=0, atol=0)
        torch.testing.assert_close(got.eps[b], want.eps[b], rtol=0, atol=0)
        assert got.features is not None and want.features is not None
        torch.testing.assert_close(got.features[b], want.features[b], rtol=0, atol=0)
    one, other = _gaussian(schedule, MEANS[LABELS]), _gaussian(schedule, MEANS[NULL])
    features = interval(one, other, schedule, 0.3, 3.0)(x, t).features
    inside = torch.tensor([False, True, True, False])[:, None]
    assert features is not None
    torch.testing.assert_close(features, torch.where(inside, one(x, t).x0, other(x, t).x0) + 1, rtol=0, atol=0)
    guided = classifier_free(_network(schedule), LABELS, NULL, 3.0)(x, t).x0
    plain = conditional(_network(schedule), LABELS)(x, t).x0
    assert [torch.equal(got.x0[b], guided[b]) for b in range(4)] == [False, True, True, False]
    assert [torch.equal(got.x0[b], plain[b]) for b in range(4)] == [True, False, False, True]


def _loop(field: Field, table: Table, x: Tensor) -> Tensor:
    """A one-step sampler that uses `acting`."""
    for row in table.rows:
        assert row.time is not None
        x0 = acting(field, row.time)(x, x.new_full((len(x),), row.time)).x0
        x = row.states[-1] * x + row.predictions[-1] * x0
    return x


def test_outside_its_interval_guidance_costs_nothing() -> None:
    schedule = EDM()
    table, (x, _) = ddim(schedule, grids.karras(schedule, 12)), _state(schedule, 1.0)
    inside = sum(0.3 < 80 * time <= 3 for time in table.times)
    assert 2 < inside < 8
    counter = EvaluationCounter(_network(schedule))
    end = _loop(_timed(schedule, 0.3, 3.0, counter), table, x)
    assert counter.evaluations == 4 * (12 + inside)
    again = EvaluationCounter(_network(schedule))
    torch.testing.assert_close(sample(_timed(schedule, 0.3, 3.0, again), table, x), end, rtol=0, atol=1e-12)
    assert again.evaluations == counter.evaluations


@pytest.mark.parametrize(("low", "high"), [(-0.1, 1.0), (2.0, 2.0), (3.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_an_empty_interval_raises_an_error(low: float, high: float) -> None:
    field = _gaussian(EDM(), MEANS[LABELS])
    with pytest.raises(ValueError, match="0 <= low < high"):
        interval(field, field, EDM(), low, high)


@pytest.mark.parametrize(("low", "high"), [(80.0, 90.0), (80.0, math.inf), (1e9, math.inf), (math.inf, math.inf)])
def test_an_interval_beyond_the_schedule_raises_an_error(low: float, high: float) -> None:
    plain = conditional(_network(EDM()), LABELS)
    guided = classifier_free(_network(EDM()), LABELS, NULL, 2.0)
    with pytest.raises(ValueError, match=r"ends at rho = 80|0 <= low < high"):
        interval(guided, plain, EDM(), low, high)
    interval(guided, plain, EDM(), 79.0, high=math.inf)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_is_finite(scale: float) -> None:
    network = _network(EDM())
    strong, weak = conditional(network, LABELS), conditional(network, NULL)
    for make in (
        lambda: classifier_free(network, LABELS, NULL, scale),
        lambda: autoguidance(strong, weak, scale),
        lambda: Together(scale, lambda labels: conditional(network, labels), LABELS, NULL),
        lambda: Apart(scale, strong, weak),
        lambda: replace(Apart(2.0, strong, weak), scale=scale),
    ):
        with pytest.raises(ValueError, match="a guidance scale is a finite number"):
            make()


def test_two_predictions_that_are_one_raise_an_error() -> None:
    network = _network(EDM())
    strong = conditional(network, LABELS)
    with pytest.raises(ValueError, match="all of them equal"):
        classifier_free(network, NULL, NULL.clone(), 2.0)
    with pytest.raises(ValueError, match=r"\(4,\) labels and \(3,\) others"):
        classifier_free(network, LABELS, NULL[:3], 2.0)
    for same in (strong, conditional(network, LABELS)):
        with pytest.raises(ValueError, match="guides itself"):
            autoguidance(strong, same, 2.0)
        with pytest.raises(ValueError, match="nothing to guide"):
            interval(same, strong, EDM(), 0.3, 3.0)
    with pytest.raises(ValueError, match="nothing to guide"):
        interval(classifier_free(network, LABELS, NULL, 1.0), strong, EDM(), 0.3, 3.0)


def test_fields_of_two_schedules_raise_an_error() -> None:
    one, other = (NetworkField(lambda x, t: x, "v", schedule) for schedule in (VP(), Linear()))
    for make in (
        lambda: autoguidance(one, other, 2.0),
        lambda: interval(one, other, VP(), 0.3, 3.0),
        lambda: interval(one, NetworkField(lambda x, t: -x, "v", VP()), Linear(), 0.3, 3.0),
    ):
        with pytest.raises(ValueError, match="fields of one schedule"):
            make()


def test_labels_on_a_device_are_not_read() -> None:
    """Tensors without storage: reading a value fails."""
    meta = LABELS.to("meta")
    assert scale_of(classifier_free(_network(EDM()), meta, NULL.to("meta"), 2.0)) == 2
