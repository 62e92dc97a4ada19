"""Power-function averages of the weights, and averages of other widths made from stored ones after training.

After t optimizer steps the average weighs the weights of time tau in [0, t] with the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    sigma_rel = std of p / t = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))

and follows from shadow <- beta shadow + (1 - beta) value with beta = (1 - 1/t)^(gamma + 1): the weights of step k then count
with exactly the integral of p over [k - 1, k], the initial ones not at all. Its width grows with the run, so one sigma_rel
suits runs of every length. Stored averages p_i of times t_i and exponents g_i approximate an average p by least squares,

    A x + lambda = b,   sum x = 1,   A_ij = <p_i, p_j>,   b_i = <p_i, p>,
    <p_1, p_2> = (g_1 + 1)(g_2 + 1) / ((g_1 + g_2 + 1) t_2) (t_1 / t_2)^g_2    for t_1 <= t_2,

where g_2 is the exponent of the later one. The source has no sum: its networks do not depend on the size of their weights.
Here a combination with the sum 0.98 would shrink the whole network by 2%; with the sum 1, constant weights are exact.
Source: Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from midway.gen.core.errors import DataError, raising
from midway.gen.core.files import DAMAGE, read_tensors, write_atomically
from midway.gen.training.ema import EMA
from midway.tokenizers.weights import check_tensors

FORMAT = "midway-posthoc-1"
WIDEST = 12**-0.5  # gamma = 0: all steps count alike


def gamma_of(std: float) -> float:
    """The exponent gamma >= 0 of relative width `std` (sigma_rel, a fraction of the run). ValueError outside [1e-6, 0.2886].

    The largest real root of gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + 12 - std^-2 = 0 (Karras et al. 2024, appendix C).
    """
    if not 1e-6 <= std <= WIDEST:  # a narrower average needs more than a million steps
        raise ValueError(f"the relative width of an average must be in [1e-6, 0.2886], got {std}; try 0.05 to 0.15")
    inverse = std**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


class PowerAverage(EMA):
    """Averages the floating-point state of `model` with relative width `std`; integer and boolean state is copied."""

    def __init__(self, model: nn.Module, std: float) -> None:
        super().__init__(model, decay=0)  # unused: the rate follows from the step
        self.std, self.gamma = std, gamma_of(std)

    def decay_after(self, step: int) -> float:
        """beta after optimizer step `step` (counted from 0), t = step + 1; 0 at the first, where it becomes `model`."""
        return (1 - 1 / (step + 1)) ** (self.gamma + 1)


@dataclass(frozen=True)
class Snapshot:
    """A stored average: `step` >= 1 optimizer steps done, relative width `std`. ValueError outside these ranges."""

    path: Path
    step: int
    std: float

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"an average has seen at least 1 optimizer step, not {self.step}: store after an update")
        gamma_of(self.std)


def width_name(std: float) -> str:
    """A width in a file's name: three decimals if these are exact, else all."""
    return f"{std:.3f}" if float(f"{std:.3f}") == std else str(std)


def save_snapshot(folder: Path, step: int, std: float, shadow: Mapping[str, Tensor]) -> Path:
    """Store an average of width `std` after `step` optimizer steps (counted from 1) in a file of its own; its path.

    The file appears whole or not at all and replaces one of the same step and width. DiskError if it cannot be written.
    """
    snapshot = Snapshot(folder / f"step-{step}-std-{width_name(std)}.safetensors", step, std)
    header = {"format": FORMAT, "step": str(step), "std": str(std)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in shadow.items()}
    write_atomically(snapshot.path, save(tensors, header))
    return snapshot.path


def find_snapshots(folder: Path) -> list[Snapshot]:
    """All snapshots of `folder`, by step, then by width. DataError if a .safetensors file there is none or is damaged."""
    return sorted(map(_read_header, folder.glob("*.safetensors")), key=lambda snapshot: (snapshot.step, snapshot.std))


def _using(path: Path, why: str = "{}") -> contextlib.AbstractContextManager[None]:
    """Within the block an error of `DAMAGE` becomes a DataError that names the snapshot; `why` holds its text."""
    fix = "move it elsewhere, or copy it again from its run"
    return raising(DataError, f"cannot use the weight average {path}", fix, *DAMAGE, why=why.format)


def _read_header(path: Path) -> Snapshot:
    with _using(path, "the file cannot be read ({})"):
        _, header = read_tensors(path)
    with _using(path):
        if header.get("format") != FORMAT:
            raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
    with _using(path, "its step and width cannot be used ({})"):
        return Snapshot(path, int(header["step"]), float(header["std"]))


def _read_state(path: Path, layout: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The average in a file; its tensors have the names, shapes and types of `layout`."""
    with _using(path, "the file cannot be read ({})"):
        tensors, _ = read_tensors(path)
    with _using(path):
        check_tensors(tensors, tensors if layout is None else layout)
    return tensors


def inner_products(t: Tensor, gamma: Tensor, s: Tensor, delta: Tensor) -> Tensor:
    """<p_i, q_j>, float64 (n, m): profiles p of ends t and exponents gamma (n,), q of ends s and exponents delta (m,)."""
    t, gamma = t[:, None], gamma[:, None]
    later = torch.where(t > s, gamma, delta)  # where both end together the ratio is 1 and either will do
    end = torch.maximum(t, s)
    power = torch.exp(later * torch.log(torch.minimum(t, s) / end))  # at most 1, whatever the exponent
    return (gamma + 1) * (delta + 1) / ((gamma + delta + 1) * end) * power


def weights_of(snapshots: Sequence[tuple[int, float]], step: int, std: float) -> Tensor:
    """The combination of stored averages nearest to the average of width `std` after `step` steps, float64 (n,).

    snapshots: (steps done, std) of each. Least squares over the profiles among weights of sum 1; equal snapshots share their
    weight. ValueError without snapshots, below step 1, and for a width out of range. Source: Karras et al. 2024, appendix C.
    """
    if not snapshots or min(step, *(t for t, _ in snapshots)) < 1:
        raise ValueError(f"cannot combine {len(snapshots)} averages for step {step}: give one or more, of steps >= 1")
    ends = torch.tensor([t for t, _ in snapshots], dtype=torch.float64)
    gammas = torch.tensor([gamma_of(width) for _, width in snapshots], dtype=torch.float64)
    end, gamma = torch.tensor([[step], [gamma_of(std)]], dtype=torch.float64)
    gram = inner_products(ends, gammas, ends, gammas)
    norms = gram.diagonal().sqrt()  # profiles of norm 1 make the system better conditioned
    target = inner_products(ends, gammas, end, gamma) / norms[:, None]
    ones = norms.min() / norms  # the condition sum x = 1 in the scaled unknowns
    system = torch.zeros(len(ends) + 1, len(ends) + 1, dtype=torch.float64)
    system[:-1, :-1] = gram / torch.outer(norms, norms)
    system[-1, :-1] = system[:-1, -1] = ones
    right = torch.cat([target, norms.min().reshape(1, 1)])
    return torch.linalg.lstsq(system, right, driver="gelsd").solution[:-1, 0] / norms


def reconstruct(
    snapshots: Sequence[Snapshot], step: int, std: float, model: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The average of width `std` after `step` optimizer steps (counted from 1), from stored ones, on the CPU.

    Floating-point tensors are combined in float64 and returned in their dtype; others come from the newest snapshot at or
    before `step`. The files are read one at a time. Later snapshots contribute: without them there is no information on the
    steps since the last one. Exact at a stored (step, std), good where `step` has snapshots of widths on both sides of `std`,
    poor between two steps with snapshots. DataError without snapshots, for damaged files and for those of different models, or
    of another than `model`, if its tensors are given;
    ValueError outside [first, last stored step] and for a width out of range. Source: Karras et al. 2024, appendix C.
    """
    if not snapshots:
        raise DataError("no stored weight averages", "nothing to reconstruct from", "train with stored averages first")
    first, last = min(s.step for s in snapshots), max(s.step for s in snapshots)
    if not first <= step <= last:
        raise ValueError(f"stored averages reach from step {first} to {last}: choose a step in between, not {step}")
    weights = weights_of([(s.step, s.std) for s in snapshots], step, std)
    newest = max((s for s in snapshots if s.step <= step), key=lambda s: s.step)
    layout = _read_state(newest.path, model)
    sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in layout.items() if t.is_floating_point()}
    for snapshot, weight in zip(snapshots, weights.tolist(), strict=True):
        state = _read_state(snapshot.path, layout)
        for name, total in sums.items():
            total.add_(state[name].double(), alpha=weight)
    return {name: sums[name].to(t.dtype) if name in sums else t for name, t in layout.items()}
