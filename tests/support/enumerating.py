"""Laws of codes that are known, as priors with exact conditionals, and every way in which a decoder may draw."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.priors.blocks import Cache
from midway.gen.priors.causal import CausalPrior
from midway.gen.priors.config import PriorConfig
from midway.gen.priors.digits import DigitHead
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.masked import MaskedPrior


def every_code(layout: CodeLayout) -> Tensor:
    """int64 (number of codes, L, D), the first token changing slowest, and of a token the last digit."""
    token = [values[::-1] for values in itertools.product(*map(range, reversed(layout.sizes)))]
    return torch.tensor(list(itertools.product(token, repeat=layout.length)))


def random_joint(layout: CodeLayout, seed: int = 0) -> Tensor:
    """Probabilities float64 of `every_code`, all different, most of them small."""
    drawn = torch.randn(len(every_code(layout)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1.5 * drawn).softmax(0)


class Table:
    """The conditionals of a law: `Conditionals` of the decoder of masked priors."""

    def __init__(self, layout: CodeLayout, joint: Tensor) -> None:
        self.layout, self.joint, self.codes = layout, joint, every_code(layout)
        self.values = every_code(CodeLayout(((1, 1),), layout.radices))[:, 0]
        """int64 (K, D): the digits of each token."""
        same = (self.codes[:, :, None] == self.values).all(-1)
        self.one_hot = same.to(joint)
        """(number of codes, L, K)."""

    def hidden(self, tokens: Tensor, known: Tensor) -> Tensor:
        """log p (B, L, K) of every token, given those of tokens (B, L, D) with known (B, L)."""
        fits = ((tokens[:, None] == self.codes).all(-1) | ~known[:, None]).all(-1)
        found = torch.einsum("bc,clk->blk", fits.to(self.joint) * self.joint, self.one_hot)
        return found.log() - found.sum(-1, keepdim=True).log()

    def logits(self, hidden: Tensor, tokens: Tensor, digit: int) -> Tensor:
        """(B, n, sizes[digit]) of this digit, given the ones before it."""
        fits = (tokens[..., None, :digit] == self.values[:, :digit]).all(-1)
        law = torch.where(fits, hidden, -math.inf)
        size = self.layout.sizes[digit]
        return torch.stack([law[..., self.values[:, digit] == value].logsumexp(-1) for value in range(size)], -1)


class _TableHead(DigitHead):
    """The head of a table, with the production code around its logits."""

    def __init__(self, table: Table) -> None:
        super().__init__(4, table.layout.sizes)
        self.table = table

    def logits(self, hidden: Tensor, tokens: Tensor, digit: int) -> Tensor:
        return self.table.logits(hidden, tokens, digit)


class TableMasked(MaskedPrior):
    """A masked prior with exact conditionals."""

    def __init__(self, table: Table) -> None:
        super().__init__(PriorConfig("masked", width=16), table.layout, 0)
        self.table, self.head = table, _TableHead(table)

    def hidden(self, tokens: Tensor, known: Tensor, labels: Tensor, context: Any = None) -> Tensor:
        return self.table.hidden(tokens, known)


class _TableEmbedding(nn.Module):
    def __init__(self, table: Table, width: int) -> None:
        super().__init__()
        self.table, self.width = table, width

    def forward(self, tokens: Tensor) -> Tensor:
        value = (tokens[..., None, :] == self.table.values).all(-1).long().argmax(-1)
        return F.one_hot(value, self.width).double()


class _TableTrunk(nn.Module):
    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, places: Tensor, context: Any = None) -> Tensor:
        layout = self.table.layout
        before = self.table.values[x[:, 1:].argmax(-1)]
        tokens = torch.zeros(len(x), layout.length, len(layout.sizes), dtype=torch.int64)
        tokens[:, : before.shape[1]] = before
        index = torch.arange(layout.length)
        laws = [self.table.hidden(tokens, (index < n).expand(len(x), -1))[:, n] for n in range(x.shape[1])]
        return torch.stack(laws, dim=1)

    def step(self, x: Tensor, places: Tensor, cache: Cache) -> Tensor:
        self.seen = [*(self.seen if cache.length else []), x]
        cache.length += x.shape[1]
        return self(torch.cat(self.seen, dim=1), places)[:, -x.shape[1] :]


class TableCausal(CausalPrior):
    """A causal prior with exact conditionals, row by row."""

    def __init__(self, table: Table) -> None:
        super().__init__(PriorConfig("causal", width=16), table.layout, 0)
        nn.init.zeros_(self.label.weight)
        nn.init.zeros_(self.position.weight)
        self.embed = _TableEmbedding(table, 16)  # pyright: ignore[reportAttributeAccessIssue]
        self.trunk, self.head = _TableTrunk(table), _TableHead(table)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class Script:
    """Draws that are given: in row r `outcomes` int64 (R, attempts, L, D) of digits of these sizes, in order `orders` (R, L).

    `log_weight` float64 (R,) adds up how probable they were, those that were not asked for being equally probable.
    """

    outcomes: Tensor
    sizes: tuple[int, ...]
    orders: Tensor | None = None
    log_weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.log_weight = -torch.tensor(self.sizes).double().log().sum() * self.outcomes[0, :, :, 0].numel()
        self.log_weight = self.log_weight.repeat(len(self.outcomes))

    def categorical(self, law: Tensor, places: Tensor, digit: int, attempt: int = 0) -> Tensor:
        value = self.outcomes[:, attempt, :, digit].gather(1, places)
        own = law.double().gather(-1, value[..., None]).squeeze(-1)
        self.log_weight += (own + math.log(law.shape[-1])).sum(1)
        return value

    def keys(self, purpose: str, length: int) -> Tensor:
        """By which the rows come into their orders, for every purpose; without orders 1/2."""
        if self.orders is None:
            return torch.full((len(self.outcomes), length), 0.5, dtype=torch.float64)
        return (
            (self.orders.argsort(-1).double() + 0.5) / length
            if length > 1
            else torch.full((len(self.outcomes), 1), 0.25)
        )


def scripts(layout: CodeLayout, attempts: int = 1, shuffled: bool = False) -> Script:
    """Every outcome of a decoder that draws each token in each of these attempts; also in every order, if `shuffled`."""
    codes = every_code(layout)
    index = torch.cartesian_prod(*[torch.arange(len(codes))] * attempts).view(-1, attempts)
    outcomes = codes[index]
    if not shuffled:
        return Script(outcomes, layout.sizes)
    orders = torch.tensor(list(itertools.permutations(range(layout.length))))
    return Script(outcomes.repeat_interleave(len(orders), 0), layout.sizes, orders.repeat(len(outcomes), 1))


def law_drawn(layout: CodeLayout, tokens: Tensor, script: Script) -> Tensor:
    """Probabilities float64 of `every_code` from what every row of a script has drawn; orders are equally probable."""
    orders = 1 if script.orders is None else math.factorial(layout.length)
    same = (tokens[:, None] == every_code(layout)).all(-1).all(-1)
    return (same * (script.log_weight.exp() / orders)[:, None]).sum(0)


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p, q) in bits."""
    return float((p * (p / q).log2()).sum())


def entropy(p: Tensor) -> float:
    """In bits."""
    return float(-(p * p.log2()).sum())
