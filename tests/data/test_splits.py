"""The held-out side: stratified, of every class in turn where shares are no whole numbers, and never a class's last image."""

import pytest
import torch
from torch import Tensor

from midway.gen.core.errors import DataError
from midway.gen.data.images import load_images
from midway.gen.data.splits import held_out_mask, split


def held_out(sizes: list[int], share: float, seed: int = 0) -> Tensor:
    """int64 (classes,): images held out of each class."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return torch.bincount(labels[held_out_mask(labels, share, seed)], minlength=len(sizes))


def by_float_and_alphabet(sizes: list[int], share: float) -> list[int]:
    """Largest remainders with ties to the first class: what splits were before ties were broken by seed."""
    quotas = torch.tensor(sizes).double() * share
    counts = quotas.floor().long()
    up = (counts - quotas).argsort(stable=True)[: round(float(quotas.sum())) - int(counts.sum())]
    counts[up] += 1
    return counts.tolist()


@pytest.mark.parametrize(
    ("sizes", "share"),
    [([5] * 100, 0.1), ([3, 13, 23, 33, 43] * 20, 0.1), ([2] * 100, 0.2), ([7] * 60, 1 / 3)],
    ids=["equal classes", "equal remainders up to rounding", "pairs", "thirds"],
)
def test_classes_take_turns_over_seeds(sizes: list[int], share: float) -> None:
    counts = torch.stack([held_out(sizes, share, seed) for seed in range(10)])
    base = (torch.tensor(sizes).double() * share).floor().long()
    extra = counts - base
    assert extra.unique().tolist() == [0, 1] and (counts.sum(1) == round(sum(sizes) * share)).all()
    assert not torch.equal(extra[0], extra[1])
    assert (extra.sum(0) > 0).float().mean() > 0.9
    first, second = extra[:, : len(sizes) // 2].sum(), extra[:, len(sizes) // 2 :].sum()
    assert abs(first / second - 1) < 0.25, "no half of the alphabet has more"
    assert torch.equal(held_out(sizes, share, 3), counts[3])


def test_without_ties_the_split_is_what_it_was() -> None:
    labels = load_images("digits").labels
    sizes = torch.bincount(labels).tolist()
    for share in (0.1, 0.2):
        for seed in range(3):
            mask = held_out_mask(labels, share, seed)
            assert torch.bincount(labels[mask]).tolist() == by_float_and_alphabet(sizes, share)
    cifar = [5000] * 10
    assert held_out(cifar, 0.1, 7).tolist() == by_float_and_alphabet(cifar, 0.1) == [500] * 10
    uneven = torch.randint(2, 400, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    assert held_out(uneven, 0.1234567).tolist() == by_float_and_alphabet(uneven, 0.1234567)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.62, 0.9])
@pytest.mark.parametrize("sizes", [[1, 1, 1, 40], [1] * 20 + [100], [2] * 50, [1, 2, 3, 4, 5], [0, 3, 0, 1, 9]])
def test_each_class_keeps_a_training_image_and_gives_its_share(sizes: list[int], share: float) -> None:
    for seed in range(5):
        counts, total = held_out(sizes, share, seed), torch.tensor(sizes)
        assert bool((counts < total)[total > 0].all()) and counts.sum() > 0
        assert ((counts - total * share).abs() <= 1).all()
        missing = round(sum(sizes) * share) - int(counts.sum())
        could = int(((counts < total * share + 1e-9) & (counts + 1 < total)).sum())
        assert missing >= 0 and (missing == 0 or could == 0), "a class that could give one more was passed over"


def test_classes_of_one_image_are_divided_if_there_are_no_others() -> None:
    counts = torch.stack([held_out([1] * 10, 0.5, seed) for seed in range(5)])
    assert (counts.sum(1) == 5).all() and len(counts.unique(dim=0)) > 1


def test_a_share_that_leaves_a_side_empty_raises_as_before() -> None:
    for sizes, share in (([2], 0.9), ([1], 0.5), ([2], 0.1), ([1, 1], 0.9)):
        with pytest.raises(DataError, match="empty"):
            held_out(sizes, share)


def test_split_follows_the_mask() -> None:
    data = load_images("digits")
    mask = held_out_mask(data.labels, 0.3, 1)
    assert torch.equal(split(data, 0.3, 1)[1].images[:], data.images[:][mask])
