"""Small sweeps of the pipeline's model, and a look at all that solvers sample in them."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipelines import Pipeline
from torch import Tensor

from midway.gen.commands import evaluate
from midway.gen.commands.evaluate import EvaluateTask
from midway.gen.data.splits import DataConfig
from midway.gen.evaluation.records import LIMITS, Measurement
from midway.gen.evaluation.sources import SampledBatch, SolverSource
from midway.gen.sweep import store
from midway.gen.sweep.run import Sweep
from midway.gen.sweep.tally import Tally


def sweep_task(pipeline: Pipeline, out: Path, **changes: Any) -> EvaluateTask:
    """Two blocks of 20 images by ddim at 4 evaluations, in batches of 8, but for `changes`."""
    base = EvaluateTask(
        model=pipeline.model, features=str(pipeline.features), out=out, solvers="ddim", nfe="4", grids="uniform"
    )
    return replace(base, **{"n": 20, "blocks": 2, "exact_nfe": 8, "choice_seeds": 8, "batch_size": 8, **changes})


def measured(sweep: Sweep) -> list[Measurement]:
    """Without the limits."""
    return [m for m in sweep.measurements if m.solver not in LIMITS]


def images_task(pipeline: Pipeline, out: Path, *images: Path, **changes: Any) -> EvaluateTask:
    """External images against the digits, in two blocks, without a model."""
    base = EvaluateTask(
        features=str(pipeline.features), out=out, images=images, data=DataConfig(), metrics="", blocks=2
    )
    return replace(base, **changes)


def beside_model(pipeline: Pipeline, out: Path, *images: Path, **changes: Any) -> EvaluateTask:
    """External images beside ddim at 4 evaluations."""
    return sweep_task(pipeline, out, **{"images": images, "metrics": "", "exact_nfe": 0, **changes})


def npz(path: Path, images: Any, **more: Any) -> Path:
    """Images as NPZ, which is `path`."""
    np.savez(path, images, **more)
    return path


def watch_samples(patch: pytest.MonkeyPatch, see: Callable[[Tensor, SampledBatch], object]) -> None:
    """Call `see(seeds, batch)` after each sampling by a solver; there are no untimed first ones."""
    real = SolverSource.sample
    patch.setattr(Tally, "warm_up", lambda *_: None)

    def sample(self: SolverSource, seeds: Tensor) -> SampledBatch:
        batch = real(self, seeds)
        see(seeds, batch)
        return batch

    patch.setattr(SolverSource, "sample", sample)


def sweep_in_parts(rank: int, task: EvaluateTask, pause: float = 0.0, gate: Path | None = None) -> None:
    """In a process of its own, in parts of 8, each with a pause or until `gate` exists; stdout goes beside the report."""

    def wait(*_: object) -> None:
        time.sleep(pause)
        while gate is not None and not gate.exists():
            time.sleep(0.01)

    store.PART = 8
    watch_samples(pytest.MonkeyPatch(), wait)
    out = task.out or task.model
    assert out is not None
    with out.with_name(f"{out.name}.{rank}").open("w") as file, contextlib.redirect_stdout(file):
        evaluate.run(task)
