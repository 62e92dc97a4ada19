"""How a prior can be drawn from, checked before the first token is drawn: UsageError with what is possible instead.

causal                              of causal priors, one evaluation a token
random, halton, certain, maskgit    of masked priors, in 1 to L evaluations
random, halton                      of continuous priors, with a sampler of their head: a solver, or a table learned for it
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from midway.gen.core.errors import UsageError, nearest
from midway.gen.core.runs import Run
from midway.gen.diffusion.load import BEST, TABLE, load_solver
from midway.gen.diffusion.samplers import SamplerConfig, build_table
from midway.gen.priors.continuous import HEAD_GRID, HEAD_NFE, HEAD_SOLVER, ContinuousPrior
from midway.gen.priors.decoding import DECAYS, RULES, Decoding, Prompt
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.prior import Prior
from midway.gen.priors.token_head import TokenHead
from midway.samplers.grids import NAMED
from midway.samplers.guidance_checks import why_unguided
from midway.samplers.sampler import Sampler
from midway.samplers.solvers import SOLVERS
from midway.tokenizers.tokenizer import ImageTokenizer

OWN: dict[str, tuple[str, ...]] = {"causal": RULES[:1], "masked": RULES[1:], "continuous": RULES[1:3]}
"""The rules of each kind of prior."""
MASKED = OWN["masked"]
DEFAULT = {"causal": "causal", "masked": "halton", "continuous": "halton"}
"""The rule of each kind of prior where none is named: at one evaluation a token it draws from the prior's own law."""
NOISE = Decoding().choice_noise
BIASED = "maskgit"
"""The rule whose samples are of another law than the model's at every number of evaluations."""


def rules_of(prior: Prior) -> tuple[str, ...]:
    """What it can be drawn by."""
    return OWN[prior.config.kind]


@dataclass(frozen=True)
class DecodingFlags:
    """What flags name of a decoding; "" and None where they name nothing. flags: those of rule, evaluations and decay."""

    rule: str
    steps: int | None
    decay: str
    guidance: float
    options: dict[str, Any]
    """Further fields of Decoding."""
    flags: tuple[str, str, str]
    left: int | None = None
    """Tokens to draw beside those of a prompt; None: all."""


def decoding_for(prior: Prior, given: DecodingFlags, place: str) -> Decoding:
    """How a prior is drawn from; UsageError, with what is possible instead, for a rule or a setting that it cannot have."""
    rule_flag, steps_flag, decay_flag = given.flags
    rule = given.rule or DEFAULT[prior.config.kind]
    _check_rule(prior, rule, rule_flag, place)
    left = given.left or prior.layout.length
    if given.steps is not None:
        _check_steps(prior, given.steps, steps_flag, place, left)
    if given.decay:
        _check_decay(prior, given.decay, decay_flag, place)
    noise = given.options.get("choice_noise", NOISE)
    if noise != NOISE and rule != BIASED:
        what, why = f"--choice-noise {noise:g} with {rule}", "only maskgit keeps tokens by noisy confidences"
        raise UsageError(what, why, "drop --choice-noise")
    if prior.config.kind == "continuous":
        _check_continuous(given.options, place)
    _check_guidance(prior, given.guidance, given.options.get("ramp", 0.0), place)
    decay = {"decay": given.decay} if given.decay else {}
    steps = given.steps or left
    return Decoding(rule, steps, guidance=given.guidance, **given.options, **decay)  # pyright: ignore[reportArgumentType]


def check_solver(name: str, flag: str, place: str) -> None:
    """UsageError for the name of a rule where a model is solved."""
    if name in RULES:
        why = "it is a rule by which codes are drawn from a prior, and this is a latent model"
        raise UsageError(f"{flag} {name} on {place}", why, "use a solver, dpmpp2m or one of docs/solvers.md")


def _check_rule(prior: Prior, rule: str, flag: str, place: str) -> None:
    able = rules_of(prior)
    if rule in able:
        return
    kind, whose = prior.config.kind, "causal" if rule == "causal" else "masked"
    why = f"it is a rule of {whose} priors" if rule in RULES else "it is no rule by which codes are drawn"
    fix = f"drop {flag}: its rule is causal" if kind == "causal" else f"use one of {', '.join(able)}"
    what = "continuous prior" if kind == "continuous" else f"{kind} prior over codes"
    if kind == "continuous" and rule not in RULES:
        fix += "; a solver of its head is --head-solver"
    raise UsageError(f"{flag} {rule} on {place}", f"{why}, and this model is a {what}", fix)


def _check_steps(prior: Prior, steps: int, flag: str, place: str, left: int) -> None:
    given = prior.layout.length - left
    having = f"and its images have {left}" + f" beside the {given} of the prompt" * bool(given)
    if prior.config.kind == "causal" and steps != left:
        why = f"a causal prior takes one evaluation a token, {having}"
        raise UsageError(f"{flag} {steps} on {place}", why, f"drop {flag}; masked priors take any number up to {left}")
    if not 1 <= steps <= left:
        why = f"every evaluation decides at least one token, {having}"
        raise UsageError(f"{flag} {steps} on {place}", why, f"give 1 to {left}")


def _check_continuous(options: dict[str, Any], place: str) -> None:
    plain = Decoding()
    for name in ("top_k", "top_p"):
        if options.get(name, getattr(plain, name)) != getattr(plain, name):
            flag = f"--{name.replace('_', '-')}"
            why = "it is for laws of codes, and this prior is continuous"
            raise UsageError(f"{flag} on {place}", why, f"drop {flag}, or use --temperature")


def _check_decay(prior: Prior, decay: str, flag: str, place: str) -> None:
    if prior.config.kind == "causal":
        raise UsageError(f"{flag} {decay} on {place}", "a causal prior decides one token at a time", f"drop {flag}")
    if decay not in DECAYS:
        why = "of priors it is how the share of missing tokens falls"
        raise UsageError(f"{flag} {decay} on {place}", why, f"choose one of {', '.join(DECAYS)}")


def _check_guidance(prior: Prior, scale: float, ramp: float, place: str) -> None:
    if ramp and scale == 1:
        raise UsageError("--guidance-ramp without --guidance", "at scale 1 nothing is guided", "give --guidance, say 2")
    lacking = why_unguided(prior.classes, len(prior.empty), prior.config.label_dropout)
    if scale != 1 and lacking:
        raise UsageError(f"--guidance {scale:g} on {place}", f"it {lacking}", "drop --guidance")


def draw_warnings(prior: Prior, decodings: Sequence[Decoding], prompt: Prompt | None = None) -> tuple[str, ...]:
    """Of settings that draw something other than one may expect."""
    found = list[str]()
    for how in decodings:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prior.check(how, prompt)
        found += [str(warning.message) for warning in caught]
        if how.temperature == 0 and not caught:
            found.append(
                "at temperature 0 every token is the most probable one: images of a class are nearly all the same"
            )
    return tuple(dict.fromkeys(found))


# ---- the head of a continuous prior ----


@dataclass(frozen=True)
class TrainedHead:
    """The head of a trained prior, in place of a `TrainedModel` where solvers are learned and loaded."""

    model: TokenHead
    prior: TrainedPrior
    tokenizer: ImageTokenizer
    hash: str
    """Of the whole prior."""
    run: Run


def head_of(trained: TrainedPrior) -> TrainedHead:
    """UsageError for a prior over codes."""
    prior = trained.prior
    if not isinstance(prior, ContinuousPrior):
        why = f"it is a {prior.config.kind} prior over codes, which are drawn without a solver"
        raise UsageError(f"a solver for {trained.run.place}", why, "give a continuous prior, or a latent model")
    return TrainedHead(prior.head, trained, trained.tokenizer, trained.hash, trained.run)


@dataclass(frozen=True)
class HeadFlags:
    """What flags name of the sampler of a head; "" and None where they name nothing."""

    solver: str = ""
    nfe: int | None = None
    grid: str = ""

    def settled(self) -> "HeadFlags":
        """With the head's own sampler where nothing is named."""
        return HeadFlags(self.solver or HEAD_SOLVER, self.nfe or HEAD_NFE, self.grid or HEAD_GRID)


def head_for(trained: TrainedPrior, given: HeadFlags, guidance: float) -> Sampler | None:
    """The sampler of a continuous prior's head, None of a prior over codes; errors as of `head_sampler`, and for codes."""
    if not isinstance(trained.prior, ContinuousPrior):
        if given != HeadFlags():
            flag = f"--head-{next(f.name for f in fields(given) if getattr(given, f.name) != f.default)}"
            why = f"only continuous priors have a diffusion head, and this is a {trained.prior.config.kind} prior over codes"
            raise UsageError(f"{flag} on {trained.run.place}", why, f"drop {flag}")
        return None
    found = given.settled()
    return head_sampler(trained, found.solver, found.grid, found.nfe or HEAD_NFE, guidance)


def head_sampler(trained: TrainedPrior, solver: str, grid: str, nfe: int, guidance: float = 1.0) -> Sampler:
    """Of `nfe` evaluations a token: a solver of SOLVERS on a named grid, or the table learned on it, or on any.

    UsageError for names and budgets that do not exist, and a table that was not learned, or at another guidance.
    """
    head = head_of(trained)
    if solver == TABLE:
        return _learned(head, grid, nfe, guidance)
    for flag, name, known in (("--head-solver", solver, [*SOLVERS, TABLE]), ("--head-grid", grid, [*NAMED])):
        if name not in known:
            raise UsageError(f"{flag} {name}", "the head of a continuous prior has no such one", nearest(name, known))
    return build_table(head.model.schedule, solver, nfe, SamplerConfig(), grid)


def _learned(head: TrainedHead, grid: str, nfe: int, guidance: float) -> Sampler:
    found = [load_solver(head, TABLE, name, nfe) for name in dict.fromkeys((grid, BEST, *NAMED))]
    learned = next((each for each in found if each is not None), None)
    again = f"midway train solver table --model {head.run.place} --nfe {nfe} --guidance {guidance:g}"
    if learned is None:
        why = "a learned table belongs to one prior and budget"
        raise UsageError(f"no table at head NFE {nfe} was learned for {head.run.path}", why, again)
    assert learned.card is not None
    if learned.card.guidance != guidance:
        why = f"it was learned at guidance {learned.card.guidance:g}, and this is guidance {guidance:g}"
        raise UsageError(f"the table at head NFE {nfe} of {head.run.path}", why, f"{again} --overwrite")
    return learned
