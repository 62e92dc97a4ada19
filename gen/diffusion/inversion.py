"""From images to noise and back: sampling that begins at images, and the noise that gives them.

    image to image    x_t = alpha x0 + sigma eps at a node of the grid, then the solver on the rest of the grid
    inversion         the solver on the reversed grid, from latents at its end to the state at its start, x_T = s noise with
                      s = sqrt(alpha^2 + sigma^2), so that sampling from that noise gives the images again, at the solver's order

A solver on part of a grid begins without history. Solvers that draw noise, and learned ones, whose numbers belong to their grid,
do not invert.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from midway.gen.core.errors import DataError, UsageError, raising
from midway.gen.core.files import read_tensors, reading, state_hash, write_atomically
from midway.gen.diffusion.field import start_state
from midway.gen.diffusion.sampling import Start
from midway.samplers.grids import Grid, reversed_grid
from midway.samplers.jumps import JUMPS
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import SOLVERS, ddim
from midway.samplers.table import Table

FORMAT = "midway-noise-1"


def on_grid(solver: str, schedule: Schedule, grid: Grid, eta: float = 0.0) -> Table:
    """A solver of the registry on this grid, rising or falling, or jumps down it. UsageError for any other, and where it cannot
    run there."""
    if solver in JUMPS:
        if grid[-1] > grid[0]:
            why = "jumps go from noise to data, and their average velocities have no inverse"
            raise UsageError(f"--invert with {solver}", why, "invert by a flow model, with a deterministic solver")
        return JUMPS[solver](schedule, grid)
    if solver not in SOLVERS:
        why = "it has steps of its own, learned for the whole way from noise to data or chosen on the way"
        raise UsageError(f"{solver} on another grid than its own", why, "take a solver of the registry, say dpmpp2m")
    rising = grid[-1] > grid[0]
    if rising and grid[0] == 0 and SOLVERS[solver].to_data:
        grid = grid[1:]  # at sigma = 0 there is no slope, and the step from there changes nothing but scale
    if rising and (eta or SOLVERS[solver].stochastic):
        what = f"--invert with {solver}" + (f" --eta {eta:g}" if eta else "")
        raise UsageError(what, "it draws noise, which has no inverse", "take a deterministic solver, say dpmpp2m")
    with raising(
        UsageError, f"{solver} cannot run from t = {grid[0]:g} to {grid[-1]:g}", "take another solver or grid"
    ):
        return ddim(schedule, grid, eta=eta) if eta else SOLVERS[solver].build(schedule, grid)


def rest_of(sampler: Sampler, solver: str, schedule: Schedule, strength: float, eta: float = 0.0) -> Sampler:
    """The solver on the last steps of `sampler`'s grid: the share of them nearest to `strength`, at least one; 1 is `sampler`.

    UsageError unless 0 < strength <= 1, and for learned solvers below 1.
    """
    if not 0 < strength <= 1:
        raise UsageError(
            f"--strength {strength}", "it is the share of the steps that run, above 0 and up to 1", "say 0.6"
        )
    steps = len(sampler.grid) - 1
    left_out = steps - max(1, round(strength * steps))
    whole = strength == 1 or (left_out == 0 and solver in (*SOLVERS, *JUMPS))
    return sampler if whole else on_grid(solver, schedule, sampler.grid[left_out:], eta)


def from_latents(latents_of: Callable[[Tensor], Tensor], schedule: Schedule, t: float) -> Start:
    """States at time t: `latents_of` seeds (B,), float32 (B, C, h, w), with each seed's own noise."""
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = schedule.alpha(time).item(), schedule.sigma(time).item()
    return lambda seeds, noise: alpha * latents_of(seeds) + sigma * noise


def from_noise(noise: Tensor, schedule: Schedule, t: float) -> Start:
    """States at time t of noise (N, C, h, w) that is given, of which seed s has number s mod N."""
    return lambda seeds, _: start_state(schedule, t, noise[seeds % len(noise)])


def inverse(sampler: Sampler, solver: str, schedule: Schedule, eta: float = 0.0) -> Table:
    """From data at the end of `sampler`'s grid to noise at its start. UsageError for solvers that have no inverse."""
    return on_grid(solver, schedule, reversed_grid(sampler.grid), eta)


def noise_of_state(states: Tensor, schedule: Schedule, t: float) -> Tensor:
    """The inverse of `start_state`."""
    return states / start_state(schedule, t, torch.ones((), dtype=torch.float64)).float()


# ---- files ----


@dataclass(frozen=True)
class SavedNoise:
    """Noise (N, C, h, w) that an inversion found, the classes that it was found with, and by what."""

    noise: Tensor
    labels: Tensor
    about: dict[str, Any]

    @property
    def hash(self) -> str:
        """12 hexadecimal digits."""
        return state_hash("noise", {"noise": self.noise, "labels": self.labels})

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all. DiskError."""
        tensors = {"noise": self.noise.contiguous(), "labels": self.labels.contiguous()}
        write_atomically(path, save(tensors, {"format": FORMAT, "about": json.dumps(self.about)}))

    @staticmethod
    def load(path: Path, latent_shape: tuple[int, ...], classes: int) -> "SavedNoise":
        """DataError for any other file, and for noise of another shape or of classes that the model does not have."""
        fix = "give a file that midway sample --invert has written for this model"
        with reading(path, fix):
            tensors, header = read_tensors(path)
            if header.get("format") != FORMAT or {*tensors} != {"noise", "labels"}:
                raise ValueError("it holds no noise of an inversion")
            found = SavedNoise(tensors["noise"], tensors["labels"], dict(json.loads(header["about"])))
            noise, labels = found.noise, found.labels
            if noise.dtype != torch.float32 or noise.dim() != 4 or not len(noise) or not bool(noise.isfinite().all()):
                raise ValueError(f"its noise is {noise.dtype} {tuple(noise.shape)}, or not finite")
            if labels.dtype != torch.int64 or labels.shape != noise.shape[:1]:
                raise ValueError(f"its labels are {labels.dtype} {tuple(labels.shape)}")
        if tuple(noise.shape[1:]) != tuple(latent_shape):
            what = f"{path} holds noise of shape {tuple(noise.shape[1:])}"
            raise DataError(what, f"this model has latents {tuple(latent_shape)}", fix)
        if bool((labels < 0).any()) or bool((labels > classes).any()):
            raise DataError(f"{path} holds classes up to {int(labels.max())}", f"this model has {classes}", fix)
        return found
