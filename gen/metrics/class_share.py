"""How much of the variance of features lies between classes.

    share = sum_c n_c |m_c - m|^2 / sum_i |x_i - m|^2          (eta^2 of a one-way analysis of variance, over all features)

At 1 the features of a class are one point: a distance on them sees which classes there are and nothing of the variety within
them, so that one fixed picture per class is as good as the data. A classifier's own features come close to it (neural collapse,
Papyan et al. 2020, arXiv 2008.08186).
"""

import torch
from torch import Tensor

MOST = 0.8
"""Above it a distance hardly depends on the variety within classes."""


class ClassSums:
    """Of features that come piece by piece: sums by class about an `origin` near their mean, float64 (D,), and of squares."""

    def __init__(self, classes: int, origin: Tensor) -> None:
        self.origin, self.squares = origin, 0.0
        self.sizes = torch.zeros(classes, dtype=torch.float64)
        self.sums = torch.zeros(classes, len(origin), dtype=torch.float64)

    def add(self, features: Tensor, members: Tensor) -> None:
        """Features (n, D), and the classes of each, int64 (n,), from 0 on."""
        x = features.detach().cpu().double() - self.origin
        self.sizes += torch.bincount(members, minlength=len(self.sizes))
        self.sums.index_add_(0, members, x)
        self.squares += float(x.square().sum())

    def share(self, mean: Tensor) -> float:
        """In [0, 1], for the mean of all features, float64 (D,); 0 of features without variance."""
        apart = mean - self.origin
        total = self.squares - float(self.sizes.sum() * apart.square().sum())
        between = (self.sums - self.sizes[:, None] * apart).square().sum(1) / self.sizes
        return float(between.sum()) / total if total > 0 else 0.0


def between_class_share(features: Tensor, labels: Tensor) -> float:
    """In [0, 1], of features (N, D) and labels int64 (N,); 0 of features without variance. ValueError for N = 0 or two N."""
    if len(features) != len(labels) or not len(labels):
        raise ValueError(f"{len(features)} feature vectors and {len(labels)} labels: every image has one label")
    classes, members = labels.cpu().unique(return_inverse=True)
    mean = features.detach().cpu().double().mean(0)
    sums = ClassSums(len(classes), mean)
    sums.add(features, members)
    return sums.share(mean)
