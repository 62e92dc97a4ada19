"""The floor's images are as balanced over classes as the samples'."""

import torch

from midway.gen.features.reference import balanced


def test_every_prefix_of_the_floors_order_is_balanced() -> None:
    labels = torch.arange(10).repeat_interleave(30)  # sorted by class, as folders are
    order = balanced(labels)
    assert torch.equal(order.sort().values, torch.arange(300))
    for n in (10, 64, 95, 300):
        counts = torch.bincount(labels[order[:n]], minlength=10)
        assert counts.max() - counts.min() <= 1


def test_a_rare_class_runs_out_and_the_others_go_on() -> None:
    labels = torch.tensor([0] * 8 + [1] * 2)
    order = balanced(labels)
    assert torch.bincount(labels[order[:4]]).tolist() == [2, 2]
    assert torch.bincount(labels[order]).tolist() == [8, 2]
