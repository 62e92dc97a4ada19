"""Train a prior over a tokenizer's codes: midway train prior digits-causal --tokenizer runs/digits-fsq

It is validated in bits of held-out codes, which are exact for causal priors and bounds for masked ones; a continuous prior by its
loss. With validation, the best weights are stored in best/ of the run, and other commands load them.
"""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from midway.gen.cards.latent import finish_model
from midway.gen.cards.parts import training_rows
from midway.gen.cards.prior import prior_card
from midway.gen.core.config import to_record
from midway.gen.core.errors import UsageError, raising
from midway.gen.core.runs import Run
from midway.gen.core.text import echo
from midway.gen.data.pictures import save_grid
from midway.gen.data.places import images_at, splits_of
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.diffusion.load import CPU, load_tokenizer
from midway.gen.evaluation.likelihood import score_of
from midway.gen.evaluation.online import log_online
from midway.gen.features.open import named_extractor
from midway.gen.features.reference import FeatureReference, make_reference
from midway.gen.flags.arguments import config_of
from midway.gen.flags.cli import Page, resolve
from midway.gen.flags.tasks import PriorTask
from midway.gen.names.nearest import canonical
from midway.gen.priors.decoding import Decoding, Rule
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.likelihood import bits_name
from midway.gen.priors.load import KIND, TrainedPrior, load_prior, write_prior
from midway.gen.priors.registry import make_prior
from midway.gen.priors.rules import DEFAULT
from midway.gen.priors.sampling import CodeSampling, decode_codes, sample_codes
from midway.gen.progress.bar import busy
from midway.gen.recipes.prior_recipes import GENERIC_PRIORS, PRIOR_RECIPES, PRIOR_SIZES, describe_prior
from midway.gen.training.accelerator import check_unused, make_accelerator
from midway.gen.training.fit import fit
from midway.gen.training.interface import FitResult, Hooks, Preview
from midway.gen.trainings.dry_run import IMAGES, rehearse, resident
from midway.gen.trainings.prior_parts import LatentData, Parts, layout_of_task, make_parts, random_items
from midway.gen.trainings.running import built, open_run, with_precision
from midway.gen.trainings.train_latent import planned_tokenizer

PREVIEW, PREVIEW_STEPS = 60, 16
"""Images, and evaluations of a masked prior for them, or fewer if it has fewer tokens."""
PAGE = Page(computed=dict.fromkeys(GENERIC_PRIORS, PRIOR_SIZES))


def train(task: PriorTask, *lines: str) -> Run | None:
    """Train, score held-out codes, save, with `lines` in the log. The run on the main process, None on the others."""
    check_unused(task.train, validates=True, measures=True)
    task, precision = with_precision(task, "transformer", task.model.width)
    if task.dry_run:
        return dry_run(task)
    accelerator = make_accelerator(task.train, task.out)
    reference = make_online_reference(task, accelerator.device)
    parts = make_parts(task, accelerator)  # before the run, so that an invalid configuration leaves no directory
    model, weights = parts.model, task.train.weights_name
    config = {**to_record(task), "data": to_record(parts.data)}
    with open_run(task, task.out, KIND, config, accelerator, parts.about, facts(parts), *lines, *precision) as run:
        hooks = Hooks(
            preview=lambda step: write_preview(run, parts, step, weights),
            export=lambda folder, _: write_prior(folder, model, parts.tokenizer),
            validate=parts.validate,
            measure=None if reference is None else lambda step: write_online(run, parts, step, reference, task),
        )
        result = fit(model, parts.items, task.train, run, accelerator, hooks, task.resume == "auto")
        if not accelerator.is_main_process:
            return None
        figures = report(run, parts, result, accelerator.device)
        publish(task, run, parts, result, figures)
        run.say(f"saved {run.checkpoint} after {result.steps} steps in {result.seconds:.0f} s")
        return run


def facts(parts: Parts) -> str:
    """A line of the log about the prior."""
    model, layout = parts.model, parts.model.layout
    parameters = sum(p.numel() for p in model.parameters())
    fixed = f", {layout.bits:.1f} bits an image at a fixed length" if isinstance(layout, CodeLayout) else ""
    return f"{parameters:,} parameters, {model.config.kind}: {layout.about}{fixed}"


def report(run: Run, parts: Parts, result: FitResult, device: torch.device) -> dict[str, float]:
    """Log what held-out images score by the weights that other commands load; the figures by name."""
    trained, stored = load_prior(run.path, device), parts.stored
    selected = "; validation chose the step on held-out images" if result.best is not None else ""
    if isinstance(stored, LatentData):
        loss = stored.score(trained.prior)
        run.log({"step": result.steps, "final": True, "held_out_loss": loss, "n": len(stored.held_out.labels)})
        run.say(f"held-out loss {loss:.4f} (weights {trained.weights}{selected})")
        return {"held-out loss": loss}
    with busy("scoring held-out codes"):
        score, alone, fixed = score_of(stored.bits(trained.prior)), stored.independent(), stored.layout.bits
    kind = bits_name(trained.prior, stored.masks)
    figures = {"held_out_bits": score.bits, "independent_bits": alone, "fixed_length_bits": fixed}
    run.log({"step": result.steps, "final": True, **figures, "error": score.error, "n": score.n, "bits_are": kind})
    run.say(
        f"held-out bits per image {score.bits:.2f} ± {score.error:.2f} (n = {score.n}, {kind}; weights {trained.weights}"
        f"{selected}); independent codes {alone:.2f}, fixed length {fixed:.2f}"
    )
    return {"held-out bits per image": score.bits, "of independent codes": alone, "at a fixed length": fixed}


def publish(task: PriorTask, run: Run, parts: Parts, result: FitResult, figures: dict[str, float]) -> None:
    """Write the prior as a folder to share, with its tokenizer; the card states how far it is trained. DiskError."""
    if not result.steps:
        return
    trained = load_prior(run.path, CPU)
    weights = training_rows(trained.weights, result.steps, task.train, (), result.finished)
    card = prior_card(trained.prior, trained.tokenizer, parts.data, parts.images, weights, figures, task.license)
    run.say(f"card  {finish_model(run, trained.prior, trained.tokenizer, card) / 'README.md'}")


def dry_run(task: PriorTask) -> None:
    """Two steps on random codes (dry_run.py), of the tokenizer of the run or, if there is none, of the recipe of its name."""
    start, train = resident(), replace(task.train, measure_every=0, validate_every=0, patience_validations=0)
    layout = layout_of_task(task, planned_tokenizer(task.tokenizer))
    accelerator = make_accelerator(train)
    torch.manual_seed(train.seed)
    labels = torch.arange(IMAGES) % task.dry_run_classes
    names = tuple(str(label) for label in range(task.dry_run_classes))
    with raising(UsageError, "this prior cannot be built", "change the --model flags"):
        model = built(lambda: make_prior(task.model, layout, len(names), (), names))
    rehearse(model, random_items(layout, labels), train, accelerator, start)


# ---- samples of a prior in training ----


def make_online_reference(task: PriorTask, device: torch.device) -> FeatureReference | None:
    """The feature network of online evaluation, before anything is trained; errors as named_extractor, and of its budgets."""
    if not task.train.measure_every:
        return None
    source = Run.open(task.tokenizer, "tokenizer")
    tokenizer, data = load_tokenizer(task.tokenizer)[0], images_at(source, task.data_path)
    online_decodings(task, layout_of_task(task, tokenizer).length)
    network = named_extractor(task.early.features, data, "the tokenizer")
    network.check_count(task.early.n)
    train = splits_of(source, data).train
    network.check(train.images, "the tokenizer makes")
    reference = make_reference(network.to(device), network.name, train)
    echo(*reference.warnings)
    return reference


def online_decodings(task: PriorTask, length: int) -> dict[int, Decoding]:
    """Those of online evaluation by their evaluations; UsageError for a number that the prior cannot have."""
    kind = task.model.kind
    default = (length,) if kind == "causal" else tuple(sorted({max(length // 4, 1), length}))
    nfe = task.early.nfe or default
    if any(n > length or (kind == "causal" and n != length) for n in nfe):
        able = f"{length}" if kind == "causal" else f"1 to {length}"
        what = f"--early.nfe {' '.join(map(str, nfe))}"
        raise UsageError(what, f"a {kind} prior of {length} tokens takes {able}", "change it")
    return {n: Decoding(rule_of(kind), n) for n in nfe}


def rule_of(kind: str) -> Rule:
    """By which priors in training are drawn from: it draws from their own law at one evaluation a token."""
    return cast(Rule, DEFAULT.get(kind, "halton"))


def write_online(run: Run, parts: Parts, step: int, reference: FeatureReference, task: PriorTask) -> dict[str, float]:
    """Online evaluation of the averaged weights, which are in the model; the distances by name, infinite where samples are not
    finite."""
    trained = TrainedPrior(parts.model, parts.tokenizer, parts.data, "", run)
    seeds, found = torch.arange(task.early.n), dict[int, float]()
    for nfe, decoding in online_decodings(task, parts.model.layout.length).items():
        images = draw_images(trained, seeds, decoding, parts.draw)
        found[nfe] = float("inf") if images is None else reference.distance(images)
    return log_online(run, step, found, reference, task.early.n, {"rule": rule_of(task.model.kind)})


def write_preview(run: Run, parts: Parts, step: int, weights: str) -> Preview | None:
    """Fixed seeds; the file's name contains the weights. One log line instead if they are not finite."""
    trained = TrainedPrior(parts.model, parts.tokenizer, parts.data, "", run)
    kind, length = parts.model.config.kind, parts.model.layout.length
    rule, steps = rule_of(kind), length if kind == "causal" else min(length, PREVIEW_STEPS)
    images = draw_images(trained, torch.arange(PREVIEW), Decoding(rule, steps))
    if images is None:
        run.say(f"no samples of step {step}: they are not finite")
        return None
    path = run.path / "samples" / f"{weights}-{step:06d}-nfe{steps}.png"
    save_grid(path, images, 10, f"step {step:,}: {rule}, NFE {steps}, seeds 0-{PREVIEW - 1}, {weights} weights")
    return Preview(path, "samples")


def draw_images(trained: TrainedPrior, seeds: Tensor, how: Decoding, draw: ClassDraw | None = None) -> Tensor | None:
    """uint8 images (N, C, H, W) of seeds (N,), on the CPU; None unless all are finite."""
    samples = sample_codes(trained, seeds, CodeSampling(how, draw=draw))
    return decode_codes(trained, samples.tokens) if samples.finite.all() else None


# ---- the command ----


def read_fitted(arguments: list[str]) -> tuple[PriorTask, *tuple[str, ...]]:
    """`RECIPE | --config FILE` and flags; of a recipe for any images with sizes from the codes, and a line about them."""
    task, (_, words) = resolve(PriorTask, PRIOR_RECIPES, arguments, PAGE), config_of(arguments)
    name = canonical(words[0], GENERIC_PRIORS) if words else None
    if name is None:
        return (task,)
    tokenizer = planned_tokenizer(task.tokenizer) if task.dry_run else load_tokenizer(task.tokenizer)[0]
    layout = layout_of_task(task, tokenizer)
    task = resolve(PriorTask, {name: lambda: GENERIC_PRIORS[name](layout)}, arguments)
    return task, describe_prior(name, layout, task)


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    train(*read_fitted(arguments))
