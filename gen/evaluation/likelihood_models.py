"""One row of the comparison of models: bits per dimension, distance and cost of samples, whatever kind of model it is."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.gen.baselines.registry import TrainedBaseline
from midway.gen.baselines.vae import VAE
from midway.gen.core.errors import DataError, DivergedError
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
    draw,
    histogram_score,
    iwae_of,
    over_batches,
    score_of,
    uniform_score,
)
from midway.gen.evaluation.sources import SolverSource
from midway.gen.features.reference import FeatureReference
from midway.gen.training.batches import Context
from midway.samplers.sampler import Sampler


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


def baseline_row(name: str, trained: TrainedBaseline, instruments: Instruments) -> LikelihoodRow:
    """One baseline; DataError if its weights were never initialised or it has no likelihood, DivergedError for bad samples."""
    model, subject, bounds = trained.model, instruments.subject, instruments.bounds
    begun = time.perf_counter()
    try:
        score = bits_of(model, subject, bounds)
    except ValueError as error:
        raise DataError(
            f"{name} gives no bits per dimension", str(error), "leave it out, or train it again with --overwrite"
        ) from error
    seconds = time.perf_counter() - begun
    tight = iwae_of(model, subject, bounds, instruments.iwae) if isinstance(model, VAE) and instruments.iwae else None
    try:
        drawn = draw(model, instruments.seeds, bounds.batch_size)
    except ValueError as error:
        raise DivergedError(f"{name} cannot be sampled", str(error), "leave it out, or train it again") from error
    reference = instruments.reference
    return LikelihoodRow(
        name=name,
        kind=model.kind,
        bits=score.bits,
        error=score.error,
        n=score.n,
        levels=model.levels,
        dims=model.dims,
        bound=bound_name(model, bounds.draws),
        seed=bounds.seed,
        images=subject.name,
        iwae_bits=None if tight is None else tight.bits,
        iwae_draws=None if tight is None else instruments.iwae,
        parameters=sum(p.numel() for p in model.parameters()),
        conditional=model.classes > 0,
        weights=trained.weights,
        model=trained.hash,
        seconds=round(seconds, 3),
        sample_nfe=model.sample_nfe,
        sample_seconds=round(1000 * drawn.seconds / len(drawn.images), 3),
        distance=None if reference is None else reference.distance(drawn.images),
        floor=instruments.floor,
        features=None if reference is None else reference.features,
    )


def latent_row(name: str, trained: TrainedModel, instruments: Instruments) -> LikelihoodRow:
    """One latent or pixel model; a pixel model has bits per dimension, by the density of its ODE.

    UsageError for a solver that cannot spend the budget; DivergedError for bad samples.
    """
    sampler = next(iter(make_samplers(trained, instruments.solver, instruments.nfe, instruments.plans).values()))
    source = SolverSource(trained, sampler, instruments.plans.sampling())
    pixels = trained.tokenizer.passes_through
    begun = time.perf_counter()
    score, cost = density_score(trained, instruments) if pixels else (None, None)
    seconds = time.perf_counter() - begun
    raw = source.sample(instruments.seeds)
    if not raw.finite.all():
        raise DivergedError(
            f"{name} cannot be sampled", "its latents are not finite", "use more --nfe, or another --solver"
        )
    begun = time.perf_counter()
    images = source.images(raw)
    sampling = raw.seconds + time.perf_counter() - begun
    reference, subject, model = instruments.reference, instruments.subject, trained.model
    networks = [model] if pixels else [model, trained.tokenizer]
    return LikelihoodRow(
        name=name,
        kind="pixel model" if pixels else "latent model",
        bits=None if score is None else score.bits,
        error=None if score is None else score.error,
        n=len(subject.images),
        levels=instruments.levels,
        dims=subject.images[0].numel(),
        bound="" if cost is None else ode_bound(instruments, cost, subject.images[0].numel()),
        seed=instruments.bounds.seed,
        images=subject.name,
        parameters=sum(p.numel() for network in networks for p in network.parameters()),
        conditional=model.classes > 0,
        weights=trained.weights,
        model=trained.hash,
        seconds=None if score is None else round(seconds, 3),
        sample_nfe=int(raw.nfe),
        sampler=f"{instruments.solver}, {grid_of(sampler, instruments)}",
        sample_seconds=round(1000 * sampling / len(images), 3),
        distance=None if reference is None else reference.distance(images),
        floor=instruments.floor,
        features=None if reference is None else reference.features,
    )


def ode_bound(instruments: Instruments, cost: Cost, dims: int) -> str:
    """What the bits of a pixel model are."""
    ode = instruments.ode
    trace = ode.trace_for(dims)
    probes = f" of {ode.probes} probe(s)" if trace == "hutchinson" else ""
    return f"1 draw of u, {ode.solver} with {cost.evaluations} NFE, {trace} trace{probes}"


def grid_of(sampler: Sampler, instruments: Instruments) -> str:
    """The name of the grid: a learned solver brings its own."""
    return instruments.plans.grids[0] if sampler.card is None else sampler.card.grid_name


def density_score(trained: TrainedModel, instruments: Instruments) -> tuple[Score, Cost]:
    """Bits per dimension of a pixel model, and what the likelihood of an image cost."""
    costs: list[Cost] = []

    def bits(images: Tensor, labels: Tensor, context: Context) -> Tensor:
        found, cost = bits_per_dim(
            trained.model, trained.tokenizer, images, labels, instruments.levels, context, instruments.ode
        )
        costs.append(cost)
        return found

    return score_of(over_batches(instruments.subject, instruments.bounds, bits)), costs[0]


def references(splits: Splits, instruments: Instruments, levels: int) -> list[LikelihoodRow]:
    """What needs no network: every value alone by its histogram in the training images, and all levels alike."""
    subject = instruments.subject
    dims = subject.images[0].numel()

    def row(name: str, score: Score) -> LikelihoodRow:
        return LikelihoodRow(
            name,
            "reference",
            score.bits,
            score.error,
            score.n,
            levels,
            dims,
            "exact",
            instruments.bounds.seed,
            subject.name,
        )

    histogram = row("per-pixel histogram", histogram_score(splits.train.images, subject, levels))
    return [histogram, row("uniform", uniform_score(subject, levels))]
