"""Guidance as Field -> Field.

Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): D = D_null + w (D_label - D_null), on all channels.
x0 and eps are both affine in the network's output, so both follow the same rule. w = 1 is the conditional model.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from midway.samplers.prediction import Field, Prediction

ConditionalField = Callable[[Tensor, Tensor, Tensor], Prediction]
"""(x_t (B, *), t (B,), labels (B,)) -> Prediction."""


def conditional(network: ConditionalField, labels: Tensor) -> Field:
    """The field of fixed labels (B,)."""
    return lambda x, t: network(x, t, labels)


def classifier_free(network: ConditionalField, labels: Tensor, null: Tensor, scale: float) -> Field:
    """Guided field; both branches in one batch of 2 B. At scale 1 it is `conditional`, at half the evaluations.

    labels, null: int64 (B,), the classes asked for and the "no class" label. Features are the conditional branch's.
    """
    if scale == 1:
        return conditional(network, labels)

    def guided(x: Tensor, t: Tensor) -> Prediction:
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null]))
        (x0, x0_null), (eps, eps_null) = both.x0.chunk(2), both.eps.chunk(2)
        features = None if both.features is None else both.features.chunk(2)[0]
        return Prediction(torch.lerp(x0_null, x0, scale), torch.lerp(eps_null, eps, scale), features)

    return guided
