"""The floor's images are as balanced over classes as the samples'."""

import torch

from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.features.reference import balanced


def test_every_prefix_of_the_floors_order_is_balanced() -> None:
    labels = torch.arange(10).repeat_interleave(30)  # sorted by class, as folders are
    order = balanced(labels)
    assert torch.equal(order.sort().values, torch.arange(300))
    for n in (10, 64, 95, 300):
        counts = torch.bincount(labels[order[:n]], minlength=10)
        assert counts.max() - counts.min() <= 1


def test_the_floor_has_rare_classes_in_proportion_as_the_seeds() -> None:
    labels = torch.tensor([0] * 8 + [1] * 2)
    order = balanced(labels)
    for n in range(11):
        assert (
            torch.bincount(labels[order[:n]], minlength=2).tolist()
            == torch.bincount(ClassDraw((8, 2)).labels(torch.arange(n)), minlength=2).tolist()
        )
