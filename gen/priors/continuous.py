"""Continuous tokens: all missing latents of an image at once, each by a diffusion head, given those that are there.

    p(x_i | visible, class) = the law that the head's field samples, given the trunk's hidden vector of place i
    loss = E over k ~ U{1 .. L}, masks of size k, of the head's error, mean over masked tokens (token_head.py)

MAR (Li et al. 2024, arXiv 2406.11838): no codes, and an order of places at random or by Halton's points. Tokens that are decided
together are independent given those before: at S = L the law is that of the conditionals, with fewer evaluations what they have
in common beyond those is lost.

Two budgets: S evaluations of the trunk, and those of the head, `sampler.nfe` for each token whatever S is. Guidance doubles both:
the trunk is evaluated with the class and without it, and the head's two fields are mixed (samplers/guidance.py).

Temperature T: the noise of the sampler times sqrt(T). Where a token's law p is Gaussian it becomes p^(1/T), as that of codes
does; MAR's own temperature is sqrt(T).
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from midway.gen.diffusion.field import start_state
from midway.gen.diffusion.inputs import noise_angle
from midway.gen.diffusion.loss import loss_by_time
from midway.gen.priors.config import PriorConfig
from midway.gen.priors.decoding import Decoding, Prompt, begun, steps_of
from midway.gen.priors.draws import NormalDraws
from midway.gen.priors.layout import LatentLayout
from midway.gen.priors.masked import Bidirectional, fixed_orders, random_masks
from midway.gen.priors.token_head import TokenHead
from midway.gen.training.batches import Context, LatentBatch
from midway.samplers.prediction import Field
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import make_solver
from midway.tokenizers.losses import mean

HEAD_SOLVER, HEAD_NFE, HEAD_GRID = "dpmpp2m", 20, "karras"
"""The sampler of a head where none is given."""


class TokenLaws(Protocol):
    """Laws of missing tokens, given the others."""

    @property
    def layout(self) -> LatentLayout: ...

    @property
    def schedule(self) -> Schedule: ...

    def hidden(self, tokens: Tensor, known: Tensor) -> Tensor:
        """(B, L, *) of tokens (B, L, C), of which those with known (B, L) are read: one evaluation. (2 B, L, *) with guidance:
        with the class, then without."""
        ...

    def field(self, hidden: Tensor, scale: float) -> Field:
        """That of tokens (n, C) for hidden (n, 1 or 2, *), guided at this scale."""
        ...


class ContinuousPrior(Bidirectional):
    """See the top of the file. Its tokens are standardised latents (B, L, C)."""

    layout: LatentLayout  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: PriorConfig, layout: LatentLayout, *classes: Any, **names: Any) -> None:
        super().__init__(config, layout, *classes, **names)
        self.embed = nn.Linear(layout.channels, config.width)
        self.head = TokenHead(config.head, layout.channels, config.width)

    def loss(self, batch: LatentBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The head's error, a mean over masked tokens, and its sum and count by noise level, as of a latent model."""
        head, labels, tokens = self.head, self.kept_labels(batch.labels, context), self.layout.tokens(batch.latents)
        length, channels = tokens.shape[1:]
        count, order = random_masks(length, context)
        known = order.argsort(-1) >= count[:, None]
        places = self._repeated(order, count, context)[..., None]
        hidden = self.hidden(tokens, known, labels, context)
        hidden = hidden.gather(1, places.expand(-1, -1, hidden.shape[-1])).flatten(0, 1)
        x0 = tokens.gather(1, places.expand(-1, -1, channels)).flatten(0, 1)
        t = head.time_of(context.uniform("time", places.shape[1:2])).flatten()
        error = head.error(x0, hidden, t, context.normal("noise", (places.shape[1], channels)).flatten(0, 1))
        angle = noise_angle(head.schedule.alpha(t), head.schedule.sigma(t))
        return mean(error), {"loss_time": loss_by_time(error.detach(), angle)}

    def _repeated(self, order: Tensor, count: Tensor, context: Context) -> Tensor:
        """Masked places (B, repeats L) in turn from a random one on: each as often as any other, on average."""
        slots = torch.arange(self.config.head.repeats * self.layout.length, device=order.device)
        begun = (context.uniform("first") * count).floor()
        return order.gather(1, ((begun[:, None] + slots) % count[:, None]).long())

    def check(self, decoding: Decoding, prompt: Prompt | None = None) -> None:
        super().check(decoding, prompt)
        check_rule(decoding)
        steps_of(decoding, self.layout.length if prompt is None else prompt.left)

    @torch.no_grad()
    def draw(
        self,
        labels: Tensor,
        draws: NormalDraws,
        decoding: Decoding,
        sampler: Sampler | None = None,
        prompt: Prompt | None = None,
    ) -> Tensor:
        """Tokens (B, L, C) for labels (B,), those of a prompt (B, L, C) among them, others by `sampler`, or DPM-Solver++(2M).

        ValueError for a decoding or a prompt that this prior cannot have, or another class.
        """
        model = _Labelled(self, self.inputs(labels, decoding, prompt), decoding.copies)
        by = sampler or own_sampler(self.head.schedule)
        return decode_tokens(model, len(labels), draws, decoding, by, labels.device, prompt=prompt)


def own_sampler(schedule: Schedule) -> Sampler:
    """What tokens are drawn by where nothing else is given."""
    return make_solver(HEAD_SOLVER, schedule, HEAD_NFE, HEAD_GRID)


class _Labelled:
    """Laws for these labels, (B,) or (2 B,)."""

    def __init__(self, prior: ContinuousPrior, labels: Tensor, copies: int) -> None:
        self.prior, self.labels, self.copies = prior, labels, copies
        self.layout, self.schedule = prior.layout, prior.head.schedule

    def hidden(self, tokens: Tensor, known: Tensor) -> Tensor:
        return self.prior.hidden(torch.cat([tokens] * self.copies), torch.cat([known] * self.copies), self.labels)

    def field(self, hidden: Tensor, scale: float) -> Field:
        return self.prior.head.field(hidden if hidden.shape[1] == 2 else hidden.squeeze(1), scale)


def check_rule(how: Decoding) -> None:
    """ValueError for what only codes have."""
    if how.rule not in ("random", "halton"):
        raise ValueError(f"{how.rule} is a rule of codes, and these tokens are continuous: use random or halton")
    if how.top_k or how.top_p != 1:
        raise ValueError("top_k and top_p are for codes: continuous tokens have a temperature")


def decode_tokens(
    model: TokenLaws,
    batch: int,
    draws: NormalDraws,
    how: Decoding,
    sampler: Sampler,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    prompt: Prompt | None = None,
) -> Tensor:
    """Tokens (batch, L, C), in `how.steps` evaluations of `hidden`; those of a prompt (batch, L, C) are there from the start.

    ValueError as `check_rule`, for more steps than tokens, and as the sampler.
    """
    check_rule(how)
    layout, schedule, spread = model.layout, model.schedule, math.sqrt(how.temperature)
    length, channels = layout.length, layout.channels
    tokens, given = begun(torch.zeros(batch, length, channels, device=device, dtype=dtype), prompt)
    known, done = given.expand(batch, -1), int(given.sum())
    for places in fixed_orders(layout, batch, draws, how, given):
        count = places.shape[1]
        noise = _TokenNoise(draws, places, channels, spread)
        hidden = torch.stack(model.hidden(tokens, known).split(batch), dim=2)  # (B, L, 1 or 2, *)
        index = places.view(batch, count, *[1] * (hidden.dim() - 2)).expand(-1, -1, *hidden.shape[2:])
        field = model.field(hidden.gather(1, index).flatten(0, 1), how.scale(done / length))
        new = sampler.run(field, start_state(schedule, sampler.grid[0], noise(tokens)), noise)
        index = places[..., None].expand(-1, -1, channels)
        tokens, known = tokens.scatter(1, index, new.view(batch, count, channels)), known.scatter(1, places, True)
        done += count
    return tokens


class _TokenNoise:
    """A NoiseSource of the tokens (B n, C) at places (B, n): the k-th call gives draw k of every token, times `spread`."""

    def __init__(self, draws: NormalDraws, places: Tensor, channels: int, spread: float) -> None:
        self.draws, self.places, self.channels, self.spread, self.draw = draws, places, channels, spread, -1

    def __call__(self, x: Tensor) -> Tensor:
        self.draw += 1
        return self.spread * self.draws.normal(self.draw, self.places, self.channels).flatten(0, 1).to(x)
