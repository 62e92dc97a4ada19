"""One token after the other: p(c) = prod_i p(c_i | c_1 .. c_{i-1}, class), with exact bits per image.

In a random order (RAR, Yu et al. 2024, arXiv 2411.00776) each input also has the position of the token that it predicts. Such
orders are used at the beginning of a training; samples and bits are of the order row by row.
"""

import math

import torch
from torch import Tensor

from midway.gen.priors.blocks import Cache
from midway.gen.priors.decoding import Decoding, Prompt
from midway.gen.priors.draws import Draws
from midway.gen.priors.prior import CodePrior, draw_tokens
from midway.gen.training.batches import CodeBatch, Context


class CausalPrior(CodePrior):
    """See the top of the file."""

    def loss(self, batch: CodeBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        labels = self.kept_labels(batch.labels, context)
        found = self.log_probs(batch.tokens, labels, self._orders(context), context)
        nats = -found.sum((1, 2))
        return nats.mean() / self.layout.length, {"bits": nats.detach().mean() / math.log(2)}

    def _orders(self, context: Context) -> Tensor | None:
        """int64 (B, L): the order of each sample in this step."""
        if context.step >= self.config.shuffle_steps:
            return None
        share = min(2 * (1 - context.step / self.config.shuffle_steps), 1)
        orders = context.uniform("order", (self.layout.length,)).argsort(-1)
        shuffled = context.uniform("shuffled") < share
        return torch.where(shuffled[:, None], orders, torch.arange(self.layout.length, device=orders.device))

    def log_probs(
        self, tokens: Tensor, labels: Tensor, orders: Tensor | None = None, context: Context | None = None
    ) -> Tensor:
        """log p (B, L, D) in nats of every digit of tokens (B, L, D), in the sequence's order, each given what is before it.

        orders int64 (B, L): position i of order comes i-th; None: row by row.
        """
        length = self.layout.length
        index = torch.arange(length, device=tokens.device).expand(len(tokens), -1) if orders is None else orders
        sorted_tokens = tokens.gather(1, index[..., None].expand_as(tokens))
        x = torch.cat([self.label(labels)[:, None], self.embed(sorted_tokens[:, :-1])], dim=1) + self.position(index)
        places = self.places[:-1]  # of the token before
        if orders is not None:
            places = torch.cat([places[:1].expand(len(tokens), 1, 2), self.places[1 + orders[:, :-1]]], dim=1)
        found = self.head.log_probs(self.trunk(x, places, context), sorted_tokens)
        return torch.zeros_like(found).scatter(1, index[..., None].expand_as(found), found)

    @torch.no_grad()
    def bits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Exact bits per image, float64 (B,)."""
        return -self.log_probs(tokens, self.given(labels)).double().sum((1, 2)) / math.log(2)

    def check(self, decoding: Decoding, prompt: Prompt | None = None) -> None:
        super().check(decoding, prompt)
        left = self.layout.length if prompt is None else prompt.left
        if decoding.rule != "causal":
            raise ValueError(f"{decoding.rule} is a rule of masked priors, and this one is causal: use the rule causal")
        if decoding.steps not in (None, left):
            raise ValueError(
                f"a causal prior takes one evaluation a token, {left} and not {decoding.steps}: drop the number, "
                "or train a masked prior"
            )
        if prompt is not None and not bool(prompt.known[: prompt.count].all()):
            raise ValueError(
                "a causal prior completes the first tokens of its sequence: use Prompt.first, or a masked prior"
            )

    @torch.no_grad()
    def draw(self, labels: Tensor, draws: Draws, decoding: Decoding, prompt: Prompt | None = None) -> Tensor:
        inputs, length = self.inputs(labels, decoding, prompt), self.layout.length
        cache, x, tokens = Cache(self.config.depth, length), self.label(inputs)[:, None], list[Tensor]()
        if prompt is not None:  # its tokens go through the trunk at once, with the class
            tokens = [prompt.tokens[:, : prompt.count].to(labels)]
            x = torch.cat([x, self.embed(torch.cat(tokens * decoding.copies))], dim=1)
        for i in range(x.shape[1] - 1, length):
            own = slice(i + 1 - x.shape[1], i + 1)
            hidden = self.trunk.step(x + self.position.weight[own], self.places[own], cache)[:, -1:]
            here = torch.full((len(labels), 1), i, device=labels.device)
            scale = decoding.scale(i / length)
            token, _ = draw_tokens(self.head.logits, hidden, here, self.layout.sizes, scale, draws, decoding)
            tokens.append(token)
            x = self.embed(torch.cat([token] * decoding.copies))
        return torch.cat(tokens, dim=1)
