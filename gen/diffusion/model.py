"""A diffusion or flow model on standardised latents, for every schedule and every target.

With s = sqrt(alpha^2 + sigma^2) and a target `a x0 + b eps` (prediction.py) the input and the output of the network F have unit
variance:

    F(x_t / s, angle, label)  ~  (a x0 + b eps) / sqrt(a^2 + b^2),      angle = 2/pi atan2(sigma, alpha) in [0, 1]
    loss = mean square of the difference

On `EDM` with target `v` this is EDM's preconditioning and loss weight for unit-variance data (Karras et al. 2022, arXiv
2206.00364, Table 1); on `Linear` with `velocity` it is half the rectified-flow loss; on `Cosine` with `v` or `eps` the usual
ones. The angle of the noise level means the same on all schedules.

Time is drawn so that log rho = log(sigma / alpha) is normal (`logit_normal`: on `Linear` exactly SD3's t = sigmoid(N(m, s^2)),
arXiv 2403.03206; on `EDM` with m = s = -1.2, 1.2 EDM's own) or so that t is uniform on the sampling range.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from midway.gen.core.files import state_hash
from midway.gen.diffusion.description import DescribedModel, LatentModelConfig
from midway.gen.diffusion.dit import DiT
from midway.gen.training.batches import Context, LatentBatch
from midway.samplers.grids import RHO_MAX, RHO_MIN
from midway.samplers.guidance import ConditionalField, Together, autoguidance, classifier_free, interval
from midway.samplers.guidance_checks import TrainedOn, check_guide, check_interval, check_labels, check_scale
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
from midway.tokenizers.losses import mean
from midway.tokenizers.precision import widened

TIME_BUCKETS = 8
EVERYWHERE = (0.0, math.inf)


@dataclass(frozen=True)
class Guidance:
    """Guidance of a latent model (samplers/guidance.py).

    ValueError for a scale that is not finite, for an interval without a noise level, and for either of the others at scale 1.
    """

    scale: float = 1.0
    interval: tuple[float, float] = EVERYWHERE
    """Noise levels rho with low < rho <= high are guided."""
    weak: "LatentModel | None" = None
    """The worse model of autoguidance; None for classifier-free guidance."""

    @cached_property
    def weak_hash(self) -> str | None:
        """12 hexadecimal digits of the worse model's weights, None without one."""
        return None if self.weak is None else state_hash("weak", self.weak.state_dict())

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_interval(*self.interval)
        if self.scale == 1 and (self.weak is not None or self.interval != EVERYWHERE):
            raise ValueError("at scale 1 nothing is guided, by no model and in no interval: give another scale, say 2")


class LatentModel(DescribedModel):
    """Denoiser of standardised latents (B, C, H, W); `loss` trains it, `field` is what solvers see.

    Saved and loaded bit for bit by save_pretrained and from_pretrained; its tokenizer is a model of its own.

    `empty` are classes without a training image, which no seed draws; `class_names` are () where they are not known.
    """

    def __init__(
        self,
        config: LatentModelConfig,
        latent_shape: tuple[int, int, int],
        classes: int,
        empty: tuple[int, ...] = (),
        class_names: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.config, self.latent_shape, self.feature_dim = config, latent_shape, config.dit.width
        self.classes = classes if config.conditional else 0  # label `classes` means "no class"
        self.empty, self.class_names = (empty, class_names) if config.conditional else ((), ())
        self.schedule = config.make_schedule()
        self.network = DiT(config.dit, *latent_shape, self.classes)
        if config.dequantise:
            self.register_buffer("half_cell", torch.zeros(latent_shape[0], 1, 1))
            self.half_cell: Tensor

    def set_bins(self, levels: int, std: Tensor) -> None:
        """Set the bin width of dequantisation, for `levels` levels in [-1, 1] and std (C,) of the pixels by channel."""
        self.half_cell.copy_(1 / ((levels - 1) * std.view(-1, 1, 1)))

    def time_of(self, u: Tensor) -> Tensor:
        """The time to train at, float32 (B,), within the range that grids sample, for float64 u (B,) uniform on (0, 1)."""
        if self.config.time == "uniform":
            ends = self.schedule.time_of_rho(torch.tensor([RHO_MIN, RHO_MAX], dtype=torch.float64, device=u.device))
            return (ends[0] + (ends[1] - ends[0]) * u).float()
        log_rho = self.config.time_mean + self.config.time_std * torch.special.ndtri(u)
        return self.schedule.time_of_logsnr(-2 * log_rho.clamp(math.log(RHO_MIN), math.log(RHO_MAX))).float()

    def forward_network(
        self, x: Tensor, t: Tensor, labels: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit-variance output F (B, C, H, W) and hidden tokens (B, N, W) for x_t, t and labels; a context gives its dropout."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        scale = (alpha.square() + sigma.square()).sqrt()
        return self.network(x / expand(scale, x), _angle(alpha, sigma), labels, context)

    def loss(self, batch: LatentBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the unit-variance target, and sum and count per time bucket (`loss_time_0` .. `loss_time_7`).

        With `dequantise` each pixel is uniform on the bin of its level, value (2 u - 1) / (levels - 1) around it.
        """
        x0 = batch.latents
        if self.config.dequantise:
            x0 = x0 + (2 * context.uniform("dequantise", x0.shape[1:]).to(x0) - 1) * self.half_cell
        u, label = context.uniforms("time", "label")
        t, eps = self.time_of(u), context.normal("noise", x0.shape[1:])
        kept = label >= self.config.label_dropout
        labels = torch.where(kept & (batch.labels < self.classes), batch.labels, self.classes)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        a, b = target_coefficients(self.config.target, t, self.schedule)
        unit = (a.square() + b.square()).sqrt()
        x_t = expand(alpha, x0) * x0 + expand(sigma, x0) * eps
        target = expand(a / unit, x0) * x0 + expand(b / unit, x0) * eps
        output, _ = self.forward_network(x_t, t, labels, context)
        error = (widened(output) - target).square().flatten(1).mean(1)
        return mean(error), {"loss_time": _loss_by_time(error.detach(), _angle(alpha, sigma))}

    def after_step(self, step_ok: Tensor) -> None:
        """Nothing to do between optimizer steps."""

    def output_scale(self, t: Tensor) -> Tensor:
        """target / F, with F the network's output of unit variance, shaped like t."""
        a, b = target_coefficients(self.config.target, t, self.schedule)
        return (a.square() + b.square()).sqrt()

    def conditional_field(self, x: Tensor, t: Tensor, labels: Tensor) -> Prediction:
        """One forward pass: the prediction for x_t (B, C, H, W) at t (B,) for labels (B,)."""
        output, hidden = self.forward_network(x, t, labels)
        value = output.to(x.dtype) * expand(self.output_scale(t), x)
        prediction = solve(value, self.config.target, x, t, self.schedule)
        return Prediction(prediction.x0, prediction.eps, pool(hidden))

    def null_labels(self, labels: Tensor) -> Tensor:
        """The "no class" label for every sample."""
        return torch.full_like(labels, self.classes)

    def field(
        self, labels: Tensor, guidance: "float | Guidance" = 1.0, network: ConditionalField | None = None
    ) -> Field:
        """The field for labels (B,); `network` replaces `conditional_field`, to count evaluations there.

        ValueError where there is nothing to guide (`check_guidance`).
        """
        chosen = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        self.check_guidance(chosen)
        if network is not None:
            if chosen != Guidance(chosen.scale):
                raise ValueError("a network in place of the model's is guided by its own label alone, and everywhere")
            return classifier_free(network, labels, self.null_labels(labels), chosen.scale)
        plain = LatentField(self, labels)
        if chosen.scale == 1:
            return plain
        if chosen.weak is not None:
            same = chosen.weak.classes == self.classes  # if not, one of the two has no classes
            theirs = labels if same else chosen.weak.null_labels(labels)
            guided = autoguidance(plain, LatentField(chosen.weak, theirs), chosen.scale)
        else:
            guided = Together(chosen.scale, partial(LatentField, self), labels, self.null_labels(labels))
        everywhere = chosen.interval == EVERYWHERE
        return guided if everywhere else interval(guided, plain, self.schedule, *chosen.interval)

    @property
    def trained_on(self) -> TrainedOn:
        """What a guide must have in common with the model."""
        classes, dropout = (self.classes, self.class_names, len(self.empty)), self.config.label_dropout
        return TrainedOn(self.config.target, self.schedule, self.latent_shape, *classes, dropout)

    def check_guidance(self, guidance: Guidance) -> None:
        """ValueError for guidance that this model cannot have."""
        weak = guidance.weak
        if weak is self:
            raise ValueError("the guiding model is the model itself: guide with a smaller or less trained one")
        if weak is not None:
            check_guide(self.trained_on, weak.trained_on)
        elif guidance.scale != 1:
            check_labels(guidance.scale, self.trained_on)


@dataclass(frozen=True, eq=False)
class LatentField(TimedField):
    """The field of `model` for labels (B,).

    A sampler knows the times of all evaluations: `at` embeds them all at once, beside the labels, and leaves each evaluation
    the network and one scaling of its input (none where alpha^2 + sigma^2 = 1).
    """

    model: LatentModel
    labels: Tensor

    @property
    def schedule(self) -> Schedule:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model.schedule

    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction:
        return self.model.conditional_field(x, t, self.labels)

    def copies(self, count: int) -> Field:
        return replace(self, labels=self.labels.repeat(count))

    def at(self, times: tuple[float, ...], x: Tensor) -> Evaluations:
        """In terms of F, the network's output of unit variance."""
        model, t = self.model, torch.tensor(times, dtype=torch.float64)
        alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
        pairs = x0_coefficients(model.config.target, model.schedule, times)
        coefficients = tuple(
            (p, q * scale) for (p, q), scale in zip(pairs, model.output_scale(t).tolist(), strict=True)
        )
        dtype = torch.promote_types(model.network.embed.weight.dtype, torch.float32)
        angles = on_device(tuple(_angle(alpha, sigma).tolist()), dtype, self.labels.device)
        conditions = model.network.conditions(angles, self.labels)
        scales = torch.hypot(alpha, sigma).tolist()
        values = [_evaluation(model.network, *pair) for pair in zip(scales, conditions, strict=True)]
        return Evaluations(coefficients, values)


def _evaluation(network: DiT, scale: float, condition: Tensor) -> Callable[[Tensor], Tensor]:
    def evaluate(x: Tensor) -> Tensor:
        return network(x if abs(scale - 1) < 1e-12 else x / scale, condition=condition).value

    return evaluate


def _angle(alpha: Tensor, sigma: Tensor) -> Tensor:
    """The network's time, 2/pi atan2(sigma, alpha) in [0, 1]."""
    return 2 / math.pi * torch.atan2(sigma, alpha)


def _loss_by_time(error: Tensor, angle: Tensor) -> Tensor:
    """(8, 2): sum of the errors (B,) and count in 8 equal buckets of the angle (B,), so that intervals and processes add up."""
    bucket = (angle * TIME_BUCKETS).long().clamp(max=TIME_BUCKETS - 1)
    pairs = torch.stack([error, torch.ones_like(error)], dim=1)
    return pairs.new_zeros(TIME_BUCKETS, 2).index_put_((bucket,), pairs, accumulate=True)


def pool(hidden: Tensor) -> Tensor:
    """Tokens (B, N, W) -> features (B, W): the mean token, normalised to zero mean and unit variance."""
    return F.layer_norm(widened(hidden).mean(1), hidden.shape[-1:])


def start_state(schedule: Schedule, t: float, noise: Tensor) -> Tensor:
    """Standard normal noise -> the state at time `t`, with the standard deviation that unit-variance data has there."""
    time = torch.tensor(t, dtype=torch.float64)
    return noise * torch.hypot(schedule.alpha(time), schedule.sigma(time)).item()
