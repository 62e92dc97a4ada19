"""One row of the comparison of models: bits per dimension, distance and cost of samples, whatever kind of model it is."""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from midway.gen.baselines.registry import TrainedBaseline
from midway.gen.baselines.vae import VAE
from midway.gen.core.errors import DataError, DivergedError
from midway.gen.data.images import to_uint8
from midway.gen.data.pixels import Images
from midway.gen.data.splits import Splits
from midway.gen.diffusion.likelihood import Cost, LikelihoodConfig, bits_per_dim
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.evaluation.likelihood import (
    Bounds,
    LikelihoodRow,
    Score,
    bits_of,
    bound_name,
    histogram_score,
    iwae_of,
    over_batches,
    score_of,
    uniform_score,
)
from midway.gen.evaluation.other_sources import BaselineSource, PriorSource
from midway.gen.evaluation.sources import SampledBatch, SampleSource, SolverSource
from midway.gen.features.reference import FeatureReference, Subject
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.likelihood import bits_name, code_bits, independent_bits
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.rules import DecodingFlags, decoding_for
from midway.gen.priors.sampling import CodeSampling, encode_codes
from midway.gen.tokenizer.stored import tokenizer_hash
from midway.gen.training.batches import CodeBatch, Context

Trained = TrainedBaseline | TrainedModel | TrainedPrior
BATCH = 1024
"""Training images whose codes are counted at once."""


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
    ode: LikelihoodConfig
    """How likelihoods of pixel models are integrated."""
    train: Images | None = None
    """uint8 (N, C, H, W): those whose codes have the frequencies of `code_independent`."""
    masks: int | None = None
    """Of the bound of a masked prior; None: one a token, at most 16."""


def source_of(trained: Trained, solver: str, nfe: int, config: SamplerConfig) -> tuple[SampleSource, str]:
    """How a model is sampled; solver and grid of models that need one. UsageError for a solver that cannot spend the budget."""
    if isinstance(trained, TrainedBaseline):
        return BaselineSource(trained, config.batch_size, config.draw), ""
    if isinstance(trained, TrainedPrior):
        how = decoding_for(trained.prior, DecodingFlags("", None, "", 1.0, {}, ("", "", "")), trained.run.place)
        return PriorSource(trained, CodeSampling(how, config.batch_size, draw=config.draw)), how.rule
    sampler = next(iter(make_samplers(trained, solver, nfe, config).values()))
    grid = config.grids[0] if sampler.card is None else sampler.card.grid_name  # a learned solver brings its own
    return SolverSource(trained, sampler, config.sampling()), f"{solver}, {grid}"


def model_row(
    name: str, trained: Trained, source: SampleSource, sampler: str, instruments: Instruments
) -> LikelihoodRow:
    """One model. DataError for a baseline that was never initialised or has no likelihood, DivergedError for bad samples."""
    if isinstance(trained, TrainedPrior):
        return prior_row(name, trained, source, sampler, instruments)
    model, tight = trained.model, None
    kind, networks = _kind(trained)
    begun = time.perf_counter()
    score, bound = _likelihood(name, trained, instruments)
    seconds = round(time.perf_counter() - begun, 3)
    if isinstance(model, VAE) and instruments.iwae:
        tight = iwae_of(model, instruments.subject, instruments.bounds, instruments.iwae).bits
    return replace(
        _sampled(_row(name, kind, score, bound, instruments), source, sampler, instruments),
        iwae_bits=tight,
        iwae_draws=None if tight is None else instruments.iwae,
        parameters=sum(p.numel() for network in networks for p in network.parameters()),
        conditional=model.classes > 0,
        weights=trained.weights,
        model=trained.hash,
        seconds=None if score is None else seconds,
    )


def prior_row(
    name: str, trained: TrainedPrior, source: SampleSource, sampler: str, instruments: Instruments
) -> LikelihoodRow:
    """A prior: no bits of pixels, but those of the codes, of one that has codes. DivergedError for bad samples."""
    prior, subject = trained.prior, instruments.subject
    row = replace(
        _row(name, f"{prior.config.kind} prior", None, "", instruments),
        parameters=sum(p.numel() for network in (prior, trained.tokenizer) for p in network.parameters()),
        conditional=prior.classes > 0,
        weights=trained.weights,
        model=trained.hash,
        tokenizer=tokenizer_hash(trained.tokenizer),
    )
    if isinstance(layout := prior.layout, CodeLayout):
        tokens = encode_codes(trained, subject.images)
        begun = time.perf_counter()
        bits = score_of(
            code_bits(prior, CodeBatch(tokens, subject.labels), instruments.masks, instruments.bounds.batch_size)
        )
        row = replace(
            row,
            code_bits=bits.bits,
            code_error=bits.error,
            code_bound=bits_name(prior, instruments.masks),
            code_fixed=layout.bits,
            code_tokens=layout.length,
            seconds=round(time.perf_counter() - begun, 3),
        )
        if instruments.train is not None:
            train = (encode_codes(trained, part) for part in instruments.train.split(BATCH))
            alone = score_of(independent_bits(train, tokens, layout))
            row = replace(row, code_independent=alone.bits, code_independent_error=alone.error)
    return _sampled(row, source, sampler, instruments)


def _sampled(row: LikelihoodRow, source: SampleSource, sampler: str, instruments: Instruments) -> LikelihoodRow:
    """With the cost and the distance of samples."""
    # what only a first call costs is not timed
    _sample(row.name, source, instruments.seeds[: instruments.bounds.batch_size])
    raw = _sample(row.name, source, instruments.seeds)
    begun, reference = time.perf_counter(), instruments.reference
    images = source.images(raw)
    sampling = raw.seconds + time.perf_counter() - begun
    return replace(
        row,
        sample_nfe=int(raw.nfe),
        sampler=sampler,
        sample_seconds=round(1000 * sampling / len(images), 3),
        distance=None if reference is None else reference.distance(images),
        floor=instruments.floor,
        features=None if reference is None else reference.features,
    )


def _sample(name: str, source: SampleSource, seeds: Tensor) -> SampledBatch:
    """DivergedError unless all samples are finite."""
    what = f"{name} cannot be sampled"
    if isinstance(source, BaselineSource):
        try:
            raw = source.sample(seeds)
            to_uint8(raw.values)  # raises for values that are not finite
        except ValueError as error:
            raise DivergedError(what, str(error), "leave it out, or train it again") from error
        return raw
    raw = source.sample(seeds)
    if not raw.finite.all() and isinstance(source, PriorSource):
        raise DivergedError(what, "its laws are not finite", "leave it out, or train it again")
    if not raw.finite.all():
        raise DivergedError(what, "its latents are not finite", "use more --nfe, or another --solver")
    return raw


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
    subject, seed = instruments.subject, instruments.bounds.seed
    bits, error = (None, None) if score is None else (score.bits, score.error)
    n, dims = len(subject.images), subject.images.shape[1:].numel()
    return LikelihoodRow(name, kind, bits, error, n, instruments.levels, dims, bound, seed, subject.name)


def _kind(trained: TrainedBaseline | TrainedModel) -> tuple[str, list[nn.Module]]:
    """What kind of model it is, and the networks that it consists of."""
    if isinstance(trained, TrainedBaseline):
        return trained.model.kind, [trained.model]
    if trained.tokenizer.passes_through:
        return "pixel model", [trained.model]
    return "latent model", [trained.model, trained.tokenizer]


def _likelihood(
    name: str, trained: TrainedBaseline | TrainedModel, instruments: Instruments
) -> tuple[Score | None, str]:
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
    trace = ode.trace_for(instruments.subject.images.shape[1:].numel())
    probes = f" of {ode.probes} probe(s)" if trace == "hutchinson" else ""
    return score, f"1 draw of u, {ode.solver} with {costs[0].evaluations} NFE, {trace} trace{probes}"
