"""The grid `gits`: fitted to a model's own trajectories (samplers/gits.py), from warm-up noise that no evaluated seed has."""

import torch
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.diffusion.field import Guidance
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.model import start_state
from midway.samplers.gits import FINE_STEPS, cheapest_path, jump_costs
from midway.samplers.grids import Grid, karras

WARM_UP = 64
"""Trajectories that the grid is fitted to."""
_costs: dict[object, tuple[Grid, Tensor]] = {}


def gits_grid(trained: TrainedModel, steps: int, guidance: Guidance, rho_max: float, rho_min: float) -> Grid:
    """The `steps` steps that Euler's method in rho follows best; ValueError for more steps than the fine grid has."""
    key = (trained.hash, guidance, rho_max, rho_min)
    if key not in _costs:
        _costs[key] = _fit(trained, guidance, rho_max, rho_min)
    fine, costs = _costs[key]
    return tuple(fine[i] for i in cheapest_path(costs, steps))


def fitting_nfe() -> int:
    """Evaluations of the field that fitting costs, once per model."""
    return WARM_UP * FINE_STEPS


@torch.no_grad()
def _fit(trained: TrainedModel, guidance: Guidance, rho_max: float, rho_min: float) -> tuple[Grid, Tensor]:
    model = trained.model
    device = next(model.parameters()).device
    order = torch.arange(WARM_UP)
    noise = randomness.normal(0, "gits", 0, order, model.latent_shape).to(device)
    fine = karras(model.schedule, FINE_STEPS, rho_max, rho_min)
    field = model.field((order % max(model.classes, 1)).to(device), guidance)
    return fine, jump_costs(field, model.schedule, start_state(model.schedule, fine[0], noise), fine)
