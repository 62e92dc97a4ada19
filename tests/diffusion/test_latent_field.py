"""The field of a latent model: prepared for a table it is the field that is called; guidance, intervals, a weak model."""

import math

import pytest
import torch
from torch import Tensor

from midway.gen.diffusion.model import Guidance, LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.samplers import grids
from midway.samplers.parallel import ParallelConfig, ParallelSampler
from midway.samplers.prediction import TARGETS
from midway.samplers.sample import ForwardCounter, sample
from midway.samplers.schedule import SCHEDULES
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table

SHAPE = (3, 4, 4)
EXACT = ParallelConfig(tolerance=0.0)
LABELS = torch.tensor([0, 1, 4, 2])


def model(
    schedule: str = "vp", target: str = "v", seed: int = 0, classes: int = 5, dropout: float = 0.1, **known: tuple
) -> LatentModel:
    """With weights that say something."""
    torch.manual_seed(seed)
    dit = DiTConfig(width=16, depth=2, heads=2)
    config = LatentModelConfig(schedule=schedule, target=target, label_dropout=dropout, dit=dit)  # pyright: ignore
    made = LatentModel(config, SHAPE, classes, **known).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def table_of(made: LatentModel, solver: str = "dpmpp2m", steps: int = 5) -> Table:
    return SOLVERS[solver].build(made.schedule, grids.karras(made.schedule, steps))


def start(made: LatentModel, table: Table) -> Tensor:
    noise = torch.randn(len(LABELS), *SHAPE, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(table.grid[0])
    return noise * torch.hypot(made.schedule.alpha(t), made.schedule.sigma(t))


def both_ways(made: LatentModel, guidance: float | Guidance, solver: str = "dpmpp2m") -> tuple[Tensor, Tensor]:
    """The sample of the prepared field, and that of the field as a function nothing is known of."""
    table = table_of(made, solver)
    field, x = made.field(LABELS, guidance), start(made, table)
    with torch.no_grad():
        return sample(field, table, x), sample(lambda x, t: field(x, t), table, x)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_prepared_for_a_table_it_is_the_field_that_is_called(schedule: str, target: str) -> None:
    made = model(schedule, target)
    for guidance in (1.0, 2.5):
        prepared, called = both_ways(made, guidance)
        torch.testing.assert_close(prepared, called, rtol=1e-4, atol=1e-4 * called.abs().max().item())


GUIDANCES = {
    "classifier-free": Guidance(2.5),
    "in an interval": Guidance(2.5, (0.1, 5.0)),
    "by a weak model": Guidance(2.5, weak=model(seed=1)),
    "by a weak model in an interval": Guidance(2.5, (0.1, 5.0), model(seed=1)),
}


@pytest.mark.parametrize("name", GUIDANCES)
@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_every_guidance_is_the_same_prepared_and_called(name: str, solver: str) -> None:
    made = model()
    prepared, called = both_ways(made, GUIDANCES[name], solver)
    torch.testing.assert_close(prepared, called, rtol=1e-4, atol=1e-4 * called.abs().max().item())
    plain, _ = both_ways(made, 1.0, solver)
    assert (prepared - plain).abs().max() > 1e-2
    others = [both_ways(made, other, solver)[0] for key, other in GUIDANCES.items() if key != name]
    assert all((prepared - other).abs().max() > 1e-3 for other in others)


def test_guidance_moves_from_the_weak_through_the_strong() -> None:
    """One evaluation, by hand."""
    made, weak = model(), model(seed=1)
    x, t = torch.randn(4, *SHAPE), torch.full((4,), 0.6)
    strong = made.conditional_field(x, t, LABELS).x0
    for other, guidance in (
        (made.conditional_field(x, t, torch.full((4,), 5)).x0, Guidance(3.0)),
        (weak.conditional_field(x, t, LABELS).x0, Guidance(3.0, weak=weak)),
    ):
        got = made.field(LABELS, guidance)(x, t).x0
        torch.testing.assert_close(got, other + 3.0 * (strong - other), rtol=1e-4, atol=1e-4)


def test_outside_the_interval_the_network_runs_once_a_sample() -> None:
    made = model()
    table = table_of(made, "ddim", 6)
    rho = made.schedule.rho(torch.tensor(table.times, dtype=torch.float64)).tolist()
    low, high = rho[4], rho[2]  # guided above the fifth, up to and with the third
    with ForwardCounter(made.network) as counter, torch.no_grad():
        sample(made.field(LABELS, Guidance(2.0, (low, high))), table, start(made, table))
    assert counter.evaluations == len(LABELS) * (6 + 2)


def test_sampling_in_parallel_evaluates_what_each_time_needs() -> None:
    made = model()
    table = table_of(made, "ddim", 6)
    guidance, x = Guidance(2.0, (0.1, 5.0)), start(made, table)
    with ForwardCounter(made.network) as counter, torch.no_grad():
        sampler = ParallelSampler(table, made.schedule, EXACT)
        end = sampler.run(made.field(LABELS, guidance), x)
        per_wave = counter.evaluations / sampler.waves / len(LABELS)
        torch.testing.assert_close(end, sample(made.field(LABELS, guidance), table, x), rtol=1e-4, atol=1e-4)
    assert per_wave < 2 * 6


def test_both_models_of_autoguidance_are_counted() -> None:
    made, weak = model(), model(seed=1)
    table = table_of(made, "ddim", 6)
    with ForwardCounter(made.network) as strong, ForwardCounter(weak.network) as other, torch.no_grad():
        sample(made.field(LABELS, Guidance(2.0, (0.5, math.inf), weak)), table, start(made, table))
    assert strong.evaluations == 6 * len(LABELS)
    guided = sum(r > 0.5 for r in made.schedule.rho(torch.tensor(table.times)).tolist())
    assert 0 < guided < 6
    assert other.evaluations == guided * len(LABELS)


def test_a_model_that_cannot_guide_raises_an_error() -> None:
    made = model()
    larger = LatentModel(made.config, (3, 8, 8), 5)
    for other in (model("linear"), model(target="eps"), larger):
        with pytest.raises(ValueError, match="guide with one trained alike"):
            made.field(LABELS, Guidance(2.0, weak=other))
    unconditional = model(classes=0)
    unconditional.field(LABELS, Guidance(2.0, weak=model(seed=3)))
    with pytest.raises(ValueError, match="needs classes"):
        unconditional.field(LABELS, 2.0)


NOTHING_TO_GUIDE = {
    "needs classes": model(classes=0),
    "on one class": model(classes=1),
    "on one class,": model(empty=(0, 1, 2, 4)),
    "no prediction without": model(dropout=0.0),
    "trained without labels": model(dropout=1.0),
}


@pytest.mark.parametrize("why", NOTHING_TO_GUIDE)
def test_a_model_with_nothing_to_guide_raises_an_error(why: str) -> None:
    """And is guided by another model nevertheless, at another scale than 1."""
    made = NOTHING_TO_GUIDE[why]
    with pytest.raises(ValueError, match=why):
        made.field(LABELS, 2.0)
    with pytest.raises(ValueError, match=why):
        made.field(LABELS, Guidance(2.0, (0.3, 3.0)))
    with pytest.raises(ValueError, match=why):
        made.field(LABELS, 2.0, made.conditional_field)
    made.field(LABELS)
    made.field(LABELS, Guidance(2.0, weak=model(seed=7, classes=0)))


def test_a_guide_is_another_model_of_the_same_classes() -> None:
    made = model(class_names=tuple("abcde"))
    for guide, why in (
        (made, "is the model itself"),
        (model(seed=1, classes=4), "classes 4, this one 5"),
        (model(seed=1, class_names=tuple("abced")), "class names"),
    ):
        with pytest.raises(ValueError, match=why):
            made.field(LABELS, Guidance(2.0, weak=guide))
    made.field(LABELS, Guidance(2.0, weak=model(seed=1)))
    with pytest.raises(ValueError, match="has no prediction without a label"):
        model(classes=0).field(LABELS, Guidance(2.0, weak=model(seed=1, dropout=0.0)))


@pytest.mark.parametrize(("mine", "theirs"), [(5, 0), (0, 5)])
def test_where_one_of_two_models_has_no_classes_the_guide_has_no_label(mine: int, theirs: int) -> None:
    made, guide = model(classes=mine), model(seed=1, classes=theirs)
    x, t, labels = torch.randn(4, *SHAPE), torch.full((4,), 0.6), LABELS if mine else torch.zeros(4, dtype=torch.int64)
    strong, weak = made.conditional_field(x, t, labels).x0, guide.conditional_field(x, t, torch.full((4,), theirs)).x0
    got = made.field(labels, Guidance(3.0, weak=guide))(x, t).x0
    torch.testing.assert_close(got, weak + 3.0 * (strong - weak), rtol=1e-4, atol=1e-4)


def test_guidance_that_is_none_cannot_be_made() -> None:
    for scale in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="a guidance scale is a finite number"):
            Guidance(scale)
    for ends in ((-1.0, 5.0), (5.0, 1.0), (1.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="0 <= low < high"):
            Guidance(2.0, ends)
    for make in (lambda: Guidance(1.0, (0.1, 5.0)), lambda: Guidance(weak=model(seed=1))):
        with pytest.raises(ValueError, match="at scale 1 nothing is guided"):
            make()
    with pytest.raises(ValueError, match="ends at rho"):
        model().field(LABELS, Guidance(2.0, (1e4, math.inf)))  # vp ends at 151
    with pytest.raises(ValueError, match="by its own label alone"):
        made = model()
        made.field(LABELS, Guidance(2.0, (0.1, 5.0)), made.conditional_field)


def test_conditions_of_all_times_are_those_of_each() -> None:
    network = model().network
    angles = torch.tensor([0.1, 0.5, 0.9])
    together = network.conditions(angles, LABELS)
    assert together.shape == (3, 4, 16)
    x = torch.randn(4, *SHAPE)
    for i, time in enumerate(angles):
        torch.testing.assert_close(
            network(x, condition=together[i]).value, network(x, time.expand(4), LABELS).value, rtol=1e-5, atol=1e-5
        )
