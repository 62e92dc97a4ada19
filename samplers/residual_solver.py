"""A learned table with a learned residual as an artefact: one file with both, and what they cost."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from midway.samplers.artefacts import check_tensors, read_record, read_tensors, write_tensors
from midway.samplers.card import SolverCard
from midway.samplers.hub import Shared
from midway.samplers.operations import Costs, flops
from midway.samplers.prediction import Field
from midway.samplers.residual import Residual, ResidualShape, parameter_count, steps
from midway.samplers.rows import NoiseSource
from midway.samplers.schedule import Schedule, fingerprint
from midway.samplers.table import Table

FORMAT = "midway-residual-1"
NAMES = {"table-residual": 3, "table-residual-1x1": 1}
"""Kernel sizes by name."""
BASE = "base."
"""Prefix of the base table's tensors and header."""


def residual_flops(residual: Residual, rows: int) -> int:
    """Of one sample through `rows` corrections."""
    one = torch.zeros(1, *residual.shape.latent)
    return rows * flops(lambda: residual.cpu()(one, one, one, 1.0, 0.5))


@dataclass(frozen=True)
class ResidualTable(Shared):
    """The sampler. ValueError for a card, a base, a residual and a schedule that do not go together."""

    card: SolverCard
    base: Table
    residual: Residual
    schedule: Schedule
    costs: Costs

    def __post_init__(self) -> None:
        card, base = self.card, self.base
        if card.name not in NAMES:
            raise ValueError(f"'{card.name}' is no table with a residual: those are {', '.join(NAMES)}")
        if self.residual.shape.kernel != NAMES[card.name]:
            raise ValueError(
                f"{card.name} has kernels of {NAMES[card.name]}, this residual of {self.residual.shape.kernel}"
            )
        if base.solver != "table" or base.card is None or len(base.rows) != len(base.grid) - 1:
            raise ValueError(f"the base of {card.name} must be a learned table with its card, got '{base.solver}'")
        if (base.nfe, base.card.model_hash, base.schedule) != (card.nfe, card.model_hash, fingerprint(self.schedule)):
            raise ValueError(
                f"the base of {card.name} is a table of another model, budget or schedule: learn both again"
            )
        if not all(bool(value.isfinite().all()) for value in self.residual.state_dict().values()):
            raise ValueError(f"{card.name} has learned numbers that are not finite: learn it again at a lower rate")

    @property
    def grid(self) -> tuple[float, ...]:
        return self.base.grid

    @property
    def nfe(self) -> int:
        """Evaluations of the network: those of the base."""
        return self.base.nfe

    @property
    def table(self) -> None:
        """None: it is no weighted sum."""
        return None

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the card, the base and all learned numbers."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        defaults = {f.name: f.default for f in fields(SolverCard)}
        card = {name: value for name, value in asdict(self.card).items() if value != defaults[name]}
        description = json.dumps([card, self.base.hash, asdict(self.residual.shape)])
        return hashlib.sha256(description.encode() + save(_state(self.residual))).hexdigest()[:12]

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """ValueError unless states have this shape (C, H, W) or (D,)."""
        if tuple(shape) != tuple(self.residual.shape.latent):
            raise ValueError(
                f"{self.card.name} was learned for latents {tuple(self.residual.shape.latent)}, these are {tuple(shape)}: "
                "learn it for this model"
            )

    @torch.no_grad()
    def run(self, field: Field, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """x (B, *) at `grid[0]` -> (B, *) at `grid[-1]`. ValueError for states of another shape and for another schedule."""
        self.check_shape(tuple(x.shape[1:]))
        self.base.check(getattr(field, "schedule", None), None)
        residual = self.residual.to(x.device)
        for step in steps(field, self.base, residual, residual.unit, x, self.schedule):
            x = step.state
        return x

    def save(self, path: Path) -> None:
        """One safetensors file, written beside `path` and renamed."""
        base, header = self.base.packed()
        tensors = {f"{BASE}{name}": value for name, value in base.items()} | _state(self.residual)
        own = {"format": FORMAT, "card": json.dumps(asdict(self.card)), "costs": json.dumps(asdict(self.costs))}
        own |= {"shape": json.dumps({**asdict(self.residual.shape), "latent": list(self.residual.shape.latent)})}
        write_tensors(path, tensors, {**own, "hash": self.hash, **{f"{BASE}{k}": v for k, v in header.items()}})

    @staticmethod
    def load(path: Path, schedule: Schedule) -> "ResidualTable":
        """Read what `save` wrote; ValueError for any other file, also for one without its base, and for another schedule."""
        what, keys = "a table with a residual", ("card", "costs", "shape", f"{BASE}solver", f"{BASE}metadata")
        tensors, header = read_tensors(path, FORMAT, what, keys)
        below = {k.removeprefix(BASE): v for k, v in header.items() if k.startswith(BASE)}
        base = Table.unpacked({k.removeprefix(BASE): v for k, v in tensors.items() if k.startswith(BASE)}, below, path)
        base.check_schedule(schedule)
        residual = Residual(_shape(header["shape"]))
        own = {name: value for name, value in tensors.items() if not name.startswith(BASE)}
        check_tensors(own, {name: (value.dtype, tuple(value.shape)) for name, value in residual.state_dict().items()})
        residual.load_state_dict(own)
        card, costs = (
            read_record(SolverCard, header["card"], "the card"),
            read_record(Costs, header["costs"], "the costs"),
        )
        solver = ResidualTable(card, base, residual.eval().requires_grad_(False), schedule, costs)
        if header.get("hash", solver.hash) != solver.hash:
            raise ValueError(f"the numbers of {path} have hash {solver.hash}, they were saved with {header['hash']}")
        return solver


def _shape(text: str) -> ResidualShape:
    """From JSON; ValueError for anything else."""
    try:
        values = json.loads(text)
        return ResidualShape(**{**values, "latent": tuple(values["latent"])})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the residual's shape is no record of its sizes: {text[:80]}") from error


def _state(residual: Residual) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in residual.state_dict().items()}


def describe(residual: Residual) -> str:
    """Its size in words."""
    return f"{parameter_count(residual):,} parameters, {residual.kernel}x{residual.kernel} kernels"
