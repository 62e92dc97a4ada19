"""What priors have in common: all of them, and those over codes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from midway.gen.priors.blocks import Trunk
from midway.gen.priors.config import PriorConfig
from midway.gen.priors.decoding import Decoding, guided, law_of
from midway.gen.priors.digits import DigitHead, TokenEmbedding
from midway.gen.priors.draws import Draws
from midway.gen.priors.layout import CodeLayout, LatentLayout
from midway.gen.training.batches import Context

Logits = Callable[[Tensor, Tensor, int], Tensor]
"""(hidden (B, n, W), tokens (B, n, D), digit) -> logits (B, n, K)."""


@dataclass(frozen=True)
class CodeBatch:
    """tokens int64 (B, L, D), labels int64 (B,)."""

    tokens: Tensor
    labels: Tensor


class Prior(nn.Module, ABC):
    """A law of the tokens of images, given their class; `loss` trains it.

    The trunk is evaluated with the class as token 0, at place (0, 0), and the tokens of the image behind it. Label `classes`
    means "no class". `empty` are classes without a training image; `class_names` are () where they are not known.
    """

    places: Tensor

    def __init__(
        self,
        config: PriorConfig,
        layout: CodeLayout | LatentLayout,
        classes: int,
        empty: tuple[int, ...] = (),
        class_names: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.classes = classes if config.conditional else 0
        self.empty, self.class_names = (empty, class_names) if config.conditional else ((), ())
        self.trunk = Trunk(config.width, config.depth, config.heads, config.dropout, config.kind == "causal")
        self.label = nn.Embedding(self.classes + 1, config.width)
        self.position = nn.Embedding(layout.length, config.width)
        for table in (self.label, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.register_buffer("places", torch.cat([torch.zeros(1, 2), layout.places]), persistent=False)

    def after_step(self, step_ok: Tensor) -> None:
        """Nothing to do between optimizer steps."""

    def null_labels(self, labels: Tensor) -> Tensor:
        """The "no class" label for every sample."""
        return torch.full_like(labels, self.classes)

    def kept_labels(self, labels: Tensor, context: Context) -> Tensor:
        """Those of a training step, some of them dropped."""
        kept = (context.uniform("label") >= self.config.label_dropout) & (labels < self.classes)
        return torch.where(kept, labels, self.classes)

    @abstractmethod
    def loss(self, batch: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and what to log."""


class CodePrior(Prior):
    """A law of codes as tokens of digits."""

    layout: CodeLayout  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: PriorConfig, layout: CodeLayout, *classes: Any, **names: Any) -> None:
        super().__init__(config, layout, *classes, **names)
        self.embed = TokenEmbedding(config.width, layout.sizes)
        self.head = DigitHead(config.width, layout.sizes)

    @abstractmethod
    def loss(self, batch: CodeBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, nats a token, and what to log: `bits` of an image."""

    @abstractmethod
    def draw(self, labels: Tensor, draws: Draws, decoding: Decoding) -> Tensor:
        """Tokens int64 (B, L, D) for labels (B,). ValueError for a decoding that this prior cannot have."""


def draw_tokens(
    logits: Logits,
    hidden: Tensor,
    places: Tensor,
    sizes: tuple[int, ...],
    scale: float,
    draws: Draws,
    how: Decoding,
    attempt: int = 0,
) -> tuple[Tensor, Tensor]:
    """The tokens int64 (B, n, D) at places (B, n), digit by digit, and log p (B, n) of what was drawn, under the law drawn from.

    hidden (B, n, W), or (2 B, n, W) with guidance: with the class, then without.
    """
    copies = len(hidden) // len(places)
    tokens = places.new_zeros(*places.shape, len(sizes))
    total: Tensor | None = None
    for digit in range(len(sizes)):
        found = logits(hidden, torch.cat([tokens] * copies), digit)
        law = law_of(guided(found, scale) if copies == 2 else found, how)
        value = draws.categorical(law, places, digit, attempt)
        tokens[..., digit] = value
        own = law.gather(-1, value.unsqueeze(-1)).squeeze(-1)
        total = own if total is None else total + own
    assert total is not None
    return tokens, total
