"""What a prior is trained on: codes, or of continuous priors latents, encoded once, and those of held-out images."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from midway.gen.core.errors import UsageError, raising
from midway.gen.core.processes import ProcessInfo
from midway.gen.core.runs import Run
from midway.gen.data.images import ImageData, describe, empty_classes, to_float
from midway.gen.data.pixels import Images
from midway.gen.data.places import images_at, splits_of
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.class_draw import ClassDraw, class_draw
from midway.gen.diffusion.load import load_tokenizer
from midway.gen.features.reference import Subject, balanced_subject
from midway.gen.flags.tasks import PriorTask
from midway.gen.priors.layout import CodeLayout, LatentLayout, digit_vectors
from midway.gen.priors.likelihood import code_bits, independent_bits
from midway.gen.priors.prior import CodePrior, Prior
from midway.gen.priors.registry import layout_for, make_prior
from midway.gen.progress.bar import busy
from midway.gen.progress.finished import unfinished
from midway.gen.tokenizer.codes import Codes, all_codes, check_codes, codes_path, encode_codes, open_codes
from midway.gen.tokenizer.encoding import Encoding, encode
from midway.gen.tokenizer.latents import Latents, cache_path, open_latents
from midway.gen.tokenizer.statistics import give_statistics
from midway.gen.tokenizer.stored import Views
from midway.gen.training.batches import CodeBatch, Context, LatentBatch
from midway.gen.training.interface import Items
from midway.gen.trainings.running import built
from midway.tokenizers.memory import images_at_once
from midway.tokenizers.tokenizer import ImageTokenizer

BATCH = 4096
"""Codes that are counted at once."""
SCORED = 256
"""Held-out latents that are scored at once."""
SEED = 0
"""Of the noise and masks of held-out latents."""


@dataclass(frozen=True)
class CodeData:
    """Training codes, and held-out ones, unmirrored."""

    codes: Codes
    layout: CodeLayout
    held_out: CodeBatch
    flip: bool
    masks: int | None

    @property
    def items(self) -> Items:
        """For fit()."""
        return self.codes.items(self.layout, self.flip)

    def score(self, prior: Prior) -> float:
        """Bits of a held-out image, on average."""
        return self.bits(prior).mean().item()

    def bits(self, prior: Prior) -> Tensor:
        """float64 (N,), of every held-out image."""
        return code_bits(prior, self.held_out, self.masks)

    def independent(self) -> float:
        """Mean bits of held-out images by the frequencies of the training codes, mirrored ones among them with `flip`."""
        count = self.codes.views.count if self.flip else 1

        def read(items: Tensor) -> Tensor:
            return self.codes.tokens(items, self.layout).views[:, :count].flatten(0, 1)

        train = map(read, torch.arange(len(self.codes)).split(BATCH))
        return independent_bits(train, self.held_out.tokens, self.layout).mean().item()


@dataclass(frozen=True)
class LatentData:
    """Training latents, and held-out ones, unmirrored and standardised."""

    latents: Latents
    held_out: LatentBatch
    flip: bool

    @property
    def items(self) -> Items:
        """For fit()."""
        return self.latents.items(self.flip)

    @torch.no_grad()
    def score(self, prior: Prior) -> float:
        """The loss of held-out images, with the same noise and masks every time."""
        device, total = next(prior.parameters()).device, 0.0
        for places in torch.arange(len(self.held_out.labels)).split(SCORED):
            batch = LatentBatch(self.held_out.latents[places].to(device), self.held_out.labels[places].to(device))
            loss, _ = prior.loss(batch, Context(SEED, 0, places.to(device)))
            total += loss.item() * len(places)
        return total / len(self.held_out.labels)


@dataclass(frozen=True)
class Parts:
    """What is trained, on what."""

    model: Prior
    stored: CodeData | LatentData
    tokenizer: ImageTokenizer
    data: DataConfig
    images: ImageData
    about: str
    """The images in words."""
    draw: ClassDraw | None
    """How seeds draw classes: as often as the images have them."""

    @property
    def items(self) -> Items:
        """For fit()."""
        return self.stored.items

    def validate(self, step: int) -> float:
        """Bits of a held-out image; of a continuous prior its loss."""
        return self.stored.score(self.model)


def make_parts(task: PriorTask, accelerator: Accelerator) -> Parts:
    """The prior and its codes or latents, which are encoded if they are not there. UsageError for a tokenizer without codes."""
    source = Run.open(task.tokenizer, "tokenizer")
    tokenizer, data = load_tokenizer(task.tokenizer, accelerator.device)[0], images_at(source, task.data_path)
    task.apply_tiles(tokenizer)
    splits = splits_of(source, data)
    layout = layout_of_task(task, tokenizer)
    torch.manual_seed(task.train.seed)
    model = make_model(task, layout, splits.train)
    if isinstance(model, CodePrior) and task.model.start == "codes":
        model.start_from(digit_vectors(tokenizer, task.model.split))
    process = ProcessInfo(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    subject = balanced_subject(splits.held_out, task.validation_images)
    if isinstance(layout, CodeLayout):
        stored = code_data(task, source, tokenizer, layout, splits.train, subject, process)
    else:
        stored = latent_data(task, source, tokenizer, splits.train, subject, process)
    about = "\n".join([describe(splits.train), *unfinished(source)])
    draw = class_draw(None, splits.train, model.classes, model.empty)
    return Parts(model, stored, tokenizer, data, splits.train, about, draw)


def layout_of_task(task: PriorTask, tokenizer: ImageTokenizer) -> CodeLayout | LatentLayout:
    """What the prior reads of a tokenizer; UsageError where it has no codes, or they cannot be split so."""
    if task.model.kind != "continuous":
        check_codes(tokenizer)
    with raising(UsageError, f"--model.split {task.model.split}", "change it, or give another --tokenizer"):
        return layout_for(task.model, tokenizer)


def make_model(task: PriorTask, layout: CodeLayout | LatentLayout, train: ImageData) -> Prior:
    """An untrained prior of these classes; UsageError for sizes that do not fit."""
    classes = len(train.classes), empty_classes(train), train.classes
    with raising(UsageError, "this prior cannot be built", "change the --model flags"):
        return built(lambda: make_prior(task.model, layout, *classes))


def code_data(
    task: PriorTask,
    source: Run,
    tokenizer: ImageTokenizer,
    layout: CodeLayout,
    train: ImageData,
    subject: Subject,
    process: ProcessInfo,
) -> CodeData:
    """Encoded, unless --codes names them."""
    views = Views(mirrored=task.flip)
    path = task.codes or codes_path(source.path, train, tokenizer, views)
    if task.codes is None:
        encode_codes(path, tokenizer, train, views, process=process)
    codes = open_codes(path, train, tokenizer, task.flip)
    with busy("encoding held-out images"):
        held_out = CodeBatch(layout.tokens(all_codes(tokenizer, subject.images)), subject.labels)
    return CodeData(codes, layout, held_out, task.flip, task.masks)


def latent_data(
    task: PriorTask,
    source: Run,
    tokenizer: ImageTokenizer,
    train: ImageData,
    subject: Subject,
    process: ProcessInfo,
) -> LatentData:
    """Encoded, unless --codes names them; the tokenizer gets their mean and std."""
    views = Views(mirrored=task.flip)
    path = task.codes or cache_path(source.path, train, tokenizer, views)
    if task.codes is None:
        encode(path, tokenizer, train, Encoding(views), process)
    latents = open_latents(path, train, tokenizer, task.flip)
    give_statistics(tokenizer, latents.mean, latents.std, train.images)
    with busy("encoding held-out images"):
        return LatentData(latents, LatentBatch(all_latents(tokenizer, subject.images), subject.labels), task.flip)


@torch.no_grad()
def all_latents(tokenizer: ImageTokenizer, images: Images) -> Tensor:
    """uint8 images (N, C, H, W) -> standardised latents (N, D, h, w) on the CPU."""
    tokenizer.eval()
    parts = images.split(images_at_once(tokenizer))
    return torch.cat([tokenizer.encode_latents(to_float(part.to(tokenizer.device))).cpu() for part in parts])


def random_items(layout: CodeLayout | LatentLayout, labels: Tensor) -> Items:
    """Random codes or latents for these labels."""
    generator, count = torch.Generator().manual_seed(0), len(labels)
    if isinstance(layout, CodeLayout):
        digits = [torch.randint(size, (count, layout.length), generator=generator) for size in layout.sizes]
        tokens = torch.stack(digits, -1)
        return Items(lambda items: CodeBatch(tokens[items], labels[items]), count)
    latents = layout.latents(torch.randn(count, layout.length, layout.channels, generator=generator))
    return Items(lambda items: LatentBatch(latents[items], labels[items]), count)
