"""What priors have in common: all of them, and those over codes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from midway.gen.core.ranges import check_classes
from midway.gen.diffusion.description import DescribedModel
from midway.gen.priors.blocks import Trunk
from midway.gen.priors.config import PriorConfig
from midway.gen.priors.decoding import Decoding, Prompt, guided, law_of
from midway.gen.priors.digits import DigitHead, TokenEmbedding
from midway.gen.priors.draws import Draws, Values
from midway.gen.priors.layout import CodeLayout, LatentLayout
from midway.gen.training.batches import CodeBatch, Context
from midway.samplers.guidance_checks import why_unguided
from midway.tokenizers.hub import card_of

Logits = Callable[[Tensor, Tensor, int], Tensor]
"""(hidden (B, n, W), tokens (B, n, D), digit) -> logits (B, n, K)."""


USAGE = """\
from midway import ImageTokenizer, Prior
prior = Prior.from_pretrained(".")
tokenizer = ImageTokenizer.from_pretrained("tokenizer")"""
"""Python that loads the prior in the current folder and its tokenizer."""


@dataclass(frozen=True)
class PriorDescription:
    """From which a prior is built: model.json of a checkpoint, config.json of a folder to share."""

    config: PriorConfig
    layout: CodeLayout | LatentLayout
    classes: int
    empty: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_classes(self.classes, self.empty, self.class_names)


class Prior(DescribedModel, ABC):
    """A law of the tokens of images, given their class; `loss` trains it.

    The trunk is evaluated with the class as token 0, at place (0, 0), and the tokens of the image behind it. Label `classes`
    means "no class". `empty` are classes without a training image; `class_names` are () where they are not known.

    Saved and loaded bit for bit by save_pretrained and from_pretrained; its tokenizer is a model of its own.
    """

    described = PriorDescription
    noun = "prior"
    read_in_parts: ClassVar[tuple[str, ...]] = ("head", "position")
    """Modules that are not called as a whole, so that FSDP shards them with the root alone."""
    kinds: ClassVar[dict[str, type["Prior"]]] = {}
    """By the kind of their configuration; registry.py fills it."""
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
        self.register_buffer(
            "places", torch.cat([torch.zeros_like(layout.places[:1]), layout.places]), persistent=False
        )

    @classmethod
    def make(cls, found: PriorDescription) -> Self:
        kind = cls.kinds[found.config.kind]
        if not issubclass(kind, cls):
            raise ValueError(f"it is a {found.config.kind} prior, which Prior.from_pretrained loads")
        return kind(found.config, found.layout, found.classes, found.empty, found.class_names)

    def own_card(self, license: str) -> str:
        facts = {"kind": self.config.kind, "tokens": self.layout.length, "classes": self.classes}
        return card_of("Prior over codes", license, ("prior", self.config.kind), facts, USAGE)

    def after_step(self, step_ok: Tensor) -> None:
        """Nothing to do between optimizer steps."""

    def null_labels(self, labels: Tensor) -> Tensor:
        """The "no class" label for every sample."""
        return torch.full_like(labels, self.classes)

    def kept_labels(self, labels: Tensor, context: Context) -> Tensor:
        """Those of a training step, some of them dropped."""
        kept = (context.uniform("label") >= self.config.label_dropout) & (labels < self.classes)
        return torch.where(kept, labels, self.classes)

    def given(self, labels: Tensor) -> Tensor:
        """Labels (B,) as inputs: those of an unconditional prior are all "no class". ValueError for one that does not exist."""
        if not self.classes:
            return self.null_labels(labels)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= self.classes:
            raise ValueError(
                f"labels are {int(labels.min())} to {int(labels.max())}: this prior has the classes 0 to {self.classes - 1}, and "
                f"{self.classes} for none"
            )
        return labels

    def check(self, decoding: Decoding, prompt: Prompt | None = None) -> None:
        """ValueError for what this prior cannot draw by, or from; a warning of what draws something else than is expected."""
        lacking = why_unguided(self.classes, len(self.empty), self.config.label_dropout)
        if decoding.guidance != 1 and lacking:
            raise ValueError(f"guidance {decoding.guidance:g} {lacking}: use guidance 1")
        shape = (self.layout.length, self.layout.width)
        if prompt is not None and tuple(prompt.tokens.shape[1:]) != shape:
            raise ValueError(
                f"a prompt of shape {tuple(prompt.tokens.shape)}: this prior has tokens (B, {shape[0]}, {shape[1]})"
            )

    def inputs(self, labels: Tensor, decoding: Decoding, prompt: Prompt | None = None) -> Tensor:
        """Labels (B,) as inputs of an evaluation, (2 B,) with guidance: with the class, then without. ValueError: see `draw`."""
        self.check(decoding, prompt)
        if prompt is not None and len(prompt.tokens) != len(labels):
            raise ValueError(f"{len(prompt.tokens)} prompts for {len(labels)} images: give one each")
        labels = self.given(labels)
        return torch.cat([labels, self.null_labels(labels)]) if decoding.copies == 2 else labels

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

    def start_from(self, vectors: list[Tensor]) -> None:
        """Start embeddings and logits as random linear images of vectors (size, C), one tensor for each digit."""
        self.embed.start_from(vectors)
        self.head.start_from(vectors)

    @abstractmethod
    def loss(self, batch: CodeBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, nats a token, and what to log: `bits` of an image."""

    @abstractmethod
    def draw(self, labels: Tensor, draws: Draws, decoding: Decoding, prompt: Prompt | None = None) -> Tensor:
        """Tokens int64 (B, L, D) for labels (B,), those of a prompt (B, L, D) among them.

        ValueError for a decoding or a prompt that this prior cannot have, or another class.
        """

    def check(self, decoding: Decoding, prompt: Prompt | None = None) -> None:
        super().check(decoding, prompt)
        if prompt is not None:
            self.layout.check_digits(prompt.tokens[:, prompt.known])


def draw_tokens(
    logits: Logits,
    hidden: Tensor,
    places: Tensor,
    sizes: tuple[int, ...],
    scale: float,
    draws: Values,
    how: Decoding,
    attempt: int = 0,
) -> tuple[Tensor, Tensor]:
    """The tokens int64 (B, n, D) at places (B, n), digit by digit, and log p (B, n) of what was drawn.

    hidden (B, n, W), or (2 B, n, W) with guidance: with the class, then without. p is the guided law before temperature, top-k
    and top-p, at whose limits all that is drawn would be equally probable.
    """
    tokens = places.new_zeros(*places.shape, len(sizes))
    total: Tensor | None = None
    for digit in range(len(sizes)):
        found = logits(hidden, torch.cat([tokens] * how.copies), digit)
        found = guided(found, scale) if how.copies == 2 else found
        value = draws.categorical(law_of(found, how), places, digit, attempt)
        tokens[..., digit] = value
        own = found.log_softmax(-1).gather(-1, value.unsqueeze(-1)).squeeze(-1)
        total = own if total is None else total + own
    assert total is not None
    return tokens, total
