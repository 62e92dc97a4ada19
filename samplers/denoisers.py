"""Fields of networks that other libraries trained.

    diffusers   value = model(x_t, timestep), a x0 + b eps by its scheduler's prediction type   (interop.py)
    EDM         D(y; rho) = E[x0 | x0 + rho eps = y], evaluated at y = x_t / alpha, rho = sigma / alpha on any schedule

Timesteps are floats, never truncated. A field returns tensors of the dtype of its input; the network runs in its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from midway.samplers.guidance import ConditionalField
from midway.samplers.interop import Parametrisation, parametrisation_of
from midway.samplers.prediction import NetworkField, expand
from midway.samplers.schedule import Linear, Schedule


def without_variance(value: Tensor, channels: int) -> Tensor:
    """The first `channels` of an output (B, 2 C, *) whose second half is a learned variance; any other output as it is."""
    return value[:, :channels] if value.shape[1] == 2 * channels else value


def _parametrisation(scheduler_config: Mapping[str, Any], timestep_scale: float | None) -> Parametrisation:
    parametrisation = parametrisation_of(scheduler_config)
    if timestep_scale is None:
        return parametrisation
    if not isinstance(parametrisation.schedule, Linear):
        raise ValueError(
            "timestep_scale is for flow-matching models; this config is of a model of discrete timesteps, whose "
            "input is the timestep itself: leave it out"
        )
    return replace(parametrisation, timestep_scale=timestep_scale)


def _field(model: Callable[..., Any], parametrisation: Parametrisation, given: Mapping[str, Any]) -> NetworkField:
    """The field of a model with further arguments `given`."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        own = x.to(getattr(model, "dtype", x.dtype))  # the timestep stays float32: bfloat16 cannot tell 998 from 1000
        value = model(own, timestep=parametrisation.timestep(t), return_dict=False, **given)[0]
        return without_variance(value, x.shape[1]).to(x.dtype)

    return NetworkField(network, parametrisation.target, parametrisation.schedule)


def field_from_diffusers(
    model: Callable[..., Any],
    scheduler_config: Mapping[str, Any],
    conditioning: Mapping[str, Any] | None = None,
    timestep_scale: float | None = None,
) -> NetworkField:
    """The field of a diffusers model: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, flow-matching transformers.

    scheduler_config: the config of the scheduler that the model was trained with, `pipe.scheduler.config`. conditioning: further
    arguments of the model by name, such as class_labels (B,) or encoder_hidden_states (B, L, D). timestep_scale: factor from t
    to the time input of a flow-matching model, by default num_train_timesteps; 1 for those that expect sigma (Flux).
    """
    return _field(model, _parametrisation(scheduler_config, timestep_scale), dict(conditioning or {}))


def conditional_from_diffusers(
    model: Callable[..., Any],
    scheduler_config: Mapping[str, Any],
    argument: str = "class_labels",
    conditioning: Mapping[str, Any] | None = None,
    timestep_scale: float | None = None,
) -> ConditionalField:
    """(x_t, t, labels) -> Prediction, for `guidance.classifier_free`: labels (B, *) are passed as `argument`.

    With argument="encoder_hidden_states" the labels are prompt embeddings. The rest as in `field_from_diffusers`.
    """
    parametrisation, given = _parametrisation(scheduler_config, timestep_scale), dict(conditioning or {})
    return lambda x, t, labels: _field(model, parametrisation, {**given, argument: labels})(x, t)


def field_from_edm(
    net: Callable[[Tensor, Tensor, Tensor | None], Tensor], schedule: Schedule, class_labels: Tensor | None = None
) -> NetworkField:
    """The field of net(x, sigma, class_labels) = D(x; sigma) (Karras et al. 2022, arXiv 2206.00364, eq. 2) on a schedule.

    On `EDM` the network sees the state itself; on any other the rescaled state, which needs alpha > 0 at every time.
    """

    def network(x: Tensor, t: Tensor) -> Tensor:
        return net(x / expand(schedule.alpha(t), x), schedule.rho(t), class_labels).to(x.dtype)

    return NetworkField(network, "x0", schedule)
