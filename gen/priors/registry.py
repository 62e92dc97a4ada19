"""Priors by their kind."""

from midway.gen.priors.causal import CausalPrior
from midway.gen.priors.config import PriorConfig
from midway.gen.priors.continuous import ContinuousPrior
from midway.gen.priors.layout import CodeLayout, LatentLayout
from midway.gen.priors.masked import MaskedPrior
from midway.gen.priors.prior import Prior

PRIORS: dict[str, type[Prior]] = {"causal": CausalPrior, "masked": MaskedPrior, "continuous": ContinuousPrior}


def make_prior(
    config: PriorConfig,
    layout: CodeLayout | LatentLayout,
    classes: int,
    empty: tuple[int, ...] = (),
    class_names: tuple[str, ...] = (),
) -> Prior:
    """The prior of a configuration, with new weights."""
    return PRIORS[config.kind](config, layout, classes, empty, class_names)
