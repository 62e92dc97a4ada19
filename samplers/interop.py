"""Forward process, target and time input of a model, read from the config of its diffusers scheduler.

A model of discrete timesteps k = 0 .. N - 1 lives on `Discrete` (discrete.py) with t = (k + 1) / N.
The network's time input is the float timestep k = N t - 1.
Flow-matching models live on `Linear` with time input N t. Their `shift` is a matter of the grid (`grids.shift`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midway.samplers.artefacts import read_header
from midway.samplers.discrete import Discrete, betas_of, without_terminal_signal
from midway.samplers.grids import RHO_MAX, RHO_MIN
from midway.samplers.learned_solver import FORMAT as LEARNED
from midway.samplers.learned_solver import LearnedSolver
from midway.samplers.prediction import Target
from midway.samplers.rows import Row
from midway.samplers.schedule import Linear, Schedule
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table

TARGET_OF: dict[str, Target] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}
"""diffusers' prediction types in the words of `prediction.py`."""


@dataclass(frozen=True)
class Parametrisation:
    """A model's forward process, its target, and the factor from t to its time input (flow matching only)."""

    schedule: Schedule
    target: Target
    timestep_scale: float = 1.0

    def timestep(self, t: Tensor) -> Tensor:
        """The network's time input at t, elementwise."""
        return self.schedule.timestep(t) if isinstance(self.schedule, Discrete) else self.timestep_scale * t

    def time(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep`, elementwise."""
        return self.schedule.time(timestep) if isinstance(self.schedule, Discrete) else timestep / self.timestep_scale

    def level(self, t: Tensor) -> Tensor:
        """What diffusers calls the sigma of t, elementwise: t of a flow, else sigma / alpha."""
        return self.schedule.rho(t) if isinstance(self.schedule, Discrete) else t

    def time_of_level(self, sigma: Tensor) -> Tensor:
        """The inverse of `level`, elementwise."""
        return self.schedule.time_of_rho(sigma) if isinstance(self.schedule, Discrete) else sigma


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config belongs to a flow-matching model; one that was never saved does not name its class."""
    declared = config.get("prediction_type") == "flow_prediction" or bool(config.get("use_flow_sigmas"))
    named = str(config.get("_class_name", "")).startswith("FlowMatch")
    return declared or named or ("shift" in config and "beta_start" not in config)


def parametrisation_of(config: Mapping[str, Any]) -> Parametrisation:
    """Read a scheduler's config; keys that it lacks have diffusers' defaults (1000 timesteps, linear betas, epsilon).

    ValueError for schedulers of other processes (EDM, VE), flows in reversed time, unknown beta schedules and prediction types.
    """
    if is_flow(config):
        if config.get("invert_sigmas"):
            raise ValueError("invert_sigmas: a flow whose time runs from noise at 0 to data at 1 is not supported")
        return Parametrisation(Linear(), "velocity", float(config.get("num_train_timesteps", 1000)))
    owner, kind = str(config.get("_class_name", "")), config.get("prediction_type", "epsilon")
    if owner.startswith(("EDM", "ScoreSde", "KarrasVe")) or ("sigma_max" in config and "beta_start" not in config):
        raise ValueError(
            f"a config with sigma_max and no betas ({owner or 'no class named'}) is of another process: "
            "use field_from_edm with a network D(x; sigma)"
        )
    if kind not in TARGET_OF:
        raise ValueError(f"unknown prediction_type {kind!r}: choose one of {', '.join(TARGET_OF)}")
    log_alpha_bar = torch.log1p(-betas_of(config)).cumsum(0)
    if config.get("rescale_betas_zero_snr", False):
        log_alpha_bar = without_terminal_signal(log_alpha_bar)
    return Parametrisation(Discrete.from_log_alpha_bar(log_alpha_bar), TARGET_OF[kind])


def trained_range(schedule: Schedule) -> tuple[float, float]:
    """(rho_max, rho_min) for a grid: the usual 80 and 0.002, or what a discrete schedule was trained on where that is less."""
    if not isinstance(schedule, Discrete):
        return RHO_MAX, RHO_MIN
    return min(RHO_MAX, math.exp(schedule.log_rho[-1])), max(RHO_MIN, math.exp(schedule.log_rho[0]))


def table_from_numbers(numbers: Mapping[str, Any]) -> Table:
    """The table whose `dataclasses.asdict` these numbers are, also after a journey through JSON; ValueError for any other."""
    try:
        rows = tuple(
            Row(r["time"], r["arrival"], tuple(r["states"]), tuple(r["predictions"]), r["noise"], r.get("to"))
            for r in numbers["rows"]
        )
        grid, nodes, metadata = tuple(numbers["grid"]), tuple(numbers["nodes"]), dict(numbers["metadata"])
        return _named(Table(numbers["solver"], grid, nodes, rows, metadata, numbers["schedule"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"these are not the numbers of a table: {type(error).__name__} {error}") from error


def read_table(path: Path, schedule: Schedule) -> Table:
    """The table for this schedule in a file of `Table.save` or of a learned solver with constants; ValueError for any other."""
    if read_header(path).get("format") != LEARNED:
        return _named(Table.load(path, schedule))
    table = LearnedSolver.load(path, schedule).table
    if table is None:
        raise ValueError(
            f"{path} predicts its numbers from the network's features, which a pipeline does not hand over: "
            "distil its form without -predictor instead"
        )
    return table


def _named(table: Table) -> Table:
    """The table; ValueError for one that jumps, and for one that draws noise under the name of a solver that draws none."""
    table.check_plain("the network of a pipeline")
    solver = SOLVERS.get(table.solver)
    if table.stochastic and solver is not None and not solver.stochastic and "eta" not in table.metadata:
        raise ValueError(f"the table has weights of noise, and '{table.solver}' draws none")
    return table
