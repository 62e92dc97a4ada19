"""What a latent model is trained for: at one time (model.py has the equations), or from one time to another.

The objectives of jumps are in gen/objectives/jumps.py. All are a regression of u on a target without a gradient,

    loss = mean of w L,   L = mean square of (u - target) / unit,   w = sg (L + offset)^-power,   unit = |velocity| of unit data

u is computed by the network as it is wrapped, so that processes share its gradients; targets by its weights alone. Where hidden
tokens are aligned with features, that term (gen/objectives/alignment.py) is added.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from midway.gen.diffusion.description import LatentModelConfig
from midway.gen.diffusion.field import Denoiser
from midway.gen.diffusion.inputs import noise_angle
from midway.gen.objectives import errors, jumps
from midway.gen.objectives.jump_config import DERIVATIVE
from midway.gen.objectives.weights import weight
from midway.gen.training.batches import Context, LatentBatch
from midway.samplers.prediction import Target, expand, solve, target_coefficients
from midway.samplers.schedule import Schedule
from midway.tokenizers.losses import mean
from midway.tokenizers.precision import widened

TIME_BUCKETS = 8


@dataclass(frozen=True)
class Draws:
    """What a step draws: x0 and eps (B, C, H, W), labels (B,), some of them dropped, and uniform numbers (B,) for times."""

    x0: Tensor
    eps: Tensor
    labels: Tensor
    times: list[Tensor]


def draws(model: Denoiser, batch: LatentBatch, context: Context, *times: str) -> Draws:
    """Of a batch; where it has pairs, x0 and eps are theirs."""
    x0, eps = batch.latents, batch.noise
    if eps is None:
        x0, eps = model.pixels(x0, context), context.normal("noise", x0.shape[1:])
    label, *drawn = context.uniforms("label", *times)
    kept = (label >= model.config.label_dropout) & (batch.labels < model.classes)
    labels = torch.where(kept, batch.labels, model.classes)
    return Draws(x0, eps, labels, drawn)


def flow_loss(model: Denoiser, batch: LatentBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of weighted squared errors of the unit-variance target (gen/objectives/weights.py, errors.py).

    Logged: sum and count of the errors without weights by time bucket (`loss_time_0` .. `loss_time_7`).
    """
    drawn = draws(model, batch, context, "time")
    t = model.time_of(drawn.times[0])
    x_t, target = noised(model.schedule, model.config.target, t, drawn.x0, drawn.eps)
    output, hidden = model.forward_network(x_t, t, drawn.labels, context)
    prediction = widened(output)
    error = (prediction - target).square().flatten(1).mean(1)
    angle = noise_angle(model.schedule.alpha(t), model.schedule.sigma(t))
    config = model.config
    trained = error if config.scales == 1 else errors.multiscale(prediction, target, config.scales)
    weighted = trained * weight(config.weight, config.target, model.schedule, t, config.min_snr_gamma)
    if model.level is not None:
        u = model.level(model.schedule.rho(t))
        weighted = weighted * (-u).exp() + u
    if config.direction:
        value = prediction * expand(model.output_scale(t), prediction)
        found = solve(value, config.target, x_t, t, model.schedule)
        v, velocity = (velocity_at(model.schedule, t, *pair) for pair in ((found.x0, found.eps), (drawn.x0, drawn.eps)))
        weighted = weighted + config.direction * errors.direction(v, velocity)
    return aligned(model, hidden, batch, context, mean(weighted), {"loss_time": loss_by_time(error.detach(), angle)})


def aligned(
    model: Denoiser, hidden: Tensor, batch: LatentBatch, context: Context, loss: Tensor, logs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and logs, with the alignment of hidden tokens (B, N, W) where the model has one: its mean cosine is `alignment`."""
    if model.alignment is None:
        return loss, logs
    assert batch.features is not None
    term, cosines = model.alignment(hidden, batch.features, context.step)
    return loss + term, {**logs, "alignment": cosines}


def noised(schedule: Schedule, target: Target, t: Tensor, x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The state x_t and the unit-variance target there, (B, *) each, for x0 and eps (B, *) at t (B,)."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    a, b = target_coefficients(target, t, schedule)
    unit = (a.square() + b.square()).sqrt()
    return expand(alpha, x0) * x0 + expand(sigma, x0) * eps, expand(a / unit, x0) * x0 + expand(b / unit, x0) * eps


def velocity_at(schedule: Schedule, t: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """dx_t / dt (B, *) at t (B,)."""
    d_alpha, d_sigma = schedule.rates(t)
    return expand(d_alpha, x0) * x0 + expand(d_sigma, x0) * eps


def loss_by_time(error: Tensor, angle: Tensor) -> Tensor:
    """(8, 2): sum of the errors (B,) and count in 8 equal buckets of the angle (B,), so that intervals and processes add up."""
    bucket = (angle * TIME_BUCKETS).long().clamp(max=TIME_BUCKETS - 1)
    pairs = torch.stack([error, torch.ones_like(error)], dim=1)
    return pairs.new_zeros(TIME_BUCKETS, 2).index_put_((bucket,), pairs, accumulate=True)


# ---- jumps ----


@dataclass(frozen=True)
class Jumps:
    """Samples on their way: states z at t, the ends r of their jumps, velocities v, labels and guidance scales."""

    model: Denoiser
    z: Tensor
    t: Tensor
    r: Tensor
    v: Tensor
    labels: Tensor
    guidance: Tensor
    context: Context

    def of(self, places: Tensor) -> "Jumps":
        """The samples at these places (k,)."""
        fields = ("z", "t", "r", "v", "labels", "guidance")
        context = replace(self.context, sample_ids=self.context.sample_ids[places])
        return replace(self, context=context, **{name: getattr(self, name)[places] for name in fields})

    def average(self, z: Tensor, t: Tensor, r: Tensor, wrapped: bool = False, labelled: bool = True) -> Tensor:
        """u (B, C, H, W) of these samples at other states and times; the dropout masks are those of the step."""
        return self.passed(z, t, r, wrapped, labelled)[0]

    def passed(
        self, z: Tensor, t: Tensor, r: Tensor, wrapped: bool = False, labelled: bool = True
    ) -> tuple[Tensor, Tensor]:
        """`average`, and the hidden tokens (B, N, W)."""
        model = self.model
        labels = self.labels if labelled else model.null_labels(self.labels)
        guidance = self.guidance if labelled else torch.ones_like(self.guidance)
        output, hidden = model.forward_network(z, t, labels, self.context, r, guidance, bare=not wrapped)
        return widened(output) * expand(model.output_scale(t), z), hidden


def jump_loss(model: Denoiser, batch: LatentBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted error of average velocities; logs have the error itself, `error`, also by time."""
    config = model.config
    made = states(model, batch, context)
    u, hidden = made.passed(made.z, made.t, made.r, wrapped=True)
    with torch.no_grad():
        target = target_of(made, u.detach())
    unit = expand(model.output_scale(made.t), u)
    error = ((u - target) / unit).square().flatten(1).mean(1)
    weight = jumps.adaptive_weight(error, config.jump.power(config.objective), config.jump.weight_offset)
    angle = noise_angle(model.schedule.alpha(made.t), model.schedule.sigma(made.t))
    seen = error.detach()
    logs = {"error": mean(seen), "loss_time": loss_by_time(seen, angle)}
    return aligned(model, hidden, batch, context, mean(weight * error), logs)


def states(model: Denoiser, batch: LatentBatch, context: Context) -> Jumps:
    """The samples of a step on their way: times, states, velocities, labels and guidance scales."""
    config, schedule = model.config, model.schedule
    drawn = draws(model, batch, context, "time", "end", "guidance")
    x0, eps = drawn.x0, drawn.eps
    t, r = times(model, drawn.times[0], drawn.times[1], context.sample_ids)
    z = expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps
    scale = config.jump.guidance ** drawn.times[2].to(t)  # log-uniform on [1, greatest]
    guidance = torch.where(drawn.labels < model.classes, scale, 1.0)
    with torch.no_grad():
        v = model.teacher(z, t, drawn.labels) if model.teacher is not None else velocity_at(schedule, t, x0, eps)
        made = Jumps(model, z, t, r, v, drawn.labels, guidance, context)
        if config.jump.guidance == 1:
            return made
        labelled, unlabelled = (made.average(z, t, t, labelled=which) for which in (True, False))
        return replace(made, v=jumps.guided(v, labelled, unlabelled, guidance))


def times(model: Denoiser, first: Tensor, second: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(t, r) float32 (B,) for uniform float64 (B,) and the samples' ids."""
    config, (low, high) = model.config, model.time_range
    t = model.time_of(first)
    if config.objective == "shortcut":
        a, b = (each.float() for each in jumps.dyadic_times(first, second, config.jump.finest, low, high))
        is_flow = jumps.is_flow(sample_ids, config.jump.share(config.objective))
        return torch.where(is_flow, t, a), torch.where(is_flow, t, b)
    to_data = config.jump.ends == "data"
    a, b = (t, torch.full_like(t, low)) if to_data else jumps.sorted_times(t, model.time_of(second))
    return a, torch.where(jumps.is_flow(sample_ids, config.jump.share(config.objective)), a, b)


def target_of(made: Jumps, u: Tensor) -> Tensor:
    """The targets (B, C, H, W): v at r = t, and of the others what the objective is named after. u: their prediction."""
    share = made.model.config.jump.share(made.model.config.objective)
    if share == 0:
        return jump_target(made, u)
    is_flow = jumps.is_flow(made.context.sample_ids, share)
    some = torch.arange(round(len(u) * (1 - share)), device=u.device)  # without numbers, for memory and operations
    places = some if u.is_meta else (~is_flow).nonzero().squeeze(1)
    if not len(places):
        return made.v
    return made.v.index_copy(0, places, jump_target(made.of(places), u[places]).to(made.v.dtype))


def jump_target(made: Jumps, u: Tensor) -> Tensor:
    """The target of the model's objective for jumps with r < t."""
    model, average = made.model, made.average
    config = model.config
    z, t, r, v = made.z, made.t, made.r, made.v
    if config.objective == "shortcut":
        low, high = model.time_range
        return jumps.shortcut_target(average, z, t, r, (high - low) * 2.0**-config.jump.finest)
    if config.objective == "imf":
        return jumps.meanflow_target(average, z, t, r, v, average(z, t, t))
    alpha = alpha_of(config, made.context.step) if config.objective == "alphaflow" else 0.0
    if alpha < DERIVATIVE:
        return jumps.meanflow_target(average, z, t, r, v)
    if not jumps.is_half(z):
        return jumps.enlarged(u, jumps.alphaflow_target(average, z, t, r, v, alpha), alpha)
    with jumps.without_autocast(z):  # a small difference by alpha, which bfloat16 does not resolve
        own = average(z, t, r)
        return u + jumps.enlarged(own, jumps.alphaflow_target(average, z, t, r, v, alpha), alpha) - own


def alpha_of(config: LatentModelConfig, step: int) -> float:
    """alpha-Flow's alpha in this optimizer step."""
    jump = config.jump
    return jumps.alpha_at(step / max(jump.alpha_steps, 1), jump.alpha_end)


def differences(config: LatentModelConfig, steps: int) -> float:
    """Share of so many optimizer steps in which alpha-Flow's target is a difference, not yet a derivative; 0 of others."""
    if config.objective != "alphaflow":
        return 0.0
    return bisect_left(range(steps), True, key=lambda step: alpha_of(config, step) < DERIVATIVE) / max(steps, 1)


def evaluations_of(config: LatentModelConfig, taught: bool, half: float = 0.0) -> float:
    """Passes of an image through networks in a training step, forward ones: of the model, of targets, and of a teacher.

    half: the share of steps that take alpha-Flow's difference in float32 beside a prediction in half precision.
    """
    if not config.is_jump:
        return 1.0
    jumping = 1 - round(jumps.PERIOD * config.jump.share(config.objective)) / jumps.PERIOD
    targets = {"shortcut": 2, "alphaflow": 1 + half, "meanflow": 1, "imf": 2}[config.objective]
    teacher = taught * (1 + (config.jump.teacher_guidance != 1))
    return 1 + jumping * targets + teacher + 2 * (config.jump.guidance > 1)
