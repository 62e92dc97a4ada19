"""The law of one token of C continuous channels, given the trunk's hidden vector h: a small diffusion model.

    F(x_t / s, angle, h)  ~  (a x0 + b eps) / sqrt(a^2 + b^2),      as of a latent model (gen/diffusion/model.py)

MAR (Li et al. 2024, arXiv 2406.11838, section 3.2): residual blocks whose layers are modulated by time and h. What solvers see of
it is a `Field` whose states are tokens (n, C), so every solver samples it, and tables are learned for it as for a latent model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.diffusion.inputs import noise_angle
from midway.gen.diffusion.loss import noised
from midway.gen.networks.layers import number_embedding, sinusoid
from midway.gen.objectives.times import logit_normal, time_at
from midway.gen.priors.config import TokenHeadConfig
from midway.samplers.guidance import ConditionalField, Together, classifier_free, conditional
from midway.samplers.prediction import (
    Evaluations,
    Field,
    Prediction,
    TimedField,
    expand,
    on_device,
    solve,
    target_coefficients,
    x0_coefficients,
)
from midway.samplers.schedule import Schedule
from midway.tokenizers.precision import widened

TIME_SCALE = 1000.0
"""Of the noise angle in its sinusoids, as in DiT."""


class TokenHead(nn.Module):
    """(x (n, C), condition (n, width)) -> F (n, C); the condition is that of a time and a hidden vector. Its first output is 0.

    A `SampledModel` (gen/distillation/learning.py) whose labels are hidden vectors, with guidance pairs of them.
    """

    feature_dim, shift = 0, 1.0

    def __init__(self, config: TokenHeadConfig, channels: int, hidden: int) -> None:
        super().__init__()
        self.config, self.latent_shape, self.schedule = config, (channels,), config.make_schedule()
        self.embed, self.condition = nn.Linear(channels, config.width), nn.Linear(hidden, config.width)
        self.time = number_embedding(config.width)
        self.blocks = nn.ModuleList(_Block(config.width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, weight in self.named_parameters():
            if name.endswith(("modulation.weight", "out.weight")):
                nn.init.zeros_(weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.embed(x.to(self.embed.weight.dtype))
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        return self.out(self.norm(h) * (1 + scale) + shift)

    def times(self, angle: Tensor) -> Tensor:
        """Noise angles (E,) -> (E, width), their part of the condition."""
        return self.time(sinusoid(TIME_SCALE * widened(angle), 256).to(self.embed.weight.dtype))

    def at_times(self, x: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """Unit-variance output F (n, C) for x_t (n, C), t (n,) and hidden (n, W)."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        condition = F.silu(self.times(noise_angle(alpha, sigma)) + self.condition(hidden))
        return self(x / expand(torch.hypot(alpha, sigma), x), condition)

    def error(self, x0: Tensor, hidden: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """(n,): mean squared error of the unit-variance target, for tokens and noise (n, C), hidden (n, W) and t (n,)."""
        x_t, target = noised(self.schedule, self.config.target, t, x0, eps)
        return (widened(self.at_times(x_t, t, hidden)) - target).square().mean(1)

    def time_of(self, u: Tensor) -> Tensor:
        """The time to train at for float64 u on (0, 1), float32, of the same shape."""
        return time_at(self.schedule, logit_normal(u, self.config.time_mean, self.config.time_std)).float()

    def output_scale(self, t: Tensor) -> Tensor:
        """target / F, shaped like t."""
        a, b = target_coefficients(self.config.target, t, self.schedule)
        return torch.hypot(a, b)

    def conditional_field(self, x: Tensor, t: Tensor, labels: Tensor) -> Prediction:
        """One forward pass: the prediction for x_t (n, C) at t (n,) for hidden vectors `labels` (n, W)."""
        value = self.at_times(x, t, labels).to(x.dtype) * expand(self.output_scale(t), x)
        return solve(value, self.config.target, x, t, self.schedule)

    def field(self, labels: Tensor, guidance: float = 1.0, network: ConditionalField | None = None) -> Field:
        """The field of hidden vectors `labels`: (n, W), or for guidance (n, 2, W), those with the class and without.

        `network` replaces `conditional_field`, to count evaluations there.
        """
        hidden, null = (labels, labels) if labels.dim() == 2 else labels.unbind(1)
        if guidance == 1:
            return TokenField(self, hidden) if network is None else conditional(network, hidden)
        if network is not None:
            return classifier_free(network, hidden, null, guidance)
        return Together(guidance, partial(TokenField, self), hidden, null)


class _Block(nn.Module):
    """x (n, W) -> x + gate * mlp(modulate(norm(x))), all modulated by condition (n, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


@dataclass(frozen=True, eq=False)
class TokenField(TimedField):
    """The field of a head for hidden (n, W)."""

    head: TokenHead
    hidden: Tensor

    @property
    def schedule(self) -> Schedule:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.head.schedule

    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction:
        return self.head.conditional_field(x, t, self.hidden)

    def copies(self, count: int) -> Field:
        return replace(self, hidden=self.hidden.repeat(count, 1))

    def at(self, times: tuple[float, ...], x: Tensor) -> Evaluations:
        """In terms of F, the head's output of unit variance."""
        head, t = self.head, torch.tensor(times, dtype=torch.float64)
        alpha, sigma = head.schedule.alpha(t), head.schedule.sigma(t)
        pairs = x0_coefficients(head.config.target, head.schedule, times)
        scales = zip(pairs, head.output_scale(t).tolist(), strict=True)
        dtype = torch.promote_types(head.embed.weight.dtype, torch.float32)
        embedded = head.times(on_device(tuple(noise_angle(alpha, sigma).tolist()), dtype, x.device))
        condition, norms = head.condition(self.hidden), torch.hypot(alpha, sigma).tolist()
        values = [_evaluation(head, norm, one, condition) for norm, one in zip(norms, embedded, strict=True)]
        return Evaluations(tuple((p, q * scale) for (p, q), scale in scales), values)


def _evaluation(head: TokenHead, scale: float, time: Tensor, condition: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: head(x / scale, F.silu(time + condition))
