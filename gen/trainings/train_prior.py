"""Train a prior over a tokenizer's codes: midway train prior digits-causal --tokenizer runs/digits-fsq

It is validated in bits of held-out codes, which are exact for causal priors and bounds for masked ones. With validation, the best
weights are stored in best/ of the run, and other commands load them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from midway.gen.cards.latent import finish_model
from midway.gen.cards.parts import training_rows
from midway.gen.cards.prior import prior_card
from midway.gen.core.config import to_record
from midway.gen.core.errors import UsageError, raising
from midway.gen.core.processes import ProcessInfo
from midway.gen.core.runs import Run
from midway.gen.core.text import echo
from midway.gen.data.images import ImageData, describe, empty_classes
from midway.gen.data.pictures import save_grid
from midway.gen.data.places import images_at, splits_of
from midway.gen.data.splits import DataConfig, Splits
from midway.gen.diffusion.class_draw import ClassDraw, class_draw
from midway.gen.diffusion.load import CPU, load_tokenizer
from midway.gen.evaluation.likelihood import score_of
from midway.gen.evaluation.online import log_online
from midway.gen.features.open import named_extractor
from midway.gen.features.reference import FeatureReference, balanced_subject, make_reference
from midway.gen.flags.arguments import config_of
from midway.gen.flags.cli import Page, resolve
from midway.gen.flags.tasks import PriorTask
from midway.gen.names.nearest import canonical
from midway.gen.priors.decoding import Decoding
from midway.gen.priors.layout import CodeLayout, layout_of
from midway.gen.priors.likelihood import bits_name, code_bits, independent_bits
from midway.gen.priors.load import KIND, TrainedPrior, load_prior, write_prior
from midway.gen.priors.prior import Prior
from midway.gen.priors.registry import make_prior
from midway.gen.priors.rules import DEFAULT
from midway.gen.priors.sampling import CodeSampling, decode_codes, sample_codes
from midway.gen.progress.bar import busy
from midway.gen.progress.finished import unfinished
from midway.gen.recipes.prior_recipes import GENERIC_PRIORS, PRIOR_RECIPES, PRIOR_SIZES, describe_prior
from midway.gen.tokenizer.codes import Codes, all_codes, check_codes, codes_path, encode_codes, open_codes
from midway.gen.tokenizer.stored import Views
from midway.gen.training.accelerator import check_unused, make_accelerator
from midway.gen.training.batches import CodeBatch
from midway.gen.training.fit import fit
from midway.gen.training.interface import FitResult, Hooks, Items, Preview
from midway.gen.trainings.dry_run import IMAGES, rehearse, resident
from midway.gen.trainings.running import built, open_run, with_precision
from midway.gen.trainings.train_latent import planned_tokenizer
from midway.tokenizers.tokenizer import ImageTokenizer

PREVIEW, PREVIEW_STEPS = 60, 16
"""Images, and evaluations of a masked prior for them, or fewer if it has fewer tokens."""
BATCH = 4096
"""Codes that are counted at once."""
PAGE = Page(computed=dict.fromkeys(GENERIC_PRIORS, PRIOR_SIZES))


@dataclass(frozen=True)
class Parts:
    """What is trained, on what; `held_out` codes validate."""

    model: Prior
    items: Items
    validate: Callable[[int], float]
    tokenizer: ImageTokenizer
    data: DataConfig
    images: ImageData
    codes: Codes
    held_out: CodeBatch
    about: str
    """The images in words."""
    draw: ClassDraw | None
    """How seeds draw classes: as often as the images have them."""


def make_parts(task: PriorTask, accelerator: Accelerator) -> Parts:
    """The prior and its codes, which are encoded if they are not there. UsageError for a tokenizer without codes."""
    source = Run.open(task.tokenizer, "tokenizer")
    tokenizer, data = load_tokenizer(task.tokenizer, accelerator.device)[0], images_at(source, task.data_path)
    task.apply_tiles(tokenizer)
    splits = splits_of(source, data)
    images, layout = splits.train, layout_for(task, tokenizer)
    torch.manual_seed(task.train.seed)
    model = make_model(task, layout, images)
    views = Views(mirrored=task.flip)
    path = task.codes or codes_path(source.path, images, tokenizer, views)
    if task.codes is None:
        process = ProcessInfo(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
        encode_codes(path, tokenizer, images, views, process=process)
    codes = open_codes(path, images, tokenizer, task.flip)
    held_out = held_out_codes(task, tokenizer, layout, splits)
    draw = class_draw(None, images, model.classes, model.empty)
    about = "\n".join([describe(images), *unfinished(source)])

    def validate(step: int) -> float:
        return code_bits(model, held_out, task.masks).mean().item()

    return Parts(model, codes.items(layout, task.flip), validate, tokenizer, data, images, codes, held_out, about, draw)


def layout_for(task: PriorTask, tokenizer: ImageTokenizer) -> CodeLayout:
    """How its codes are tokens; UsageError where they cannot be."""
    check_codes(tokenizer)
    with raising(UsageError, f"--model.split {task.model.split}", "change it, or give another --tokenizer"):
        return layout_of(tokenizer, task.model.split)


def make_model(task: PriorTask, layout: CodeLayout, train: ImageData) -> Prior:
    """An untrained prior of these classes; UsageError for sizes that do not fit."""
    classes = len(train.classes), empty_classes(train), train.classes
    with raising(UsageError, "this prior cannot be built", "change the --model flags"):
        return built(lambda: make_prior(task.model, layout, *classes))


def held_out_codes(task: PriorTask, tokenizer: ImageTokenizer, layout: CodeLayout, splits: Splits) -> CodeBatch:
    """Those of --validation-images, unmirrored."""
    subject = balanced_subject(splits.held_out, task.validation_images)
    with busy("encoding held-out images"):
        return CodeBatch(layout.tokens(all_codes(tokenizer, subject.images)), subject.labels)


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
        bits = report(task, run, parts, result, accelerator.device)
        publish(task, run, parts, result, bits)
        run.say(f"saved {run.checkpoint} after {result.steps} steps in {result.seconds:.0f} s")
        return run


def facts(parts: Parts) -> str:
    """A line of the log about the prior."""
    model, layout = parts.model, parts.model.layout
    parameters = sum(p.numel() for p in model.parameters())
    digits = f" of {len(layout.sizes)} digits" if len(layout.sizes) > 1 else ""
    return (
        f"{parameters:,} parameters, {model.config.kind}: {layout.length} tokens{digits}, {layout.bits:.1f} bits an image at "
        "a fixed length"
    )


def report(task: PriorTask, run: Run, parts: Parts, result: FitResult, device: torch.device) -> float:
    """Log the held-out bits of the weights that other commands load, beside codes without a network; the bits."""
    trained, layout = load_prior(run.path, device), parts.model.layout
    with busy("scoring held-out codes"):
        score = score_of(code_bits(trained.prior, parts.held_out, task.masks))
        alone = independent_bits(training_tokens(parts, task.flip), parts.held_out.tokens, layout).mean().item()
    kind = bits_name(trained.prior, task.masks)
    figures = {"held_out_bits": score.bits, "independent_bits": alone, "fixed_length_bits": layout.bits}
    run.log({"step": result.steps, "final": True, **figures, "error": score.error, "n": score.n, "bits": kind})
    selected = "; validation chose the step on held-out images" if result.best is not None else ""
    run.say(
        f"held-out bits per image {score.bits:.2f} ± {score.error:.2f} (n = {score.n}, {kind}; weights {trained.weights}"
        f"{selected}); independent codes {alone:.2f}, fixed length {layout.bits:.2f}"
    )
    return score.bits


def training_tokens(parts: Parts, flip: bool) -> "list[Tensor] | map[Tensor]":
    """Batches (n, L, D) of the training codes, mirrored ones among them with `flip`."""
    count = parts.codes.views.count if flip else 1

    def read(items: Tensor) -> Tensor:
        return parts.codes.tokens(items, parts.model.layout).views[:, :count].flatten(0, 1)

    return map(read, torch.arange(len(parts.codes)).split(BATCH))


def publish(task: PriorTask, run: Run, parts: Parts, result: FitResult, bits: float) -> None:
    """Write the prior as a folder to share, with its tokenizer; the card states how far it is trained. DiskError."""
    if not result.steps:
        return
    trained = load_prior(run.path, CPU)
    weights = training_rows(trained.weights, result.steps, task.train, (), result.finished)
    figures = {"held-out bits per image": bits, "bits at a fixed length": parts.model.layout.bits}
    card = prior_card(trained.prior, trained.tokenizer, parts.data, parts.images, weights, figures, task.license)
    run.say(f"card  {finish_model(run, trained.prior, trained.tokenizer, card) / 'README.md'}")


def dry_run(task: PriorTask) -> None:
    """Two steps on random codes (dry_run.py), of the tokenizer of the run or, if there is none, of the recipe of its name."""
    start, train = resident(), replace(task.train, measure_every=0, validate_every=0, patience_validations=0)
    tokenizer = planned_tokenizer(task.tokenizer)
    accelerator, layout = make_accelerator(train), layout_for(task, tokenizer)
    torch.manual_seed(train.seed)
    names = tuple(str(label) for label in range(task.dry_run_classes))
    with raising(UsageError, "this prior cannot be built", "change the --model flags"):
        model = built(lambda: make_prior(task.model, layout, len(names), (), names))
    generator = torch.Generator().manual_seed(0)
    digits = [torch.randint(size, (IMAGES, layout.length), generator=generator) for size in layout.sizes]
    tokens, labels = torch.stack(digits, -1), torch.arange(IMAGES) % len(names)

    def read(items: Tensor) -> CodeBatch:
        return CodeBatch(tokens[items], labels[items])

    rehearse(model, Items(read, IMAGES), train, accelerator, start)


# ---- samples of a prior in training ----


def make_online_reference(task: PriorTask, device: torch.device) -> FeatureReference | None:
    """The feature network of online evaluation, before anything is trained; errors as named_extractor, and of its budgets."""
    if not task.train.measure_every:
        return None
    source = Run.open(task.tokenizer, "tokenizer")
    tokenizer, data = load_tokenizer(task.tokenizer)[0], images_at(source, task.data_path)
    online_decodings(task, layout_for(task, tokenizer))
    network = named_extractor(task.early.features, data, "the tokenizer")
    network.check_count(task.early.n)
    train = splits_of(source, data).train
    network.check(train.images, "the tokenizer makes")
    reference = make_reference(network.to(device), network.name, train)
    echo(*reference.warnings)
    return reference


def online_decodings(task: PriorTask, layout: CodeLayout) -> dict[int, Decoding]:
    """Those of online evaluation by their evaluations; UsageError for a number that the prior cannot have."""
    kind, length = task.model.kind, layout.length
    default = (length,) if kind == "causal" else tuple(sorted({max(length // 4, 1), length}))
    nfe = task.early.nfe or default
    wrong = [n for n in nfe if n > length or (kind == "causal" and n != length)]
    if wrong:
        able = f"{length}" if kind == "causal" else f"1 to {length}"
        raise UsageError(
            f"--early.nfe {' '.join(map(str, nfe))}", f"a {kind} prior of {length} tokens takes {able}", "change it"
        )
    return {n: Decoding(DEFAULT[kind], n) for n in nfe}  # pyright: ignore[reportArgumentType]


def write_online(run: Run, parts: Parts, step: int, reference: FeatureReference, task: PriorTask) -> dict[str, float]:
    """Online evaluation of the averaged weights, which are in the model; the distances by name, infinite where laws were not
    finite."""
    trained = TrainedPrior(parts.model, parts.tokenizer, parts.data, "", run)
    seeds, found = torch.arange(task.early.n), dict[int, float]()
    for nfe, decoding in online_decodings(task, parts.model.layout).items():
        samples = sample_codes(trained, seeds, CodeSampling(decoding, draw=parts.draw))
        finite = bool(samples.finite.all())
        found[nfe] = reference.distance(decode_codes(trained, samples.tokens)) if finite else float("inf")
    return log_online(run, step, found, reference, task.early.n, {"rule": DEFAULT[task.model.kind]})


def write_preview(run: Run, parts: Parts, step: int, weights: str) -> Preview:
    """Fixed seeds; the file's name contains the weights."""
    trained, kind = TrainedPrior(parts.model, parts.tokenizer, parts.data, "", run), parts.model.config.kind
    length, rule = parts.model.layout.length, DEFAULT[kind]
    steps = length if kind == "causal" else min(length, PREVIEW_STEPS)
    decoding = Decoding(rule, steps)  # pyright: ignore[reportArgumentType]
    images = decode_codes(trained, sample_codes(trained, torch.arange(PREVIEW), CodeSampling(decoding)).tokens)
    path = run.path / "samples" / f"{weights}-{step:06d}-nfe{steps}.png"
    save_grid(path, images, 10, f"step {step:,}: {rule}, NFE {steps}, seeds 0-{PREVIEW - 1}, {weights} weights")
    return Preview(path, "samples")


# ---- the command ----


def read_fitted(arguments: list[str]) -> tuple[PriorTask, *tuple[str, ...]]:
    """`RECIPE | --config FILE` and flags; of a recipe for any images with sizes from the codes, and a line about them."""
    task, (_, words) = resolve(PriorTask, PRIOR_RECIPES, arguments, PAGE), config_of(arguments)
    name = canonical(words[0], GENERIC_PRIORS) if words else None
    if name is None:
        return (task,)
    tokenizer = planned_tokenizer(task.tokenizer) if task.dry_run else load_tokenizer(task.tokenizer)[0]
    layout = layout_for(task, tokenizer)
    task = resolve(PriorTask, {name: lambda: GENERIC_PRIORS[name](layout)}, arguments)
    return task, describe_prior(name, layout, task)


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    train(*read_fitted(arguments))
