"""The random numbers of a decoder: every one is a function of (seed of the image, purpose, place in the sequence)."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from midway.gen.core import randomness

MOST_PLACES = 2**20
"""More than an image has tokens."""


class Values(Protocol):
    """How the values of digits are chosen, for images of one batch."""

    def categorical(self, law: Tensor, places: Tensor, digit: int, attempt: int = 0) -> Tensor:
        """One of K, int64 (B, n), by log-probabilities (B, n, K), -inf among them: this digit of the tokens at places (B, n).

        attempt: of a rule that draws a token again.
        """
        ...


class Draws(Values, Protocol):
    """What a decoder draws."""

    def keys(self, purpose: str, length: int) -> Tensor:
        """float64 (B, length), uniform on (0, 1): to sort by, or to make other numbers of."""
        ...


class NormalDraws(Protocol):
    """What a decoder of continuous tokens draws."""

    def keys(self, purpose: str, length: int) -> Tensor:
        """As of `Draws`."""
        ...

    def normal(self, draw: int, places: Tensor, channels: int) -> Tensor:
        """Standard normal numbers (B, n, C) for the tokens at places (B, n): draw 0 where a sampler begins, later on the way."""
        ...


@dataclass(frozen=True)
class SeededDraws:
    """By seeds int64 (B,): not by batch, process, or the number of evaluations, so that decoders share their numbers."""

    seeds: Tensor

    def categorical(self, law: Tensor, places: Tensor, digit: int, attempt: int = 0) -> Tensor:
        """By the inverse of the distribution function, in float64."""
        u = randomness.uniform_at(0, f"prior digit {digit}", attempt, self.seeds, places)
        total = law.double().exp().cumsum(-1)
        u = u[..., None] * total[..., -1:]
        return torch.searchsorted(total, u, right=True).squeeze(-1).clamp(max=law.shape[-1] - 1)

    def keys(self, purpose: str, length: int) -> Tensor:
        return randomness.uniform(0, f"prior {purpose}", 0, self.seeds, (length,))

    def normal(self, draw: int, places: Tensor, channels: int) -> Tensor:
        """float32."""
        great = self.seeds >> 64 - (MOST_PLACES.bit_length() - 1)  # what the next line drops
        apart = torch.where(great == 0, 0, randomness.words(0, "prior seed", 0, great, 1)[:, 0])
        ids = (self.seeds * MOST_PLACES + apart)[:, None] + places.cpu()
        drawn = randomness.normal(0, "prior token", draw, ids.flatten(), (channels,))
        return drawn.view(*places.shape, channels).to(places.device)
