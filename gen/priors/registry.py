"""Priors by their kind."""

from midway.gen.priors.causal import CausalPrior
from midway.gen.priors.config import PriorConfig
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.masked import MaskedPrior
from midway.gen.priors.prior import Prior, PriorDescription

Prior.kinds.update(causal=CausalPrior, masked=MaskedPrior)


def make_prior(
    config: PriorConfig,
    layout: CodeLayout,
    classes: int,
    empty: tuple[int, ...] = (),
    class_names: tuple[str, ...] = (),
) -> Prior:
    """The prior of a configuration, with new weights."""
    return Prior.make(PriorDescription(config, layout, classes, empty, class_names))
