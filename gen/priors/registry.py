"""Priors by their kind."""

from midway.gen.priors.causal import CausalPrior
from midway.gen.priors.config import PriorConfig
from midway.gen.priors.continuous import ContinuousPrior
from midway.gen.priors.layout import CodeLayout, LatentLayout, layout_of
from midway.gen.priors.masked import MaskedPrior
from midway.gen.priors.prior import Prior, PriorDescription
from midway.tokenizers.tokenizer import ImageTokenizer

Prior.kinds.update(causal=CausalPrior, masked=MaskedPrior, continuous=ContinuousPrior)


def make_prior(
    config: PriorConfig,
    layout: CodeLayout | LatentLayout,
    classes: int,
    empty: tuple[int, ...] = (),
    class_names: tuple[str, ...] = (),
) -> Prior:
    """The prior of a configuration, with new weights."""
    return Prior.make(PriorDescription(config, layout, classes, empty, class_names))


def layout_for(config: PriorConfig, tokenizer: ImageTokenizer) -> CodeLayout | LatentLayout:
    """Of what such a prior reads of a tokenizer: codes, or latents. ValueError as `layout_of`."""
    if config.kind == "continuous":
        return LatentLayout(*tokenizer.latent_shape)
    return layout_of(tokenizer, config.split)
