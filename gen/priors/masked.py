"""All missing tokens at once, given those that are there: p(c_i | visible, class) for every i.

    loss = E over k ~ U{1 .. L}, masks of size k:  (1 / k) sum over masked i of -log p(c_i | visible)
    L loss >= -log p(c)  on average, with equality where the conditionals are those of one law

It is the mean over all orders of the chain rule (Uria et al. 2014, arXiv 1310.1757; Shih et al. 2022, arXiv 2205.13554), so
bits stand beside those of a causal prior.

Decoding takes any number of evaluations S: each decides some tokens, given all those before.

    random, halton    places in a fixed order, then a draw. At S = L the law is that of the model, whatever the order
    certain           the places whose most probable token is most probable, then a draw
    maskgit           a draw at every place, of which the most probable stay (Chang et al. 2022, arXiv 2202.04200). Its law is
                      biased at every S: probable tokens are drawn more often than they should be (arXiv 2510.04525)
"""

import math
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from midway.gen.priors.decoding import Decoding, Prompt, begun, halton_order, steps_of
from midway.gen.priors.draws import Draws, NormalDraws, Values
from midway.gen.priors.layout import CodeLayout, LatentLayout
from midway.gen.priors.prior import CodePrior, Prior, draw_tokens
from midway.gen.training.batches import CodeBatch, Context


class Conditionals(Protocol):
    """Laws of missing tokens, given the others."""

    @property
    def layout(self) -> CodeLayout: ...

    def hidden(self, tokens: Tensor, known: Tensor) -> Tensor:
        """(B, L, W) of tokens (B, L, D), of which those with known (B, L) are read: one evaluation. (2 B, L, W) with guidance."""
        ...

    def logits(self, hidden: Tensor, tokens: Tensor, digit: int) -> Tensor:
        """See `DigitHead.logits`."""
        ...


class Bidirectional(Prior):
    """A prior whose trunk sees the tokens that are there, and one vector in place of each that is missing."""

    embed: nn.Module
    """Tokens (B, L, *) -> (B, L, W)."""

    def __init__(self, *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self.missing = nn.Parameter(torch.randn(self.config.width) * 0.02)

    def hidden(self, tokens: Tensor, known: Tensor, labels: Tensor, context: Context | None = None) -> Tensor:
        """(B, L, W) for tokens (B, L, *), of which those with known, bool (B, L), are read, and labels (B,)."""
        vectors = torch.where(known[..., None], self.embed(tokens), self.missing) + self.position.weight
        x = torch.cat([self.label(labels)[:, None], vectors], dim=1)
        return self.trunk(x, self.places, context)[:, 1:]


def random_masks(length: int, context: Context) -> tuple[Tensor, Tensor]:
    """What a training step masks: how many k, float64 (B,) uniform on 1 .. L, and places int64 (B, L), the first k of them."""
    count = (context.uniform("count") * length).floor() + 1
    return count, context.uniform("mask", (length,)).argsort(-1)


class MaskedPrior(Bidirectional, CodePrior):
    """See the top of the file."""

    def loss(self, batch: CodeBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        length, labels = self.layout.length, self.kept_labels(batch.labels, context)
        count, order = random_masks(length, context)
        missing = order.argsort(-1) < count[:, None]
        found = self.head.log_probs(self.hidden(batch.tokens, ~missing, labels, context), batch.tokens).sum(-1)
        nats = -(found * missing).sum(1) / count.to(found)
        return nats.mean(), {"bits": nats.detach().mean() * length / math.log(2)}

    @torch.no_grad()
    def bits(self, tokens: Tensor, labels: Tensor, draws: Draws, evaluations: int) -> Tensor:
        """An upper bound of the bits per image, float64 (B,), up to the chance of `evaluations` masks.

        The numbers of masked tokens are spread evenly over 1 .. L; at multiples of L each occurs equally often.
        """
        labels, length = self.given(labels), self.layout.length
        total = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        start = (draws.keys("count", 1) * length).to(tokens.device)
        for e in range(evaluations):
            count = ((start + (e * length) / evaluations) % length).floor() + 1
            rank = draws.keys(f"mask {e}", length).to(tokens.device).argsort(-1).argsort(-1)
            missing = rank < count
            found = self.head.log_probs(self.hidden(tokens, ~missing, labels), tokens).sum(-1).double()
            total -= (found * missing).sum(1) * length / count.squeeze(1)
        return total / evaluations / math.log(2)

    def check(self, decoding: Decoding, prompt: Prompt | None = None) -> None:
        super().check(decoding, prompt)
        if decoding.rule == "causal":
            raise ValueError(
                "causal is the rule of causal priors, and this one is masked: use random, halton, certain or maskgit"
            )
        left = self.layout.length if prompt is None else prompt.left
        steps = len(steps_of(decoding, left))
        if decoding.temperature == 0 and steps < left:
            warnings.warn(
                f"at temperature 0 the tokens of one evaluation ({left} in {steps}) are each the most probable, "
                "whatever the others are: images are alike and flat; use temperature 1",
                stacklevel=2,
            )

    @torch.no_grad()
    def draw(self, labels: Tensor, draws: Draws, decoding: Decoding, prompt: Prompt | None = None) -> Tensor:
        model = _Labelled(self, self.inputs(labels, decoding, prompt), decoding.copies)
        return decode(model, len(labels), draws, decoding, labels.device, prompt)


class _Labelled:
    """Conditionals of these labels, (B,) or (2 B,)."""

    def __init__(self, prior: MaskedPrior, labels: Tensor, copies: int) -> None:
        self.prior, self.labels, self.copies, self.layout = prior, labels, copies, prior.layout
        self.logits = prior.head.logits

    def hidden(self, tokens: Tensor, known: Tensor) -> Tensor:
        return self.prior.hidden(torch.cat([tokens] * self.copies), torch.cat([known] * self.copies), self.labels)


def decode(
    model: Conditionals,
    batch: int,
    draws: Draws,
    how: Decoding,
    device: torch.device | None = None,
    prompt: Prompt | None = None,
) -> Tensor:
    """Tokens int64 (batch, L, D), in `how.steps` evaluations, by a rule of masked priors.

    Those of a prompt (batch, L, D) are there from the start. ValueError for more steps than tokens to draw.
    """
    layout = model.layout
    tokens = torch.zeros(batch, layout.length, layout.width, dtype=torch.int64, device=device)
    tokens, given = begun(tokens, prompt)
    length, done, known = layout.length, int(given.sum()), given.expand(batch, -1)
    steps, orders = steps_of(how, length - done), fixed_orders(layout, batch, draws, how, given)
    for step, count in enumerate(steps):
        drawn = partial(_drawn, model, model.hidden(tokens, known), how, how.scale(done / length))
        left = known.int().argsort(dim=1, stable=True)[:, : length - done]  # places that are missing, in order
        if how.rule == "maskgit":
            values, confidence = drawn(left, draws, step)
            gumbel = -(-draws.keys(f"confidence {step}", length).log()).log().to(left.device).gather(1, left)
            noise = how.choice_noise * (1 - (step + 1) / len(steps))
            best = (confidence + noise * gumbel.to(confidence)).topk(count).indices
            places, new = left.gather(1, best), values.gather(1, best[..., None].expand(-1, -1, tokens.shape[2]))
        elif how.rule == "certain":
            places = left.gather(1, drawn(left, _Most())[1].topk(count).indices)
            new, _ = drawn(places, draws)
        else:
            places = next(orders)
            new, _ = drawn(places, draws)
        tokens = tokens.scatter(1, places[..., None].expand_as(new), new)
        known = known.scatter(1, places, True)
        done += count
    return tokens


def _drawn(
    model: Conditionals, hidden: Tensor, how: Decoding, scale: float, places: Tensor, draws: Values, attempt: int = 0
) -> tuple[Tensor, Tensor]:
    """Tokens (B, n, D) at places (B, n) of an evaluation (B, L, W) or (2 B, L, W), and their log-probabilities (B, n)."""
    index = torch.cat([places] * how.copies)[..., None].expand(-1, -1, hidden.shape[-1])
    return draw_tokens(model.logits, hidden.gather(1, index), places, model.layout.sizes, scale, draws, how, attempt)


class _Most:
    """The most probable value of every digit."""

    def categorical(self, law: Tensor, places: Tensor, digit: int, attempt: int = 0) -> Tensor:
        return law.argmax(-1)


def fixed_orders(
    layout: CodeLayout | LatentLayout,
    batch: int,
    draws: Draws | NormalDraws,
    how: Decoding,
    given: Tensor,
) -> Iterator[Tensor]:
    """Places (B, n) of each step in turn, without those that are given, bool (L,), of a rule whose order is fixed."""
    if how.rule == "random":
        order = draws.keys("order", layout.length).argsort(-1).to(given.device)
    elif how.rule == "halton":
        starts, places = 0, []
        for rows, columns in layout.grids:
            places += [starts + place for place in halton_order(rows, columns)]
            starts += rows * columns
        order = torch.tensor(places, device=given.device).expand(batch, -1)
    else:
        return
    left = layout.length - int(given.sum())
    yield from order[~given[order]].view(batch, left).split(steps_of(how, left), dim=1)
