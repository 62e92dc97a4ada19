"""Inception score: how sure a classifier is of each image, and how evenly it spreads over classes.

    IS = exp(mean_x KL(p(y | x) || p(y))),    p(y) = mean_x p(y | x)                    (Salimans et al. 2016, arXiv 1606.03498)

It is computed as exp(H(mean p) - mean H(p)), the same number, which is finite for p = 0 too: 1 where all images get the same
probabilities, K where each is surely of one of K equally frequent classes. As in the literature: the mean and std (divisor
`splits`) over consecutive parts of the images, in the order in which they are given: p(y) is then of a part, and a part of n
images scores at most n. It looks at no reference, and is named with its classifier.
"""

import math
import warnings
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_FEW = 10


@dataclass(frozen=True)
class InceptionScore:
    """Mean and std of `splits` scores, each in [1, K] and of about `size` images (of the smallest part)."""

    value: float
    std: float
    splits: int
    size: int


def inception_score(logits: Tensor, splits: int = 10) -> InceptionScore:
    """Of logits (N, K >= 2), any float dtype, in float64. Part i holds images floor(i N / splits) to the next part's first.

    ValueError if logits are not (N, K) or not finite, for splits < 1 or more splits than images; warns below 10 images a part.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: expected (N, K), K >= 2 classes, one row per image")
    finite = torch.isfinite(logits).all(dim=1)
    if not finite.all():
        raise ValueError(f"logits of {int((~finite).sum())} of {len(logits)} images are not finite: look at the images")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits is {splits} for {len(logits)} images: use at least 1 and at most one per image")
    size = len(logits) // splits
    if size < _FEW:
        warnings.warn(
            f"{size} images in a part: below {_FEW} the inception score is unreliable; use fewer splits or more images",
            stacklevel=2,
        )
    edges = [i * len(logits) // splits for i in range(splits + 1)]
    probabilities = logits.detach().cpu().double().softmax(dim=1)
    found = torch.tensor([_score(probabilities[i:j]) for i, j in pairwise(edges)], dtype=torch.float64)
    return InceptionScore(float(found.mean()), float(found.std(correction=0)), splits, size)


def _score(probabilities: Tensor) -> float:
    """Of one part (n, K)."""
    entropies = torch.special.entr(probabilities).sum(dim=1)
    return math.exp(float(torch.special.entr(probabilities.mean(dim=0)).sum() - entropies.mean()))
