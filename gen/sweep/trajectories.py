"""How straight and how flat sampling trajectories are: the near-planarity that AMED rests on.

A trajectory is the states x_0 .. x_N (N + 1, D) of one sample at the nodes of a grid, from noise to data, as the solver
holds them: x = alpha x_0 + sigma eps, standardised. Each has a principal component analysis of its own, as in AMED (Zhou et al.
2024, arXiv 2312.00094, section 3.1): its points, all weighing the same, centred at their own mean m, have singular values s_k,

    share_k        = s_k^2 / sum_j s_j^2                    of the variance
    effective rank = exp(-sum_k share_k log share_k)        1 for a line, 2 for a plane filled evenly (Roy & Vetterli 2007,
                                                            with shares of the variance in place of s_k / sum_j s_j)
    deviation      = max_n dist(x_n, line through x_0 and x_N) / |x_N - x_0|        (Chen et al. 2024, arXiv 2405.11326)

Shares depend on the grid, which decides where points are dense, and on the coordinates: were x_0 and eps constant along a
path, alpha x_0 + sigma eps would be in a plane exactly, on a line only where alpha and sigma are (rectified flow, VE). Large
shares alone are weak evidence: a walk of N steps at right angles, which never lies in a plane, has

    share_k = 1 / sin^2(k pi / (2 (N + 1))) / sum_j 1 / sin^2(j pi / (2 (N + 1))),   k = 1 .. N,

so 76 % in two components for many steps. `random_walk` gives them, to be shown beside a model's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from midway.gen.core.errors import DivergedError, UsageError
from midway.gen.diffusion.field import start_state
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.sampling import SamplingConfig, SeededNoise, labels_of, noise_of
from midway.samplers.prediction import JumpField
from midway.samplers.sample import trajectory
from midway.samplers.sampler import Sampler
from midway.samplers.table import Table

COMPONENTS = 6


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over trajectories; 0 for a single one."""

    mean: float
    std: float


@dataclass(frozen=True)
class TrajectoryGeometry:
    """Over S trajectories of N steps. `explained[k - 1]`: share of the variance in the first k components, at most 1.

    `paths` (P, N + 1, 2) float64: the first trajectories, each on its own two components (`own_plane`).
    """

    solver: str
    steps: int
    count: int
    explained: tuple[Spread, ...]
    effective_rank: Spread
    deviation: Spread
    paths: Tensor


def shares(points: Tensor, components: int = COMPONENTS) -> Tensor:
    """Points (*, M, D) -> shares of the variance (*, components) float64, falling; 0 beyond what M points in D can have.

    ValueError where all points are one.
    """
    points = points.double()
    values = torch.linalg.svdvals(points - points.mean(-2, keepdim=True)).square()
    total = values.sum(-1, keepdim=True)
    if (total <= 0).any():
        raise ValueError("a trajectory does not move: its variance is 0, and so has no shares")
    found = (values / total)[..., :components]
    return torch.nn.functional.pad(found, (0, components - found.shape[-1]))


def effective_rank(points: Tensor) -> Tensor:
    """Points (*, M, D) -> (*,) float64 in [1, min(M - 1, D)]."""
    return torch.special.entr(shares(points, min(points.shape[-2:]))).sum(-1).exp()


def deviation(points: Tensor) -> Tensor:
    """Points (*, M, D) -> (*,) float64: the largest distance to the line through both ends over their distance.

    ValueError where the ends are one point.
    """
    points = points.double()
    offsets = points - points[..., :1, :]
    chord = offsets[..., -1:, :]
    length = chord.norm(dim=-1)  # (*, 1)
    if (length <= 0).any():
        raise ValueError("a trajectory ends where it began: there is no line through its ends")
    along = chord / length.unsqueeze(-1)
    across = offsets - (offsets * along).sum(-1, keepdim=True) * along
    return (across.norm(dim=-1) / length).amax(-1)


def random_walk(steps: int, components: int = COMPONENTS) -> Tensor:
    """Shares (components,) float64 of a walk of `steps` equal steps at right angles to one another."""
    k = torch.arange(1, steps + 1, dtype=torch.float64)
    values = (k * torch.pi / (2 * (steps + 1))).sin() ** -2
    found = (values / values.sum())[:components]
    return torch.nn.functional.pad(found, (0, components - len(found)))


def own_plane(points: Tensor) -> Tensor:
    """Points (P, M, D) -> (P, M, 2) float64: each trajectory on its own first two components, centred at its mean.

    Signs are such that the first runs from noise to data and the second bends to where the largest value is.
    """
    points = points.double()
    centred = points - points.mean(1, keepdim=True)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = centred @ directions[:, :2].mT
    plane = torch.nn.functional.pad(plane, (0, 2 - plane.shape[-1]))
    forward = (plane[:, -1:, 0] - plane[:, :1, 0] < 0).squeeze(-1)
    bend = plane[:, :, 1].gather(1, plane[:, :, 1].abs().argmax(1, keepdim=True)).squeeze(-1) < 0
    signs = 1 - 2 * torch.stack([forward, bend], -1).double()
    return plane * signs.unsqueeze(1)


def geometry_of(solver: str, points: Tensor, paths: int = 6) -> TrajectoryGeometry:
    """The geometry of trajectories (S, N + 1, D). ValueError for one that does not move or ends where it began."""
    return TrajectoryGeometry(
        solver=solver,
        steps=points.shape[1] - 1,
        count=len(points),
        explained=tuple(map(_spread, shares(points).cumsum(-1).clamp(max=1).unbind(-1))),
        effective_rank=_spread(effective_rank(points)),
        deviation=_spread(deviation(points)),
        paths=own_plane(points[:paths]),
    )


def _spread(values: Tensor) -> Spread:
    return Spread(values.mean().item(), values.std().item() if len(values) > 1 else 0.0)


@torch.no_grad()
def trajectories(trained: TrainedModel, table: Table, seeds: Tensor, config: SamplingConfig | None = None) -> Tensor:
    """The states at the table's nodes, one trajectory per seed (S,): (S, N + 1, D) in the solver's dtype, on the CPU.

    Of a model that jumps, by a solver at one time, those of its velocity."""
    config, model = config or SamplingConfig(), trained.model
    device = next(model.parameters()).device
    parts = []
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        for some in seeds.split(config.batch_size):
            x = start_state(model.schedule, table.grid[0], noise_of(some, model.latent_shape).to(device))
            field = model.field(labels_of(some, model.classes, model.empty, config.draw).to(device), config.guidance)
            if isinstance(field, JumpField) and not table.ends:
                field = field.velocity
            states = trajectory(field, table, x, SeededNoise(some) if table.stochastic else None)
            parts.append(torch.stack(states, 1).flatten(2).cpu())
    return torch.cat(parts)


def trajectory_geometry(
    trained: TrainedModel, sampler: Sampler, seeds: Tensor, config: SamplingConfig | None = None, paths: int = 6
) -> TrajectoryGeometry:
    """The geometry of the trajectories of `sampler` from seeds (S,); a solver of many steps shows the field's own.

    Holds S x (N + 1) latents. UsageError for a solver that is learned per sample, which is no table; DivergedError for
    states that are not finite.
    """
    table = sampler.table
    if table is None:
        raise UsageError(
            "a solver with steps of its own for each sample",
            "trajectories are of a fixed table of steps",
            "use a solver of the registry, such as heun with many steps, or learned constants",
        )
    points = trajectories(trained, table, seeds, config)
    if not points.isfinite().all():
        raise DivergedError(
            f"trajectories of {table.solver} with {table.nfe} evaluations",
            "some states are not finite",
            "use more evaluations or another grid",
        )
    return geometry_of(table.solver, points, paths)
