"""The grid of a run of MidwayScheduler: that of its config, or of what a pipeline passes to `set_timesteps`.

    sigmas      where the network is evaluated: the t of a flow, else sigma / alpha. The end, 0, may be left out
    timesteps   the same, as the network's time inputs, which nothing shifts
    mu          shifts every t of a flow by the factor e^mu: t' = e^mu / (e^mu + 1 / t - 1), as FLUX does (and SD3's eq. 23)

With `sigmas` a flow's config counts as in FlowMatchEulerDiscreteScheduler: its `shift`, or `mu` if `use_dynamic_shifting`, then
`shift_terminal`.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from midway.samplers.grids import NAMED, Grid, explicit, is_grid
from midway.samplers.interop import Parametrisation, trained_range
from midway.samplers.schedule import Linear, Shifted
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table

SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def check_named(grid: Any) -> None:
    """ValueError for what is neither a name of `NAMED` nor falling times."""
    if not isinstance(grid, str):
        explicit(grid)
    elif grid not in NAMED:
        raise ValueError(f"unknown grid {grid!r}: choose one of {', '.join(NAMED)}, or give falling times in [0, 1]")


def table_on(model: Parametrisation, config: Mapping[str, Any], grid: Grid, analytic_first: bool) -> Table:
    """The config's solver on this grid. ValueError for a grid that it cannot run on, with the option that bounds grids."""
    options = dict(config["solver_options"] or {}) | ({"analytic_first": True} if analytic_first else {})
    try:
        return SOLVERS[config["solver"]].build(model.schedule, grid, **options)
    except ValueError as error:
        if "at rho" not in str(error):
            raise
        bounds = '{"rho_max": 80, "rho_min": 0.002}'
        raise ValueError(f"{error}, with grid_options={bounds} of MidwayScheduler") from error


def grid_of(
    model: Parametrisation,
    config: Mapping[str, Any],
    steps: int | None,
    sigmas: Any = None,
    mu: float | None = None,
    timesteps: Any = None,
) -> Grid:
    """Falling times from noise to data. `steps` may be None beside sigmas or timesteps.

    ValueError for sigmas or timesteps that are not finite, rise, lie outside the model's range, or are not `steps`; for both; for
    mu that is not finite, or of a model that is no flow.
    """
    count = number_of_steps(steps, sigmas, timesteps)
    factor = _factor(model, config, mu)
    if timesteps is not None:
        return _ended(model, config, _times(model, timesteps, "timesteps"))
    if sigmas is None:
        return _named(model, config, count, factor or 1.0)
    times = _times(model, sigmas, "sigmas")
    return _ended(model, config, _as_flow(times, factor, config) if isinstance(model.schedule, Linear) else times)


def number_of_steps(steps: int | None, sigmas: Any, timesteps: Any) -> int:
    """`steps`, or as many as there are sigmas or timesteps above the end; ValueError unless they agree."""
    if sigmas is not None and timesteps is not None:
        raise ValueError("set_timesteps takes sigmas or timesteps, not both: pass one of them")
    given = sigmas if timesteps is None else timesteps
    if given is None:
        if steps is None:
            raise ValueError("set_timesteps needs num_inference_steps, sigmas or timesteps: pass one of them")
        return steps
    found = _numbers(given)
    counted = len(found) - (timesteps is None and len(found) > 1 and found[-1] == 0)
    if steps not in (None, counted, len(found)):
        raise ValueError(f"there are {len(found)} sigmas or timesteps for {steps} steps: pass as many, or no number")
    return counted


def _numbers(given: Any) -> list[float]:
    found = torch.as_tensor(given, dtype=torch.float64).flatten().tolist()
    if not found:
        raise ValueError("sigmas or timesteps are empty: pass at least one")
    return found


def _times(model: Parametrisation, given: Any, name: str) -> Tensor:
    """float64: the times of `given`, as they fall; ValueError for numbers that are no run of this model."""
    found = _numbers(given)
    level = model.level if name == "sigmas" else model.timestep
    most = level(torch.ones(1, dtype=torch.float64)).item()
    outside = [value for value in found if not (0 <= value <= most * (1 + 1e-4) and value < math.inf)]
    if outside:
        raise ValueError(f"{name} have {outside[0]:g}: those of this model are finite, from 0 to {most:g}")
    rising = [pair for pair in pairwise(found) if pair[0] <= pair[1]]
    if rising:
        raise ValueError(f"{name} go from {rising[0][0]:g} to {rising[0][1]:g}: each has to be below the one before")
    times = torch.tensor(found, dtype=torch.float64).clamp(max=most)
    return model.time_of_level(times) if name == "sigmas" else model.time(times)


def _factor(model: Parametrisation, config: Mapping[str, Any], mu: float | None) -> float | None:
    """By which mu shifts times; None without mu, and for a config that has static shifting, which ignores it as theirs does."""
    if mu is None:
        return None
    if not isinstance(model.schedule, Linear):
        raise ValueError(f"mu = {mu} is the shift of a flow, and this model is none: leave it out")
    linear = config.get("time_shift_type") == "linear"
    if not math.isfinite(mu) or abs(mu) > 100 or (linear and mu <= 0):
        raise ValueError(f"mu is {mu}: it has to be finite{' and positive' * linear}, usually 0.5 to 1.15")
    if config.get("use_dynamic_shifting") is False:
        return None
    return mu if linear else math.exp(mu)


def _as_flow(times: Tensor, factor: float | None, config: Mapping[str, Any]) -> Tensor:
    """Shifted and stretched as a flow's config says."""
    spacing = next((name for name in SPACINGS if config.get(name)), None)
    if spacing is not None:
        raise ValueError(
            f"{spacing} of the config is not applied to sigmas: set it to False, and pass sigmas of that spacing"
        )
    if factor is None and config.get("use_dynamic_shifting"):
        raise ValueError("the config has use_dynamic_shifting, so that sigmas need mu: pass it")
    if factor is None:
        factor = float(config.get("shift") or config.get("flow_shift") or 1.0)
    shifted = Shifted(Linear(), factor).warp(times) if factor != 1 else times
    if config.get("shift_terminal"):
        shifted = 1 - (1 - shifted) * (1 - config["shift_terminal"]) / (1 - shifted[-1])
    return shifted


def _ended(model: Parametrisation, config: Mapping[str, Any], times: Tensor) -> Grid:
    """With an end at 0; between the noise levels that `grid_options` name, for solvers that cannot be at 0 or at pure noise."""
    options = dict(config.get("grid_options") or {})
    most, least = (
        model.schedule.time_of_rho(torch.tensor(options[name], dtype=torch.float64)).item()
        if name in options
        else bound
        for name, bound in (("rho_max", 1.0), ("rho_min", 0.0))
    )
    listed = [t for t in times.tolist() if t > least]
    grid = [*(min(t, most) for t in listed), least]
    if not is_grid(grid):
        raise ValueError(f"these noise levels become the times {grid}, which do not fall all the way: choose others")
    return explicit(grid)


def _named(model: Parametrisation, config: Mapping[str, Any], steps: int, factor: float) -> Grid:
    """The grid of the config; shifted, it has the same ends, and `shift` this factor in place of its own."""
    name, options, shifted = config["grid"], dict(config["grid_options"] or {}), Shifted(model.schedule, factor)
    if not isinstance(name, str):
        grid = explicit(name)
        if steps != len(grid) - 1:
            raise ValueError(f"the grid has {len(grid) - 1} steps, not {steps}: pass as many, or name a grid")
        return grid if factor == 1 else _warped(shifted, grid)
    rho_max, rho_min = trained_range(model.schedule)
    options = {"rho_max": rho_max, "rho_min": rho_min, **options}
    if factor == 1:
        return NAMED[name](model.schedule, steps, **options)
    own = NAMED["uniform" if name == "shift" else name]
    return _warped(shifted, own(shifted, steps, **{key: value for key, value in options.items() if key != "factor"}))


def _warped(shifted: Shifted, grid: Grid) -> Grid:
    return explicit(shifted.warp(torch.tensor(grid, dtype=torch.float64)).tolist())
