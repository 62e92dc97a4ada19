"""A diffusion or flow model on standardised latents, for every schedule and every target.

With s = sqrt(alpha^2 + sigma^2) and a target `a x0 + b eps` (prediction.py) the input and the output of the network F have unit
variance:

    F(x_t / s, angle, label)  ~  (a x0 + b eps) / sqrt(a^2 + b^2),      angle = 2/pi atan2(sigma, alpha) in [0, 1]
    loss = mean square of the difference

On `EDM` with target `v` this is EDM's preconditioning and loss weight for unit-variance data (Karras et al. 2022, arXiv
2206.00364, Table 1); on `Linear` with `velocity` it is half the rectified-flow loss; on `Cosine` with `v` or `eps` the usual
ones. The angle of the noise level means the same on all schedules.

Times are drawn by noise levels, or so that t is uniform on the sampling range (gen/objectives/times.py); normal log rho is on
`Linear` SD3's t = sigmoid(N(m, s^2)), arXiv 2403.03206, and on `EDM` with m, s = -1.2, 1.2 EDM's own.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from midway.gen.core.files import state_hash
from midway.gen.diffusion.description import DescribedModel, Description, LatentModelConfig
from midway.gen.diffusion.field import LatentField, LatentJumpField, Velocity, pool
from midway.gen.diffusion.inputs import network_time, noise_angle, noise_levels
from midway.gen.diffusion.loss import flow_loss, jump_loss
from midway.gen.networks.dit import DiT
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.network import Network
from midway.gen.networks.unet import UNet, UNetConfig
from midway.gen.objectives import times
from midway.gen.objectives.errors import check_errors
from midway.gen.objectives.jump_config import check_jump_guidance
from midway.gen.objectives.weights import LossLevel
from midway.gen.training.batches import Context, LatentBatch
from midway.samplers.guidance import ConditionalField, Together, autoguidance, classifier_free, interval
from midway.samplers.guidance_checks import TrainedOn, check_guide, check_interval, check_labels, check_scale
from midway.samplers.prediction import ONE_TIME, Field, Prediction, expand, solve, target_coefficients
from midway.samplers.schedule import Schedule
from midway.tokenizers.hub import card_of

if TYPE_CHECKING:
    from midway.gen.objectives.alignment import Alignment

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

    With an objective of jumps the field is one of average velocities, a `JumpField`.

    Saved and loaded bit for bit by save_pretrained and from_pretrained; its tokenizer is a model of its own.

    `empty` are classes without a training image, which no seed draws; `class_names` are () where they are not known.
    """

    described = Description
    noun = "latent model"

    def __init__(
        self,
        config: LatentModelConfig,
        latent_shape: tuple[int, int, int],
        classes: int,
        empty: tuple[int, ...] = (),
        class_names: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        check_errors(config.scales, config.direction, latent_shape)
        self.config, self.latent_shape = config, latent_shape
        self.classes = classes if config.conditional else 0  # label `classes` means "no class"
        self.empty, self.class_names = (empty, class_names) if config.conditional else ((), ())
        self.schedule = config.make_schedule()
        self.network = make_network(config.size, latent_shape, self.classes, config.further)
        self.feature_dim = self.network.feature_dim
        self.level = LossLevel() if config.weight == "learned" else None
        """Of training alone."""
        self.teacher: Velocity | None = None
        """Whose velocity takes the place of the samples' own in training."""
        self.alignment: Alignment | None = None
        """What hidden tokens are aligned with in training; no part of a model that was loaded."""
        if config.dequantise:
            self.register_buffer("half_cell", torch.zeros(latent_shape[0], 1, 1))
            self.half_cell: Tensor

    def set_bins(self, levels: int, std: Tensor) -> None:
        """Set the bin width of dequantisation, for `levels` levels in [-1, 1] and std (C,) of the pixels by channel."""
        self.half_cell.copy_(1 / ((levels - 1) * std.view(-1, 1, 1)))

    def time_of(self, u: Tensor) -> Tensor:
        """The time to train at, float32 (B,), within `time_range`, for float64 u (B,) uniform on (0, 1)."""
        config, (low, high) = self.config, self.time_range
        factor = self.shift
        if config.time == "uniform" and factor == 1:
            return (low + (high - low) * u).float()
        if config.time == "uniform":
            log_rho = self.schedule.rho(low + (high - low) * u).log()
        elif config.time == "mode":
            log_rho = times.mode(u, config.time_mode)
        else:
            own = times.logit_normal(u, config.time_mean, config.time_std)
            log_rho = own if config.time == "logit_normal" else times.cosmap(u)
        return times.time_at(self.schedule, log_rho + math.log(factor), *self.noise_levels).float()

    @property
    def shift(self) -> float:
        """The factor of the noise levels that are trained, which the grid `shift` has, too; 1: none."""
        return times.shift_factor(self.config.time_shift, math.prod(self.latent_shape))

    @property
    def time_range(self) -> tuple[float, float]:
        """The least and the greatest time that is trained, and that grids sample."""
        return _range(self.schedule, *self.noise_levels)

    @property
    def noise_levels(self) -> tuple[float, float]:
        """(rho_min, rho_max) on which the network is trained, within those of grids."""
        return noise_levels(self.config.inputs)

    def forward_network(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor,
        context: Context | None = None,
        r: Tensor | None = None,
        guidance: Tensor | None = None,
        bare: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Unit-variance output F (B, C, H, W) and hidden tokens (B, N, W) for x_t, t and labels; a context gives its dropout.

        Of a model that jumps, from t to r (B,), by default t, at guidance scales (B,), by default 1. bare: without what wraps the
        network's forward, as torch.compile does.
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        scale = (alpha.square() + sigma.square()).sqrt()
        network = (
            self.network._call_impl if bare else self.network
        )  # hooks act: they gather the parts of a sharded network
        more = self.further(t, t if r is None else r, guidance)
        inputs = self.config.inputs
        state, clock = x if inputs != "own" else x / expand(scale, x), network_time(inputs, t, alpha, sigma)
        value, hidden = network(state, clock, labels, context, more=more)
        return value if inputs == "own" else value / expand(self.output_scale(t), value), hidden

    def further(self, t: Tensor, r: Tensor, guidance: Tensor | float | None = None) -> dict[str, Tensor]:
        """What a network of jumps gets beside the time, for t, r and guidance scales (B,) or one of all; {} of another."""
        if not self.config.further:
            return {}
        angles = [noise_angle(self.schedule.alpha(time), self.schedule.sigma(time)) for time in (t, r)]
        scale = torch.ones_like(t) if guidance is None else torch.ones_like(t) * guidance
        found = {"span": angles[0] - angles[1], "guidance": 1 - 1 / scale}
        return {name: found[name] for name in self.config.further}

    def loss(self, batch: LatentBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and what to log (loss.py)."""
        return (jump_loss if self.config.is_jump else flow_loss)(self, batch, context)

    def align(self, alignment: "Alignment") -> None:
        """Have training align hidden tokens. ValueError for a block that there is not."""
        self.network.take(alignment.config.block)
        self.alignment = alignment

    def pixels(self, x0: Tensor, context: Context) -> Tensor:
        """x0, with `dequantise` each pixel uniform on the bin of its level: value (2 u - 1) / (levels - 1) around it."""
        if not self.config.dequantise:
            return x0
        return x0 + (2 * context.uniform("dequantise", x0.shape[1:]).to(x0) - 1) * self.half_cell

    def rate_of(self, name: str) -> float:
        """The factor of the learning rate of the parameter of this name."""
        inner = name.removeprefix("network.")
        return self.network.rate_of(inner) if inner != name else 1.0

    def after_step(self, step_ok: Tensor) -> None:
        """Nothing to do between optimizer steps."""

    def own_card(self, license: str) -> str:
        facts = {"schedule": self.config.schedule, "latents": self.latent_shape, "classes": self.classes}
        return card_of("Latent model", license, ("latent-model", self.config.schedule), facts, self.config.usage)

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
            if self.config.is_jump:
                raise ValueError(ONE_TIME)
            if chosen != Guidance(chosen.scale):
                raise ValueError("a network in place of the model's is guided by its own label alone, and everywhere")
            return classifier_free(network, labels, self.null_labels(labels), chosen.scale)
        if self.config.is_jump:
            return LatentJumpField(self, labels, chosen.scale)
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
        if self.config.is_jump and guidance.scale != 1:
            check_jump_guidance(self.config.jump, guidance.scale, weak is not None or guidance.interval != EVERYWHERE)
            check_labels(guidance.scale, self.trained_on)
        elif weak is self:
            raise ValueError("the guiding model is the model itself: guide with a smaller or less trained one")
        elif weak is not None:
            check_guide(self.trained_on, weak.trained_on)
        elif guidance.scale != 1:
            check_labels(guidance.scale, self.trained_on)


def make_network(
    size: DiTConfig | UNetConfig, latent_shape: tuple[int, int, int], classes: int, further: tuple[str, ...]
) -> Network:
    """ValueError for latents that it cannot take; UsageError for a U-Net without diffusers."""
    if isinstance(size, DiTConfig):
        return DiT(size, *latent_shape, classes, further)
    return UNet(size, *latent_shape, classes, further)


@lru_cache
def _range(schedule: Schedule, rho_min: float, rho_max: float) -> tuple[float, float]:
    low, high = schedule.time_of_rho(torch.tensor([rho_min, rho_max], dtype=torch.float64)).tolist()
    return low, high
