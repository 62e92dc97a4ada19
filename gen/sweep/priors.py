"""Jobs of priors over codes: each by its rules, at its budgets, beside solvers on one axis of network evaluations.

Their samples are draws, so there is no exact solution to compare them with: a rule that chooses places and then draws (random,
halton, certain) draws from the prior's own law at one evaluation a token, and that row is the limit of the others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from midway.gen.core.errors import DataError
from midway.gen.data.pixels import Images
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.evaluation.other_sources import PriorSource
from midway.gen.evaluation.records import CEILING, PRIOR, Measurement
from midway.gen.evaluation.sources import ModelFacts
from midway.gen.evaluation.spaces import Spaces
from midway.gen.priors.decoding import Decoding
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.rules import BIASED, DecodingFlags, HeadFlags, decoding_for, head_for
from midway.gen.priors.sampling import CodeSampling, decode_codes, encode_codes
from midway.gen.sweep.jobs import Job, SweepConfig
from midway.gen.sweep.run import measure_images
from midway.gen.tokenizer.stored import tokenizer_hash
from midway.gen.training.config import TrainConfig
from midway.tokenizers.tokenizer import ImageTokenizer

MOST = 64
"""Evaluations of a masked prior at most where no budget is named; a longer sequence has no row of its own law then."""


@dataclass(frozen=True)
class PriorPlan:
    """What is measured of priors."""

    rules: tuple[str, ...]
    """Of masked priors; () for the rule of the prior's kind."""
    budgets: tuple[int, ...] | None
    """Of masked priors; None: `budgets_for`."""
    decay: str
    """"" for cosine."""
    options: Mapping[str, Any]
    """Further fields of Decoding."""
    flags: tuple[str, str, str]
    """By which flags rules, budgets and decay were named, for errors."""
    shared: bool = True
    """Whether it is of several priors, so that causal ones, which have one rule and one budget, ignore both."""
    skip: bool = False
    """Leave out budgets that a prior cannot have, instead of raising an error."""
    head: HeadFlags = field(default_factory=HeadFlags)
    """What draws the tokens of continuous priors; codes among them are without it where it is shared."""


def budgets_for(length: int) -> tuple[int, ...]:
    """1, 2, 4, 8, ... up to the number of tokens, which is the last, or to `MOST`."""
    most = min(length, MOST)
    doubling = [2**i for i in range(most.bit_length()) if 2**i <= most]
    return tuple(sorted({*doubling, *([length] if length <= MOST else [])}))


def decodings_of(trained: TrainedPrior, plan: PriorPlan, guidance: float) -> list[Decoding]:
    """Rules by budgets; errors as of `decoding_for`."""
    prior, place = trained.prior, trained.run.place
    length, causal = prior.layout.length, prior.config.kind == "causal"
    rules = plan.rules or ("",)
    budgets: tuple[int | None, ...] = plan.budgets or ((None,) if causal else budgets_for(length))
    decay = plan.decay
    if plan.skip:
        budgets = tuple(s for s in budgets if s is None or (s == length if causal else s <= length))
    if causal and plan.shared:
        rules, budgets, decay = ("",), (None,), ""

    def one(rule: str, steps: int | None) -> Decoding:
        own = {k: v for k, v in plan.options.items() if rule == BIASED or k != "choice_noise"}
        return decoding_for(prior, DecodingFlags(rule, steps, decay, guidance, own, plan.flags), place)

    return list(dict.fromkeys(one(rule, steps) for rule in rules for steps in budgets))


def prior_jobs(
    name: str, trained: TrainedPrior, plan: PriorPlan, config: SweepConfig, draw: ClassDraw | None
) -> list[Job]:
    """A prior by every rule at every budget; errors as of `decoding_for` and `head_for`."""
    prior, facts, continuous = trained.prior, prior_facts(trained), trained.prior.config.kind == "continuous"
    head = head_for(trained, plan.head if continuous or not plan.shared else HeadFlags(), config.guidance)
    own = plan.head.settled()
    by = f", head {own.solver} at NFE {own.nfe} a token" if continuous else ""
    sampling = CodeSampling(Decoding(), config.batch_size, config.precision, draw, head)
    return [
        Job(
            row_name(name, how),
            "" if how.rule == "causal" else how.decay,
            PriorSource(trained, replace(sampling, decoding=how)),
            how.steps or prior.layout.length,
            kind=PRIOR,
            model=facts,
            sampler=how.rule + by,
            classes=prior.classes,
            empty=prior.empty,
            draw=draw,
        )
        for how in decodings_of(trained, plan, config.guidance)
    ]


def row_name(name: str, how: Decoding) -> str:
    """Of a causal prior the name of its run; of a masked one with its rule."""
    return name if how.rule == "causal" else f"{name} {how.rule}"


def prior_facts(trained: TrainedPrior) -> ModelFacts:
    """The name of its run, the images that its training took, and as many passes through the network."""
    images = int(trained.run.checkpoint.name.removeprefix("step-")) * trained.run.part("train", TrainConfig).batch_size
    return ModelFacts(Path(trained.run.place).resolve().name, images, images)


def description_of(trained: TrainedPrior) -> str:
    """The prior in a line."""
    config, layout = trained.prior.config, trained.prior.layout
    size = f"{config.depth}x{config.width}, {layout.length} tokens of {layout.about}"
    tiles = trained.tokenizer.tiles
    tiled = "" if tiles is None else f"; decoded in tiles of {tiles[0]} pixels, margin {tiles[1]}"
    return f"{trained.hash}: {config.kind} prior {size}; weights {trained.weights}{tiled}"


def how_drawn(trained: TrainedPrior, jobs: Sequence[Job]) -> str:
    """Temperature, guidance and other settings of its rows in words."""
    sources = [job.source for job in jobs if isinstance(job.source, PriorSource)]
    how = next(its.sampling.decoding for its in sources if its.trained is trained)
    plain, words = Decoding(), [f"temperature {how.temperature:g}", f"guidance {how.guidance:g}"]
    words += [f"ramp {how.ramp:g}"] * (how.guidance != 1 and how.ramp != 0)
    words += [f"top-k {how.top_k}"] * (how.top_k != plain.top_k) + [f"top-p {how.top_p:g}"] * (how.top_p != plain.top_p)
    own = [its.sampling.decoding for its in sources if its.trained is trained]
    noise = {one.choice_noise for one in own if one.rule == BIASED}
    return ", ".join([*words, *(f"choice noise {value:g} of maskgit" for value in noise)])


def check_prior_images(trained: TrainedPrior, reference: Images) -> None:
    """DataError unless the prior makes images of the shape of a reference (N, C, H, W)."""
    made, shape = tuple(trained.tokenizer.image_shape), tuple(reference.shape[1:])
    if made != shape:
        raise DataError(
            f"{trained.run.place} makes images {made}", f"the reference has {shape}", "measure it on its own data"
        )


# ---- ceilings ----


def through_codes(priors: Mapping[str, TrainedPrior]) -> Callable[[Tensor], Tensor | None]:
    """uint8 images (n, C, H, W) -> what the decoder of the first prior makes of their codes: its ceiling."""
    first = next(iter(priors.values()))
    return lambda images: _reconstructed(first, images)


def _reconstructed(trained: TrainedPrior, images: Images) -> Tensor:
    return decode_codes(trained, encode_codes(trained, images))


def other_ceilings(
    priors: Mapping[str, TrainedPrior], own: ImageTokenizer | None, images: Images, spaces: Spaces
) -> Iterator[tuple[list[str], Measurement]]:
    """Names of the priors of each tokenizer but `own` (None: that of the first), and its ceiling on held-out images."""
    own = own or next((trained.tokenizer for trained in priors.values()), None)
    groups: dict[str, list[str]] = {}
    for name, trained in priors.items():
        groups.setdefault(tokenizer_hash(trained.tokenizer), []).append(name)
    for hash, names in groups.items():
        if own is None or hash != tokenizer_hash(own):
            yield names, measure_images(CEILING, _reconstructed(priors[names[0]], images), spaces)
