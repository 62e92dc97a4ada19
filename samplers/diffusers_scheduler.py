"""Our tables as a diffusers scheduler: `pipe.scheduler = MidwayScheduler.from_config(pipe.scheduler.config, solver="dpmpp2m")`.

A pipeline calls the network at every entry of `timesteps` and passes its output to `step`, which runs that row of the table
and any rows without an evaluation that follow: the same steps, in the same arithmetic, as `sample` on `field_from_diffusers`.
A run begins at the timestep that it is first called with, so on `timesteps[k:]` it solves from there; every later call must be at
the next. The state has the scaling of the model's own schedule, x_t = alpha x0 + sigma eps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midway.samplers.denoisers import without_variance
from midway.samplers.grids import Grid
from midway.samplers.interop import is_flow, parametrisation_of, read_table, table_from_numbers
from midway.samplers.prediction import expand
from midway.samplers.schedule import fingerprint
from midway.samplers.scheduler_grids import check_named, grid_of, number_of_steps, table_on
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table
from midway.samplers.table_walk import TableWalk
from midway.samplers.timesteps import Timesteps

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError("MidwayScheduler needs diffusers: pip install 'diffusers>=0.35'") from error


class MidwayScheduler(SchedulerMixin, ConfigMixin):
    """A solver of the registry, or a learned table, for any pipeline that calls `set_timesteps` and `step`.

    The first seven arguments describe how the model was trained, with diffusers' names and defaults (interop.py).

    prediction_type: epsilon, sample, v_prediction or flow_prediction. solver, solver_options: a name of `SOLVERS` and further
    arguments of its builder. grid, grid_options: a name of `NAMED` and further arguments, or falling times in [0, 1] that fix the
    number of steps. analytic_first: no evaluation in the first step. table: in place of all these, the path of a learned
    table, or its numbers, which then are part of the config.
    """

    _compatibles = [*(e.name for e in KarrasDiffusionSchedulers), "FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        solver: str = "dpmpp2m",
        solver_options: Mapping[str, Any] | None = None,
        grid: str | Sequence[float] = "uniform",
        grid_options: Mapping[str, Any] | None = None,
        analytic_first: bool = False,
        table: str | Mapping[str, Any] | None = None,
    ) -> None:
        self.parametrisation = parametrisation_of(self.config)
        self._learned: Table | None = None
        if table is not None:
            read = isinstance(table, str)
            self._keep(read_table(Path(table), self.parametrisation.schedule) if read else table_from_numbers(table))
        elif solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join(SOLVERS)}, or give a table")
        else:
            check_named(grid)
        self.num_inference_steps: int | None = None
        self.timesteps = self.sigmas = torch.empty(0)
        self.table: Table | None = None
        self._tables: dict[Grid, Table] = {}
        self._list: Timesteps | None = None
        self._levels: Timesteps | None = None
        self._walk: TableWalk | None = None
        self._index = self._first = 0
        self._is_placed = False
        self._scaled: Tensor | None = None

    def _keep(self, table: Table) -> None:
        """The numbers of a learned table go into the config, so that saving and copying it need no second file."""
        own = fingerprint(self.parametrisation.schedule)
        if table.schedule not in ("", own):
            raise ValueError(
                f"table '{table.solver}' was made for {table.schedule}, the config describes {own}: use the config of the "
                "scheduler that the model was trained with"
            )
        self._learned = table
        self.register_to_config(table=asdict(table), solver=table.solver, grid=list(table.grid))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler for the model that a scheduler with this config drives; further arguments of `MidwayScheduler` by name."""
        if isinstance(config, dict):
            # the other class may have other defaults than ours, so what it took by default counts as given
            config = {name: value for name, value in config.items() if name != "_use_default_values"}
            parametrisation_of({**config, **kwargs})  # of its class, whose name and further arguments are not ours
            if is_flow(config):
                kwargs.setdefault("prediction_type", "flow_prediction")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # ---- what a pipeline calls ----

    @property
    def order(self) -> int:
        """Evaluations per step, as pipelines use the word."""
        if self._learned is not None:
            return math.ceil(self._learned.nfe / (len(self._learned.grid) - 1))
        return SOLVERS[self.config["solver"]].evaluations

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the initial state of unit-variance data: 1 for all but flow-matching models."""
        t = torch.tensor(self.table.grid[0] if self.table else 1.0, dtype=torch.float64)
        return torch.hypot(self.parametrisation.schedule.alpha(t), self.parametrisation.schedule.sigma(t)).item()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Build the table and begin anew. `timesteps` (one per evaluation, float32) is on `device`, `sigmas` on the host.

        sigmas, mu, timesteps: what flow pipelines pass (scheduler_grids.py), falling, the end left out or 0. A learned table has
        its own grid: it only needs as many as it has steps. ValueError for any that are no run of this model.
        """
        self.table = self._build(num_inference_steps, sigmas, mu, timesteps)
        times = torch.tensor([*self.table.times, self.table.grid[-1]], dtype=torch.float64)
        self._list = Timesteps.on(device, self.parametrisation.timestep(times[:-1]).float())
        self._levels = Timesteps.on(None, self.parametrisation.level(times).float())
        self.timesteps, self.sigmas = self._list.tensor, self._levels.tensor
        self.num_inference_steps = len(self.table.grid) - 1
        self._begin(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this entry of `timesteps` (image to image): the solver starts anew on the rest of the grid."""
        self._begin(begin_index)
        self._is_placed = True

    def index_for_timestep(self, timestep: Tensor | float) -> int:
        """The entry of `timesteps` at which a run begins that is first called with this timestep.

        Where the stages of a solver share a time it is the entry that begins a step. ValueError for a timestep that is not in the
        list, at which no run can begin, or that is equal to several in its half precision.
        """
        places = self._list_now().find(timestep)
        starts = [index for index in places if self._node_of(index) is not None]
        if not starts:
            raise self._no_start(places[0])
        if len({self._list_now().values[index] for index in starts}) > 1:
            raise ValueError(
                f"timestep {timestep} can be any of the entries {starts} in its dtype: pass entries of timesteps, or call "
                "set_begin_index"
            )
        return starts[0]

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The state as the network sees it (B, *): itself, unless the table begins with an analytic step, which only scales.

        timestep: as in `step`, which follows; without one the run begins at its first."""
        walk = self._walk_now() if timestep is None else self._walk_at(timestep)
        if not walk.begins or len(walk.leading) == 1:
            return sample
        self._scaled = sample * walk.leading[-1]
        return self._scaled

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take the model's output (B, C or 2 C, *) at `sample` (B, C, *) and give the next input of the model, in its dtype.

        timestep: an entry of `timesteps`, or its value. The first one of a run decides where it begins, unless `set_begin_index`
        did; ValueError for any other than the next after it.
        """
        walk = self._walk_at(timestep)
        x = self._state(walk, sample)
        value = without_variance(model_output, sample.shape[1]).to(x.dtype)
        following = walk.take(x, value, lambda: randn_tensor(x.shape, generator, x.device, x.dtype)).to(sample.dtype)
        self._index += 1
        return SchedulerOutput(following) if return_dict else (following,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma eps, (B, *), at float timesteps (B,) or (1,)."""
        t = self.parametrisation.time(timesteps.to(original_samples.device, torch.float32))
        alpha, sigma = self.parametrisation.schedule.alpha(t), self.parametrisation.schedule.sigma(t)
        x_t = expand(alpha, original_samples) * original_samples + expand(sigma, noise) * noise
        return x_t.to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name that flow pipelines call."""
        return self.add_noise(sample, noise, timestep)

    # ---- the run ----

    def _build(self, steps: int | None, sigmas: Any, mu: float | None, timesteps: Any) -> Table:
        if self._learned is not None:
            own, asked = len(self._learned.grid) - 1, number_of_steps(steps, sigmas, timesteps)
            if asked != own:
                name = self._learned.solver
                raise ValueError(f"the learned table '{name}' has {own} steps, not {asked}: it belongs to their number")
            return self._learned
        grid = grid_of(self.parametrisation, self.config, steps, sigmas, mu, timesteps)
        if grid not in self._tables:
            self._tables[grid] = self._solve_on(grid, self.config["analytic_first"])
        return self._tables[grid]

    def _solve_on(self, grid: Grid, analytic_first: bool) -> Table:
        return table_on(self.parametrisation, self.config, grid, analytic_first)

    def _node_of(self, index: int) -> int | None:
        """The grid's node at which a run begins that evaluates entry `index` of `timesteps` first.

        None inside a step of a solver, and for all but the first of a learned table.
        """
        assert self.table is not None
        evaluated = [i for i, row in enumerate(self.table.rows) if row.time is not None]
        if index == 0:
            return 0
        if self._learned is not None or not 0 < index < len(evaluated) or evaluated[index] not in self.table.nodes:
            return None
        return self.table.nodes.index(evaluated[index])

    def _no_start(self, index: int) -> ValueError:
        count = len(self._list_now().values)
        starts = ", ".join(str(i) for i in range(count) if self._node_of(i) is not None)
        return ValueError(
            f"cannot begin at evaluation {index} of {count}: a learned table begins at its first, a solver where a step begins; "
            f"begin at {starts}, or take a solver of the registry with one evaluation a step"
        )

    def _begin(self, index: int) -> None:
        """Begin a run at this entry of `timesteps`. ValueError where none can."""
        self._list_now()
        node = self._node_of(index)
        if node is None:
            raise self._no_start(index)
        assert self.table is not None
        table = self._solve_on(self.table.grid[node:], analytic_first=False) if index else self.table
        self._walk, self._scaled = TableWalk(table, self.parametrisation), None
        self._index, self._first, self._is_placed = index, index, False

    def _walk_at(self, timestep: Tensor | float) -> TableWalk:
        """The run, at this timestep. One that has not begun begins there, as does another after one that has ended."""
        walk = self._walk
        if walk is None or walk.finished or (walk.begins and not self._is_placed):
            index = self.index_for_timestep(timestep)
            if walk is not None and walk.finished and self._first < index == self._index - 1:
                raise ValueError(f"this run has ended, at timestep {timestep}: call set_timesteps(n) before every run")
            if walk is None or walk.finished or index != self._index:
                self._begin(index)
        elif self._index not in self._list_now().find(timestep):
            following = self._list_now().values[self._index]
            raise ValueError(
                f"timestep {timestep} is out of order: entry {self._index} of timesteps, {following:g}, comes next; "
                "call set_timesteps(n) before every run"
            )
        return self._walk_now()

    def _walk_now(self) -> TableWalk:
        if self._walk is None or self._walk.finished:
            raise ValueError("no evaluation is left in this run: call set_timesteps(n) before every run")
        return self._walk

    def _list_now(self) -> Timesteps:
        if self._list is None:
            raise ValueError("there are no timesteps yet: call set_timesteps(n) before every run")
        if self._levels is not None and self._levels.is_changed:
            raise ValueError(
                "somebody wrote into sigmas, which changes no step: pass them to set_timesteps(sigmas=...)"
            )
        return self._list

    def _state(self, walk: TableWalk, sample: Tensor) -> Tensor:
        """The state that the network has just seen, in float32 or wider."""
        x = sample if sample.dtype == torch.float64 else sample.float()
        if not walk.begins or len(walk.leading) == 1:
            return x
        if self._scaled is None:
            raise ValueError(
                "this pipeline does not call scale_model_input, so the network saw the state before the analytic first step: "
                "set analytic_first=False"
            )
        return walk.start(x / walk.leading[-1] if sample is self._scaled else x)
