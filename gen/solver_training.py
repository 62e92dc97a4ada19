"""The objective that distils a solver for a trained model; fit() runs it like any other model.

loss = sum over steps of log(error of the step): every step's relative improvement counts the same, although the errors of
early and late steps differ by orders of magnitude.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from midway.gen.latent_model import LatentModel, start_state
from midway.gen.training import Context
from midway.samplers.amed import AMEDConfig, Constants, Predictor
from midway.samplers.distill import TeacherNodes, step_errors, teacher_nodes
from midway.samplers.grids import GRIDS, RHO_MAX, RHO_MIN, Grid
from midway.samplers.sample import EvaluationCounter
from midway.samplers.solvers import SOLVERS, steps_for
from midway.samplers.table import Table


@dataclass(frozen=True)
class DistillConfig:
    """How a solver is distilled."""

    nfe: int = 6
    grid: str = "karras"
    teacher: str = "heun"
    extra: int = 3
    """Teacher nodes between each pair of the student's."""
    analytic_first: bool = False
    guidance: float = 1.0
    rho_max: float = RHO_MAX
    rho_min: float = RHO_MIN
    amed: AMEDConfig = field(default_factory=AMEDConfig)


@dataclass(frozen=True)
class NoiseBatch:
    """Labels (B,) of trajectories to start; the noise comes from the context."""

    labels: Tensor


class SolverObjective(nn.Module):
    """Trains `rule` (constants or a predictor); the model stays frozen and is kept out of the parameters."""

    def __init__(self, model: LatentModel, config: DistillConfig, constants: bool) -> None:
        super().__init__()
        self.config = config
        steps = steps_for(2, config.nfe, config.analytic_first)
        make = GRIDS[config.grid]
        schedule = model.schedule
        self.grid: Grid = make(schedule, steps, config.rho_max, config.rho_min)
        fine = make(schedule, steps * (config.extra + 1), config.rho_max, config.rho_min)
        self.teacher: Table = SOLVERS[config.teacher].build(schedule, fine)
        self.feature_dim = model.config.dit.width
        self.rule = Constants(steps, config.amed) if constants else Predictor(self.feature_dim, config.amed)
        self._model = (model,)  # a tuple: not a sub-module, so neither trained nor saved
        self.counter = EvaluationCounter(model.conditional_field)

    def teacher_states(self, labels: Tensor, context: Context) -> TeacherNodes:
        """The teacher's nodes for the noise of this step."""
        model = self._model[0]
        x = start_state(model.schedule, self.grid[0], context.normal("trajectory", model.latent_shape))
        field = model.field(labels, self.config.guidance, self.counter)
        return teacher_nodes(
            field, model.schedule, self.teacher, self.config.extra + 1, x, self.config.analytic_first, self.feature_dim
        )

    def loss(self, batch: NoiseBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of log errors; logs the geometric mean error and, per step, the root of the error."""
        model = self._model[0]
        teacher = self.teacher_states(batch.labels, context)
        field = model.field(batch.labels.repeat(len(self.grid) - 1), self.config.guidance, self.counter)
        errors = step_errors(field, model.schedule, self.grid, self.rule, teacher)
        logs = {f"rmse_step_{i}": e.detach().sqrt() for i, e in enumerate(errors)}
        return errors.clamp(min=1e-20).log().sum(), logs

    def after_step(self) -> None:
        """Nothing to do between optimizer steps."""
