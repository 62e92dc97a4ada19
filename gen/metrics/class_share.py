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


def between_class_share(features: Tensor, labels: Tensor) -> float:
    """In [0, 1], of features (N, D) and labels int64 (N,); 0 of features without variance. ValueError for N = 0 or two N."""
    if len(features) != len(labels) or not len(labels):
        raise ValueError(f"{len(features)} feature vectors and {len(labels)} labels: every image has one label")
    x = features.detach().cpu().double()
    x = x - x.mean(0)
    classes, members = labels.cpu().unique(return_inverse=True)
    sizes = torch.bincount(members, minlength=len(classes)).double()
    sums = torch.zeros(len(classes), x.shape[1], dtype=torch.float64).index_add_(0, members, x)
    total = float(x.square().sum())
    return float((sums.square().sum(1) / sizes).sum()) / total if total > 0 else 0.0
