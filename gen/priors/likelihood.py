"""Bits of codes, an image's: of a prior, and of what needs no network.

fixed length    L log2 of the codes of a position (`CodeLayout.bits`)
independent     every digit of every position on its own:  P(k) = (count in training codes + 1) / (N + K)
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from midway.gen.priors.causal import CausalPrior
from midway.gen.priors.draws import SeededDraws
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.masked import MaskedPrior
from midway.gen.priors.prior import Prior
from midway.gen.training.batches import CodeBatch

MASKS = 16
"""Most masks of an image, unless more are given."""


def masks_of(prior: Prior, masks: int | None = None) -> int:
    """How many masks bound the bits of an image under a masked prior: by default one a token, at most `MASKS`."""
    return masks or min(prior.layout.length, MASKS)


def code_bits(prior: Prior, codes: CodeBatch, masks: int | None = None, batch_size: int = 256) -> Tensor:
    """float64 (N,) on the CPU: bits of codes (N, L, D) given their classes, of a masked prior a bound by `masks` masks.

    The masks of an image are functions of its place in `codes`, so that batches change nothing beyond rounding. ValueError for a
    prior that has no likelihood.
    """
    device, found = next(prior.parameters()).device, list[Tensor]()
    places = torch.arange(len(codes.labels)).split(batch_size)
    batches = zip(codes.tokens.split(batch_size), codes.labels.split(batch_size), places, strict=True)
    for tokens, labels, part in batches:
        given = tokens.to(device), labels.to(device)
        if isinstance(prior, CausalPrior):
            bits = prior.bits(*given)
        elif isinstance(prior, MaskedPrior):
            bits = prior.bits(*given, SeededDraws(part), masks_of(prior, masks))
        else:
            raise ValueError(f"a {prior.config.kind} prior has no bits of codes")
        found.append(bits.cpu())
    return torch.cat(found)


def bits_name(prior: Prior, masks: int | None = None) -> str:
    """What the bits of `code_bits` are."""
    return "exact" if isinstance(prior, CausalPrior) else f"bound, {masks_of(prior, masks)} mask(s) an image"


def independent_bits(train: Iterable[Tensor], tokens: Tensor, layout: CodeLayout) -> Tensor:
    """float64 (N,): bits of tokens (N, L, D) by frequencies in batches (n, L, D) of training tokens, all counted once more."""
    counts = [torch.ones(layout.length, size, dtype=torch.float64) for size in layout.sizes]
    seen = 0
    for part in train:
        seen += len(part)
        for count, digit in zip(counts, part.unbind(-1), strict=True):
            count.scatter_add_(1, digit.T, torch.ones(digit.T.shape, dtype=torch.float64))
    laws = ((seen + size) / count for count, size in zip(counts, layout.sizes, strict=True))
    own = [law.log2().gather(1, digit.T).sum(0) for law, digit in zip(laws, tokens.unbind(-1), strict=True)]
    return torch.stack(own).sum(0)
