"""Classes of seeds: in proportion at every beginning, equal counts in turn, random by its frequencies; functions of the seed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.data.images import ImageData
from midway.gen.data.splits import in_proportion, turns
from midway.gen.diffusion.class_draw import ClassDraw, class_draw
from midway.gen.diffusion.sampling import labels_of

COUNTS = [
    (1,),
    (3, 2),
    (0, 5, 0, 1),
    (143, 146, 142, 146, 145, 145, 145, 143, 139, 144),
    (1000, 10, 1),
    (1, 2, 4, 8, 16, 32, 64),
    (500, 1, 1, 1, 1, 1, 1),
    (6, 10, 14, 22, 26),
]
SEEDS = torch.arange(3000)


def counted(labels: Tensor, classes: int) -> Tensor:
    """int64 (N + 1, classes): of each beginning, how often each class occurs."""
    return torch.cat([torch.zeros(1, classes).long(), torch.nn.functional.one_hot(labels, classes).cumsum(0)])


def images(counts: tuple[int, ...]) -> ImageData:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    pixels = torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8)
    return ImageData(pixels, labels, tuple(map(str, range(len(counts)))), "images", "f" * 64)


# ---- in proportion ----


@pytest.mark.parametrize("counts", COUNTS)
def test_every_beginning_has_the_quota_rounded_up_or_down(counts: tuple[int, ...]) -> None:
    """Through several periods, in exact integers."""
    found = counted(ClassDraw(counts).labels(SEEDS), len(counts))
    quota = torch.arange(len(SEEDS) + 1)[:, None] * torch.tensor(counts)
    total = sum(counts)
    assert bool((found >= quota // total).all() and (found <= -(-quota // total)).all())


@pytest.mark.parametrize("counts", COUNTS)
def test_any_block_of_seeds_is_off_by_less_than_2_and_a_whole_period_by_nothing(counts: tuple[int, ...]) -> None:
    found = counted(ClassDraw(counts).labels(SEEDS), len(counts))
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    for n in (7, 100, 359):
        assert (found[n:] - found[:-n] - n * share).abs().max() < 2
    period = len(turns(counts))
    assert torch.equal(found[period], torch.tensor(counts) * period // sum(counts))


def test_equal_counts_take_turns_as_the_seed_modulo_classes() -> None:
    for draw in (ClassDraw((400,) * 10), ClassDraw((3, 1, 7), "balanced"), ClassDraw.in_turn(5)):
        assert torch.equal(draw.labels(SEEDS), SEEDS % len(draw.counts))
    assert torch.equal(labels_of(SEEDS, 7), SEEDS % 7)
    assert torch.equal(labels_of(SEEDS, 4, empty=(0, 2)), torch.tensor([1, 3])[SEEDS % 2])
    assert labels_of(SEEDS, 0, draw=ClassDraw((1, 2))).unique().tolist() == [0]


@pytest.mark.parametrize("rule", ["balanced", "proportional", "random"])
def test_labels_are_functions_of_the_seed_and_never_of_an_empty_class(rule: str) -> None:
    draw = ClassDraw((5, 0, 9, 2, 0), rule)  # pyright: ignore[reportArgumentType]
    some = torch.tensor([2999, 0, 17, 17, 1_000_003, 2**40])
    assert torch.equal(draw.labels(some)[:4], draw.labels(SEEDS)[some[:4]])
    assert set(draw.labels(SEEDS).tolist()) == {0, 2, 3}


def test_random_classes_have_their_frequencies_and_the_spread_of_independent_draws() -> None:
    """Chi square of 10 cells: mean 9; over 40 blocks its mean has a standard error of 0.67."""
    counts = (143, 146, 142, 146, 145, 145, 145, 143, 139, 30)
    labels = ClassDraw(counts, "random").labels(torch.arange(40_000)).view(40, 1000)
    expected = torch.tensor(counts, dtype=torch.float64) * 1000 / sum(counts)
    found = torch.stack([torch.bincount(block, minlength=10) for block in labels])
    chi = ((found - expected).square() / expected).sum(1)
    assert abs(float(chi.mean()) - 9) < 3 * (18 / 40) ** 0.5


def test_a_uniform_number_draws_each_class_on_an_interval_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the largest number below 1, which is 1 after rounding."""
    from midway.gen.diffusion import class_draw as module

    counts = (3, 0, 4, 3, 0)
    u = torch.cat([(torch.arange(10).double() + 0.01) / 10, torch.tensor([1 - 2.0**-53]).double()])
    monkeypatch.setattr(module.randomness, "uniform", lambda *_: u)
    assert ClassDraw(counts, "random").labels(torch.arange(11)).tolist() == [0] * 3 + [2] * 4 + [3] * 4


# ---- real images ----


@pytest.mark.parametrize("counts", [(3, 2), (30, 10, 5, 1), (4, 4, 4), (7,)])
def test_items_in_proportion_are_a_permutation_with_proportional_beginnings(counts: tuple[int, ...]) -> None:
    labels = images(counts).labels.flip(0)
    order = in_proportion(labels)
    assert torch.equal(order.sort().values, torch.arange(len(labels)))
    found = counted(labels[order], len(counts))
    quota = torch.arange(len(labels) + 1)[:, None] * torch.tensor(counts)
    assert bool((found >= quota // sum(counts)).all() and (found <= -(-quota // sum(counts))).all())
    assert len(labels) < 8 or not torch.equal(in_proportion(labels, seed=1), order)


# ---- which draw ----


def test_the_default_is_proportional_and_balanced_for_other_classes() -> None:
    assert class_draw(None, images((3, 1)), 2) == ClassDraw((3, 1), "proportional")
    assert class_draw(None, images((3, 1, 2)), 3, empty=(1,)) == ClassDraw((3, 0, 2), "proportional")
    assert class_draw(None, images((3, 1)), 5) == ClassDraw.in_turn(5)
    assert class_draw(None, images((3, 1)), 0) is None and class_draw("balanced", images((3, 1)), 0) is None
    assert class_draw("balanced", images((3, 1)), 5, empty=(4,)) == ClassDraw((1, 1, 1, 1, 0), "balanced")


@pytest.mark.parametrize(("rule", "classes"), [("random", 5), ("proportional", 0), ("random", 0)])
def test_a_rule_that_a_model_cannot_have_is_a_usage_error(rule: str, classes: int) -> None:
    with pytest.raises(UsageError, match=f"--labels {rule}") as caught:
        class_draw(rule, images((3, 1)), classes)  # pyright: ignore[reportArgumentType]
    assert "drop the flag" in caught.value.fix


def test_equal_draws_have_one_identity_and_others_another() -> None:
    draws = [ClassDraw((4, 4)), ClassDraw((9, 9)), ClassDraw((3, 1), "balanced"), ClassDraw.in_turn(2)]
    assert len({draw.identity for draw in draws}) == 1
    others = [ClassDraw((3, 1)), ClassDraw((3, 1), "random"), ClassDraw((4, 4), "random"), ClassDraw.in_turn(2, (1,))]
    assert len({draw.identity for draw in (*others, draws[0])}) == 5
    assert replace(draws[0], rule="random").identity == others[2].identity


@pytest.mark.parametrize("counts", [(), (0, 0), (3, -1)])
def test_counts_of_nothing_raise(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one must be above 0"):
        ClassDraw(counts)
    with pytest.raises(ValueError, match="one must be above 0"):
        turns(counts)
    with pytest.raises(ValueError, match="2 classes for a model of 3"):
        labels_of(SEEDS, 3, draw=ClassDraw((1, 1)))
