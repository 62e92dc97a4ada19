"""How codes are drawn from a prior: settings, and the pure functions between logits and a token."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from midway.gen.core.ranges import STEPS, check_ranges

Rule = Literal["causal", "random", "halton", "certain", "maskgit"]
"""In which order tokens are decided: row by row; of masked priors at random, by Halton's points, the most certain ones first,
or those whose drawn tokens are most probable."""
Decay = Literal["cosine", "arccos", "linear"]
RULES: tuple[str, ...] = get_args(Rule)
DECAYS: tuple[str, ...] = get_args(Decay)


@dataclass(frozen=True)
class Decoding:
    """One way to draw. ValueError for numbers that draw nothing.

    Defaults draw from the law of the model, but for MaskGIT's rule, which has another. `choice_noise` 4.5 is that of MaskGIT's
    code (Chang et al. 2022, arXiv 2202.04200) and of most after it; at 0 only the most probable tokens stay: images are alike.
    """

    rule: Rule = "causal"
    steps: int | None = None
    """Evaluations S of a masked prior; None: one a token."""
    decay: Decay = "cosine"
    """The share of tokens that are missing after step s of S: cos(pi s / 2 S) as of MaskGIT, 2 / pi arccos(s / S) as of Halton's
    points (arXiv 2503.17076), or 1 - s / S."""
    temperature: float = 1.0
    """Logits are divided by it; 0: the most probable token always."""
    top_k: int = 0
    """Only this many most probable values of each digit; 0: all."""
    top_p: float = 1.0
    """Only the most probable values that have this probability together."""
    guidance: float = 1.0
    """Scale w of classifier-free guidance: l = l_none + w (l_class - l_none)."""
    ramp: float = 0.0
    """w grows from 1 as the share of tokens that are there to this power; 0: it is the same everywhere."""
    choice_noise: float = 4.5
    """maskgit: Gumbel noise on the log-probabilities by which tokens are kept, of this size at first, falling to 0 linearly."""

    def __post_init__(self) -> None:
        for name, value, choices in (("rule", self.rule, RULES), ("decay", self.decay, DECAYS)):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        check_ranges(self, steps=STEPS, temperature=(0, 100), top_k=(0, 2**20), top_p=(1e-9, 1))
        check_ranges(self, guidance=(-1000, 1000), ramp=(0, 100), choice_noise=(0, 1000))

    @property
    def copies(self) -> int:
        """Evaluations of the network each: 2 with guidance, with the class and without."""
        return 2 if self.guidance != 1 else 1

    def scale(self, share: float) -> float:
        """w where this share of the tokens is there already."""
        return 1 + (self.guidance - 1) * (share**self.ramp if self.ramp else 1.0)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens that are given, the same places of every image: a prior draws the others. ValueError for none of them, or all.

    tokens (N, L, *) as the prior has them, of which those with known, bool (L,), are read.
    """

    tokens: Tensor
    known: Tensor

    def __post_init__(self) -> None:
        length = self.tokens.shape[1] if self.tokens.dim() == 3 else None
        if self.known.dtype != torch.bool or self.known.shape != (length,) or not len(self.tokens):
            shapes = f"tokens {tuple(self.tokens.shape)} and known {self.known.dtype} {tuple(self.known.shape)}"
            raise ValueError(f"a prompt of {shapes}: give (N, L, *) of 1 or more images, and bool (L,)")
        if not 1 <= self.count < len(self.known):
            raise ValueError(
                f"a prompt of {self.count} tokens of {length}: give at least 1, and leave at least 1 to draw"
            )

    @classmethod
    def first(cls, tokens: Tensor, count: int) -> Self:
        """The first `count` of tokens (N, L, *)."""
        return cls(tokens, torch.arange(tokens.shape[1], device=tokens.device) < count)

    @property
    def count(self) -> int:
        """How many tokens of an image are given."""
        return int(self.known.sum())

    @property
    def left(self) -> int:
        """How many are drawn."""
        return len(self.known) - self.count

    def of(self, seeds: Tensor) -> Self:
        """Image s mod N for each seed s of (B,)."""
        return replace(self, tokens=self.tokens[seeds.to(self.tokens.device) % len(self.tokens)])


def begun(empty: Tensor, prompt: Prompt | None) -> tuple[Tensor, Tensor]:
    """Tokens (B, L, *) like `empty` with those of a prompt (B, L, *) among them, and which are there, bool (L,)."""
    if prompt is None:
        return empty, torch.zeros(empty.shape[1], dtype=torch.bool, device=empty.device)
    known = prompt.known.to(empty.device)
    return torch.where(known[:, None], prompt.tokens.to(empty), empty), known


def guided(logits: Tensor, scale: float) -> Tensor:
    """Logits (2 B, *), with the class and then without it -> (B, *) guided."""
    labelled, unlabelled = logits.chunk(2)
    return torch.lerp(unlabelled, labelled, scale)


def law_of(logits: Tensor, decoding: Decoding) -> Tensor:
    """Logits (*, K) -> log-probabilities (*, K) under temperature, then top-k, then top-p; -inf is never drawn.

    At temperature 0 the first of equal logits. top-p keeps the most probable value, and then others until it is reached.
    """
    if decoding.temperature == 0:
        best = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.argmax(-1, keepdim=True), True)
        return torch.where(best, 0.0, -math.inf)
    below = logits - logits.amax(-1, keepdim=True)  # so that no temperature overflows
    law = (below / max(decoding.temperature, 1e-30)).log_softmax(-1)
    if 0 < decoding.top_k < law.shape[-1]:
        kept = torch.zeros_like(law, dtype=torch.bool).scatter_(-1, law.topk(decoding.top_k).indices, True)
        law = law.masked_fill(~kept, -math.inf).log_softmax(-1)
    if decoding.top_p < 1:
        values, order = law.sort(dim=-1, descending=True, stable=True)
        before = values.exp().cumsum(-1) - values.exp()  # the value that crosses the threshold is still in
        dropped = torch.zeros_like(law, dtype=torch.bool).scatter_(-1, order, before >= decoding.top_p)
        law = law.masked_fill(dropped, -math.inf).log_softmax(-1)
    return law


def counts(decay: Decay, length: int, steps: int) -> list[int]:
    """How many of `length` tokens each of S steps decides, at least one each: missing after step s are floor(L decay(s / S)).

    Chang et al. 2022, arXiv 2202.04200, section 3.3. ValueError for more steps than tokens.
    """
    if not 1 <= steps <= length:
        raise ValueError(f"{steps} evaluations for {length} tokens: each decides at least one, so give 1 to {length}")
    shares = {
        "cosine": lambda u: math.cos(math.pi * u / 2),
        "arccos": lambda u: 2 / math.pi * math.acos(u),
        "linear": lambda u: 1 - u,
    }[decay]
    missing, found = length, []
    for s in range(1, steps + 1):
        left = min(max(math.floor(length * shares(s / steps) + 1e-9), steps - s), missing - 1)
        found.append(missing - left)
        missing = left
    return found


def steps_of(how: Decoding, length: int) -> list[int]:
    """How many tokens each evaluation of a masked prior decides."""
    return counts(how.decay, length, length if how.steps is None else how.steps)


@cache
def halton_order(rows: int, columns: int) -> tuple[int, ...]:
    """Places of a grid, row by row from 0, in the order in which 2-D Halton points (bases 2 and 3) first visit them.

    Besnier et al. 2025, arXiv 2503.17076; from the first point on, (1/2, 1/3).
    """
    seen: dict[int, None] = {}
    n = 0
    while len(seen) < rows * columns:
        n += 1
        seen.setdefault(_cell(n, 2, rows) * columns + _cell(n, 3, columns))
    return tuple(seen)


def _cell(n: int, base: int, cells: int) -> int:
    """Of `cells` equal ones in [0, 1) that with the digits of n mirrored at the point, in integers: many are on an edge."""
    mirrored, unit = 0, 1
    while n:
        n, digit = divmod(n, base)
        mirrored, unit = mirrored * base + digit, unit * base
    return mirrored * cells // unit
