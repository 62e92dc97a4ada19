"""Any saved solver by its file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from midway.samplers import learned_solver, residual_solver, table
from midway.samplers.artefacts import read_header, read_record
from midway.samplers.card import SolverCard
from midway.samplers.hub import found
from midway.samplers.learned_solver import LearnedSolver
from midway.samplers.residual_solver import ResidualTable
from midway.samplers.schedule import SCHEDULES, Schedule, schedule_of
from midway.samplers.table import Table

FORMATS = {table.FORMAT: Table, learned_solver.FORMAT: LearnedSolver, residual_solver.FORMAT: ResidualTable}
"""Kinds of solvers by the format that their file names."""


class Model(Protocol):
    """What a solver may belong to."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def hash(self) -> str: ...


def load_solver(
    source: str | os.PathLike[str], model: Model | None = None, **hub: Any
) -> Table | LearnedSolver | ResidualTable:
    """The solver of a folder, of a file or of a Hub id (`hub`: revision, token, ...), for `model` or, without one, unchecked.

    ValueError for a file of no solver, for one of another schedule, and for one that was learned for other weights.
    """
    path = found(source, **hub)
    header = read_header(path)
    kind = FORMATS.get(header.get("format", ""))
    if kind is None:
        raise ValueError(f"{path} holds no solver: its format is none of {', '.join(FORMATS)}")
    if kind is Table:
        solver = Table.load(path, None if model is None else model.schedule)
    else:
        solver = kind.load(path, _schedule(header, path) if model is None else model.schedule)
    theirs = solver.card.model_hash if solver.card else None
    if model is not None and theirs not in (None, model.hash):
        raise ValueError(
            f"{path} was learned for model {theirs}, this one is {model.hash}: learn a solver for the model that you sample"
        )
    return solver


def _schedule(header: Mapping[str, str], path: Path) -> Schedule:
    """The schedule that the card in a header names; ValueError for one that is not in the registry."""
    name = read_record(SolverCard, header.get("card", "{}"), "the card").schedule
    schedule = SCHEDULES[name]() if name in SCHEDULES else schedule_of(name)
    if schedule is None:
        raise ValueError(f"{path} is of schedule {name}: give the model that has it")
    return schedule
