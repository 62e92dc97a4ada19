"""The sampler that chooses its steps: exact to its tolerance, counted where the network is called."""

import sys

import pytest
import torch
from oracles import exact_solution, mixture, noise_at, rmse, times_of
from torch import Tensor

from midway.samplers.adaptive import AdaptiveSampler
from midway.samplers.guidance import classifier_free, conditional
from midway.samplers.prediction import Prediction
from midway.samplers.sample import EvaluationCounter
from midway.samplers.schedule import EDM, VP, Linear, Schedule

SCHEDULES = [Linear(), VP(), EDM(sigma_max=20.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_error_follows_the_tolerance_and_evaluations_are_counted_at_the_network(schedule: Schedule) -> None:
    ends, costs, errors = times_of(schedule, 15.0, 0.05), [], []
    x = noise_at(schedule, ends[0], 8)
    exact = exact_solution(mixture(), schedule, x, *ends)
    for tolerance in (1e-3, 1e-6):
        counter = EvaluationCounter(mixture().field(schedule))
        sampler = AdaptiveSampler(schedule, ends, rtol=tolerance, atol=tolerance)
        errors.append(rmse(sampler.run(counter, x), exact))
        costs.append(sampler.evaluations)
        assert counter.evaluations == 8 * sampler.evaluations
        assert sampler.evaluations >= sampler.nfe
    assert errors[0] < 0.05
    assert errors[1] < 1e-4
    assert errors[1] < errors[0] / 30
    assert costs[0] < costs[1]


def test_a_sample_depends_on_its_batch_within_the_tolerance_alone_and_the_way_back_is_the_same_sampler() -> None:
    ends, field = times_of(VP(), 15.0, 0.05), mixture().field(VP())
    x = noise_at(VP(), ends[0], 8)
    forth, back = (AdaptiveSampler(VP(), grid, 1e-7, 1e-7) for grid in (ends, ends[::-1]))
    end = forth.run(field, x)
    assert rmse(forth.run(field, x[:1]), end[:1]) < 1e-5
    assert rmse(back.run(field, end), x) < 1e-4
    assert forth.hash != back.hash != AdaptiveSampler(VP(), ends, 1e-6, 1e-7).hash


def test_the_worst_sample_of_a_batch_decides_on_its_steps() -> None:
    """One among many that need fewer: a mean over the batch would take fewer, too."""
    ends, field = times_of(VP(), 15.0, 0.05), mixture().field(VP())
    x = noise_at(VP(), ends[0], 8)

    def cost(x: Tensor) -> int:
        sampler = AdaptiveSampler(VP(), ends, 1e-6, 1e-6)
        sampler.run(field, x)
        return sampler.evaluations

    alone = [cost(one[None]) for one in x]
    hardest, easiest = (x[alone.index(extreme(alone))] for extreme in (max, min))
    assert cost(torch.stack([hardest, *[easiest] * 255])) > (max(alone) + min(alone)) / 2


def test_guidance_counts_both_of_its_evaluations() -> None:
    schedule, labels = VP(), torch.zeros(4, dtype=torch.int64)
    ends = times_of(schedule, 15.0, 0.05)

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Prediction:
        found = mixture().field(schedule)(x, t)
        return Prediction(found.x0 + 0.1 * labels[:, None], found.eps)

    counter, x = EvaluationCounter(network), noise_at(schedule, ends[0], 4)
    sampler = AdaptiveSampler(schedule, ends, 1e-4, 1e-4)
    guided = sampler.run(classifier_free(counter, labels, labels + 1, scale=2.0), x)
    assert counter.evaluations == 4 * 2 * sampler.evaluations
    assert rmse(guided, AdaptiveSampler(schedule, ends, 1e-4, 1e-4).run(conditional(network, labels), x)) > 1e-3


def test_tolerances_and_ends_are_checked_and_the_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for rtol, atol in ((0.0, 1e-5), (1e-5, -1.0), (float("nan"), 1e-5)):
        with pytest.raises(ValueError, match="positive tolerances"):
            AdaptiveSampler(VP(), (0.9, 0.1), rtol, atol)
    for ends in ((0.9, 0.0), (0.0, 0.9)):
        with pytest.raises(ValueError, match="sigma > 0"):
            AdaptiveSampler(VP(), ends)
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="pip install 'torchdiffeq"):
        AdaptiveSampler(VP(), (0.9, 0.1)).run(mixture().field(VP()), torch.ones(1, 2))
