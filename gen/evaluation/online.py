"""Online evaluation: the Fréchet distance of a model in training at a few small budgets, of the same seeds every time.

Distances of few images compare only at equal counts, so every log line includes the count.
"""

import torch

from midway.gen.core.runs import Run
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.evaluation.sources import SolverSource
from midway.gen.features.reference import FeatureReference
from midway.gen.training.config import OnlineConfig


def online_distances(
    trained: TrainedModel, reference: FeatureReference, config: OnlineConfig, draw: ClassDraw | None = None
) -> dict[int, float]:
    """The distance at every budget, of classes by `draw`; infinite where samples are not finite.

    UsageError for a budget the solver cannot spend.
    """
    plans = SamplerConfig(grids=(config.grid,), draw=draw)
    found = {}
    for nfe in config.nfe:
        table = make_samplers(trained, config.solver, nfe, plans)[config.grid]
        source = SolverSource(trained, table, plans.sampling())
        raw = source.sample(torch.arange(config.n))
        found[nfe] = reference.distance(source.images(raw)) if raw.finite.all() else float("inf")
    return found


def log_online(
    run: Run, step: int, found: dict[int, float], reference: FeatureReference, n: int, by: dict[str, str]
) -> dict[str, float]:
    """One line of metrics.jsonl and one of the log, with all that names the numbers; these by name.

    by: the solver and its grid, or the rule of a prior.
    """
    facts = {"n": n, **by, "seeds": f"0-{n - 1}"}
    values = {f"distance_nfe_{nfe}": value for nfe, value in found.items()}
    run.log({"step": step, "early": True, **values, **facts, "features": reference.features})
    distances = ", ".join(f"NFE {nfe}: {value:.3g}" for nfe, value in found.items())
    run.say(
        f"step {step}: Fréchet distance ({reference.features}, n = {n}, seeds {facts['seeds']}) by "
        f"{' on '.join(by.values())}: {distances}"
    )
    return values
