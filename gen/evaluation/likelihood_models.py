"""One row of the comparison of models: bits per dimension, distance and cost of samples, whatever kind of model it is."""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from midway.gen.baselines.registry import TrainedBaseline
from midway.gen.baselines.vae import VAE
from midway.gen.core.errors import DataError, DivergedError
from midway.gen.data.images import to_uint8
from midway.gen.data.splits import Splits
from midway.gen.diffusion.likelihood import Cost, LikelihoodConfig, bits_per_dim
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.evaluation.likelihood import (
    Bounds,
    LikelihoodRow,
    Score,
    Subject,
    bits_of,
    bound_name,
    histogram_score,
    iwae_of,
    over_batches,
    score_of,
    uniform_score,
)
from midway.gen.evaluation.sources import BaselineSource, SolverSource
from midway.gen.features.reference import FeatureReference
from midway.gen.training.batches import Context

Trained = TrainedBaseline | TrainedModel


@dataclass(frozen=True)
class Instruments:
    """What all models are measured with; `floor` is what held-out images score."""

    subject: Subject
    bounds: Bounds
    iwae: int
    seeds: torch.Tensor
    reference: FeatureReference | None
    floor: float | None
    levels: int
    """Of the data."""
    plans: SamplerConfig
    """How latent models are sampled, by `solver` at `nfe` evaluations."""
    solver: str
    nfe: int
    ode: LikelihoodConfig
    """How likelihoods of pixel models are integrated."""


@dataclass(frozen=True)
class Samples:
    """Images uint8 (n, C, H, W) on the CPU, seconds of all, evaluations of one; solver and grid of models that need one."""

    images: Tensor
    seconds: float
    nfe: int
    sampler: str = ""


def model_row(name: str, trained: Trained, instruments: Instruments) -> LikelihoodRow:
    """One model. DataError for a baseline that was never initialised or has no likelihood, DivergedError for bad samples.

    UsageError for a solver that cannot spend the budget.
    """
    model, reference, tight = trained.model, instruments.reference, None
    kind, networks = _kind(trained)
    begun = time.perf_counter()
    score, bound = _likelihood(name, trained, instruments)
    seconds = round(time.perf_counter() - begun, 3)
    if isinstance(model, VAE) and instruments.iwae:
        tight = iwae_of(model, instruments.subject, instruments.bounds, instruments.iwae).bits
    samples = (
        _baseline_samples(name, trained, instruments)
        if isinstance(trained, TrainedBaseline)
        else _solver_samples(name, trained, instruments)
    )
    return replace(
        _row(name, kind, score, bound, instruments),
        iwae_bits=tight,
        iwae_draws=None if tight is None else instruments.iwae,
        parameters=sum(p.numel() for network in networks for p in network.parameters()),
        conditional=model.classes > 0,
        weights=trained.weights,
        model=trained.hash,
        seconds=None if score is None else seconds,
        sample_nfe=samples.nfe,
        sampler=samples.sampler,
        sample_seconds=round(1000 * samples.seconds / len(samples.images), 3),
        distance=None if reference is None else reference.distance(samples.images),
        floor=instruments.floor,
        features=None if reference is None else reference.features,
    )


def references(splits: Splits, instruments: Instruments) -> list[LikelihoodRow]:
    """What needs no network: every value alone by its histogram in the training images, and all levels alike."""
    subject, levels = instruments.subject, instruments.levels
    scores = {
        "per-pixel histogram": histogram_score(splits.train.images, subject, levels),
        "uniform": uniform_score(subject, levels),
    }
    return [_row(name, "reference", score, "exact", instruments) for name, score in scores.items()]


def _row(name: str, kind: str, score: Score | None, bound: str, instruments: Instruments) -> LikelihoodRow:
    """A row without a network."""
    subject = instruments.subject
    return LikelihoodRow(
        name,
        kind,
        None if score is None else score.bits,
        None if score is None else score.error,
        len(subject.images),
        instruments.levels,
        subject.images[0].numel(),
        bound,
        instruments.bounds.seed,
        subject.name,
    )


def _kind(trained: Trained) -> tuple[str, list[nn.Module]]:
    """What kind of model it is, and the networks that it consists of."""
    if isinstance(trained, TrainedBaseline):
        return trained.model.kind, [trained.model]
    if trained.tokenizer.passes_through:
        return "pixel model", [trained.model]
    return "latent model", [trained.model, trained.tokenizer]


def _likelihood(name: str, trained: Trained, instruments: Instruments) -> tuple[Score | None, str]:
    """Bits per dimension, of a pixel model by the density of its ODE, and what bounds them; None of a latent model."""
    if isinstance(trained, TrainedModel):
        return density_score(trained, instruments) if trained.tokenizer.passes_through else (None, "")
    model, bounds = trained.model, instruments.bounds
    try:
        return bits_of(model, instruments.subject, bounds), bound_name(model, bounds.draws)
    except ValueError as error:
        raise DataError(
            f"{name} gives no bits per dimension", str(error), "leave it out, or train it again with --overwrite"
        ) from error


def density_score(trained: TrainedModel, instruments: Instruments) -> tuple[Score, str]:
    """Bits per dimension of a pixel model, and what bounds them."""
    ode, costs = instruments.ode, list[Cost]()

    def bits(images: Tensor, labels: Tensor, context: Context) -> Tensor:
        found, cost = bits_per_dim(trained.model, trained.tokenizer, images, labels, instruments.levels, context, ode)
        costs.append(cost)
        return found

    score = score_of(over_batches(instruments.subject, instruments.bounds, bits))
    trace = ode.trace_for(instruments.subject.images[0].numel())
    probes = f" of {ode.probes} probe(s)" if trace == "hutchinson" else ""
    return score, f"1 draw of u, {ode.solver} with {costs[0].evaluations} NFE, {trace} trace{probes}"


def _baseline_samples(name: str, trained: TrainedBaseline, instruments: Instruments) -> Samples:
    try:
        raw = BaselineSource(trained, instruments.bounds.batch_size).sample(instruments.seeds)
        return Samples(to_uint8(raw.values), raw.seconds, trained.model.sample_nfe)
    except ValueError as error:
        raise DivergedError(f"{name} cannot be sampled", str(error), "leave it out, or train it again") from error


def _solver_samples(name: str, trained: TrainedModel, instruments: Instruments) -> Samples:
    plans, solver = instruments.plans, instruments.solver
    sampler = next(iter(make_samplers(trained, solver, instruments.nfe, plans).values()))
    source = SolverSource(trained, sampler, plans.sampling())
    raw = source.sample(instruments.seeds)
    if not raw.finite.all():
        raise DivergedError(
            f"{name} cannot be sampled", "its latents are not finite", "use more --nfe, or another --solver"
        )
    begun = time.perf_counter()
    images = source.images(raw)
    seconds = raw.seconds + time.perf_counter() - begun
    grid = plans.grids[0] if sampler.card is None else sampler.card.grid_name  # a learned solver brings its own
    return Samples(images, seconds, int(raw.nfe), f"{solver}, {grid}")
