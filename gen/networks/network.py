"""What a latent model needs of its network: a prediction and hidden tokens, from a state and a condition made of the rest.

The condition is made of the noise angle, the class and further numbers by embeddings, which samplers compute for all times at
once; a further number's embedding starts at 0, so that a network that gets one more input predicts what it did before.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from midway.gen.networks.layers import number_embedding, sinusoid, start_at_zero
from midway.gen.training.batches import Context
from midway.tokenizers.precision import widened

EMPTY: Mapping[str, Tensor] = MappingProxyType({})


class NetworkOutput(NamedTuple):
    """value: (B, C, H, W). hidden: (B, tokens, width), from the middle of the network (an existing tensor, no extra cost)."""

    value: Tensor
    hidden: Tensor


class Network(nn.Module, ABC):
    """(x (B, C, H, W), noise_angle (B,) in [0, 1], labels (B,)) -> NetworkOutput. Label `classes` means "no class".

    `more` names further numbers in [0, 1], (B,) each, that the condition depends on (a jump's `span`, `guidance`). Inputs of any
    floating-point dtype; the output has the weights'.
    """

    compilable: ClassVar[bool] = True
    """A function of tensors alone, which torch.compile can take whole."""

    feature_dim: int
    """Channels of a hidden token."""
    grid: tuple[int, int]
    """Hidden tokens, by rows and columns."""
    time_scale: float
    time_intervals: int = 128
    time: nn.Sequential
    label: nn.Embedding
    more: nn.ModuleDict

    def take(self, block: int) -> None:
        """Have the hidden tokens be those after this block, counted from 1; 0: as they are. ValueError if there is none."""
        if block:
            raise ValueError("blocks of this network cannot be named: use 0, its hidden tokens")

    def add_more(self, names: tuple[str, ...]) -> None:
        """Embeddings of further numbers, after everything else was drawn."""
        self.more = nn.ModuleDict({name: number_embedding(self.label.embedding_dim) for name in names})
        for embedding in self.more.values():
            start_at_zero(cast(nn.Sequential, embedding))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.label.weight.dtype

    @abstractmethod
    def join(self, times: Tensor, classes: Tensor) -> Tensor:
        """The condition of embedded times and classes (*, W), which broadcast."""

    @abstractmethod
    def predict(self, x: Tensor, condition: Tensor, context: Context | None) -> NetworkOutput:
        """For x (B, C, H, W) in the weights' dtype and a condition of each sample."""

    def rate_of(self, name: str) -> float:
        """The factor of the learning rate of the parameter of this name (gen/training/interface.py)."""
        return 1.0

    def conditions(self, noise_angle: Tensor, labels: Tensor, more: Mapping[str, Tensor] = EMPTY) -> Tensor:
        """(E, B, *): the condition for every noise_angle (E,), with `more` (E,), and every label (B,)."""
        return self.join(self._times(noise_angle, more)[:, None], self.label(labels))

    def _times(self, noise_angle: Tensor, more: Mapping[str, Tensor]) -> Tensor:
        found = self.time(self._sinusoids(noise_angle).to(self.dtype))
        for name, embedding in self.more.items():
            found = found + embedding(sinusoid(more[name], 256).to(self.dtype))
        return found

    def _sinusoids(self, noise_angle: Tensor) -> Tensor:
        return sinusoid(self.time_scale * widened(noise_angle), 256, intervals=self.time_intervals)

    def forward(
        self,
        x: Tensor,
        noise_angle: Tensor | None = None,
        labels: Tensor | None = None,
        context: Context | None = None,
        condition: Tensor | None = None,
        more: Mapping[str, Tensor] = EMPTY,
    ) -> NetworkOutput:
        """For noise_angle, labels and `more`, or for the condition (B, *) made of them. With a context, as in training, dropout
        acts."""
        if condition is None:
            assert noise_angle is not None and labels is not None
            condition = self.join(self._times(noise_angle, more), self.label(labels))
        return self.predict(x.to(self.dtype), condition, context)
