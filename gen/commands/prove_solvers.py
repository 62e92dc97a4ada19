"""Measure all solvers on data whose field is known exactly: midway prove

A mixture of Gaussians is fitted to image patches and takes the place of a network, so that what is left is the solver's error.
Writes results.csv, results.jsonl, report.md, report.html and a plot.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path

from midway.gen.core.errors import UsageError, nearest
from midway.gen.core.locks import claimed
from midway.gen.core.text import echo
from midway.gen.flags.cli import names, numbers, resolve
from midway.gen.proving.contest import Contest, ContestConfig, run_contest
from midway.gen.proving.ground import Ground, GroundConfig, make_ground
from midway.gen.proving.learning import NAMES
from midway.gen.proving.model import MixtureModel
from midway.gen.proving.report import LIMITS, Result, check_out, terminal_text, training, write_prove_report
from midway.gen.report.table import ReportContext
from midway.samplers.solvers import ALIASES, SOLVERS

ALL, NONE = "all", "none"
LEARNED = "amed,amed-plugin-ipndm3,amed-plugin-ipndm4,amed-plugin-dpmpp3m,table"

MOST_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class ProveTask(GroundConfig):
    """RMSE, distance to the exact solution and distance to data of solvers, learned ones included, on an exact model."""

    solvers: str = ALL
    """Names of the registry, comma-separated; all: each once, none."""
    learned: str = LEARNED
    """Solvers to learn here: table, table-residual, adasde; amed, amed-plugin-<base>, each also with -predictor; all or none."""
    nfe: str = "3,4,5,6,7,8,9,10"
    """Budgets. A solver that cannot reach one is left out there."""
    n: int = 1024
    """Seeds of a block."""
    blocks: int = 4
    """Blocks of seeds, whose spread is the error bar."""
    first_seed: int = 0
    """The first scored seed; those after the scored ones choose the grids."""
    out: Path = Path("runs/prove")
    """Directory to write; an earlier report of this kind there is replaced."""
    title: str = "Solvers on an exact model"
    """Title of the report."""


def run(task: ProveTask) -> Result:
    """Check, fit, measure, print, write."""
    solvers, learned = chosen(task)
    config = ContestConfig(numbers(task.nfe, "--nfe"), task.n, task.blocks, first_seed=task.first_seed)
    check_out(task.out)
    ground = make_ground(GroundConfig(**{f.name: getattr(task, f.name) for f in fields(GroundConfig)}))
    if task.n <= ground.mixture.dim:
        why = f"a covariance of {ground.mixture.dim} numbers needs more samples than that"
        raise UsageError(f"--n {task.n}", why, f"use {2 * ground.mixture.dim} or more, or fewer --axes")
    echo(ground.description)
    with claimed(task.out):
        result = measure(ground, config, solvers, learned)
        write_prove_report(task.out, result, context(task, ground, config))
    learning = (f"training: {line}" for line in training(result))
    echo(f"\n{terminal_text(result)}", *learning, f"report: {task.out / 'report.html'}")
    return result


def chosen(task: ProveTask) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Solvers of the registry and those to learn; UsageError for unknown names, and for none at all."""
    every = {"solvers": tuple(name for name in SOLVERS if name not in ALIASES), "learned": NAMES}
    found = []
    for flag, known in (("solvers", tuple(SOLVERS)), ("learned", NAMES)):
        text = getattr(task, flag)
        wanted = every[flag] if text == ALL else () if text == NONE else tuple(dict.fromkeys(names(text)))
        for name in wanted:
            if name not in known:
                raise UsageError(
                    f"unknown solver '{name}' of --{flag}", "it is not in the registry", nearest(name, known)
                )
        found.append(wanted)
    if not any(found):
        raise UsageError("no solver is measured", "--solvers and --learned name none", "name one, or all")
    return found[0], found[1]


def measure(ground: Ground, config: ContestConfig, solvers: tuple[str, ...], learned: tuple[str, ...]) -> Result:
    """All cells; a line for each solver as it is done."""
    contest = Contest(MixtureModel(ground.mixture), config)
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    cells = run_contest(contest, solvers, learned, lambda name, count: echo(f"  {name}: {count} budgets"), workers)
    last = config.first_seed + config.n * config.blocks - 1
    return Result(tuple(cells), ground.name, config.n, f"{config.first_seed}-{last}", contest.exact_error)


def context(task: ProveTask, ground: Ground, config: ContestConfig) -> ReportContext:
    """What a reader needs beside the numbers."""
    first = config.first_seed + config.n * config.blocks
    return ReportContext(
        title=task.title,
        model="the exact field of a mixture of Gaussians, schedule edm (sigma 80 to 0.002)",
        data=ground.description,
        seeds=f"{first}-{first + config.choosing - 1}",
        notes=LIMITS,
    )


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    run(resolve(ProveTask, {}, arguments))
