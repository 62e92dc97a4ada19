"""The tables of docs/scaling.md, counted: `python docs/scaling_tables.py` writes them into the page.

Nothing is trained or allocated: networks are built on the device "meta" (tokenizers/memory.py). LPIPS has random weights.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).parents[1]

from midway.gen.diffusion.model import LatentModel  # noqa: E402
from midway.gen.flags.tasks import LatentTask, TokenizerTask  # noqa: E402
from midway.gen.recipes.recipes import LATENT_RECIPES, TOKENIZER_RECIPES  # noqa: E402
from midway.gen.training.accelerator import loss_flops, loss_need  # noqa: E402
from midway.gen.training.batches import LatentBatch  # noqa: E402
from midway.gen.training.config import TrainConfig  # noqa: E402
from midway.gen.training.interface import Items  # noqa: E402
from midway.gen.training.loading import batches_like  # noqa: E402
from midway.gen.training.optim import state_bytes  # noqa: E402
from midway.gen.trainings.dry_run import random_splits  # noqa: E402
from midway.gen.trainings.running import image_parts  # noqa: E402
from midway.gen.trainings.train_latent import planned_tokenizer  # noqa: E402
from midway.gen.trainings.train_tokenizer import make_objective, make_tokenizer  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
IMAGENET, CLASSES = 1_281_167, 1000
GPUS, PEAK, UTILISATION, MEMORY = 8, 989e12, 0.25, 80e9
"""On paper: GPUs, their operations a second in bfloat16, the share of these that is reached, and bytes of memory of one."""
CPU = torch.device("cpu")


def plan_table(names: list[str]) -> list[str]:
    """Of recipes: parameters, memory, operations and hours."""
    heading = ["recipe", "trained parameters", "kept, GiB", "activations of an image, GiB", "images in 80 GB"]
    heading += ["TFLOP an image", f"hours on {GPUS} GPUs, on paper"]
    return markdown(heading, [plan_row(name) for name in names])


def plan_row(name: str) -> list[str]:
    """One recipe, in its precision, with every loss that it has."""
    with TemporaryDirectory() as folder:
        task = TOKENIZER_RECIPES[name]() if name in TOKENIZER_RECIPES else LATENT_RECIPES[name]()
        model, items = tokenizer(task, Path(folder)) if isinstance(task, TokenizerTask) else latent_model(task)
    config: TrainConfig = task.train
    batches, kept = batches_like(items, CPU), state_bytes(model, config)
    need, flops = loss_need(model, batches, config.precision == "bf16"), loss_flops(model, batches)
    seconds = config.steps * config.batch_size * flops / (GPUS * PEAK * UTILISATION)
    return [
        f"`{name}`",
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f} M",
        f"{kept / 2**30:.2f}",
        f"{need.each / 2**30:.3f}",
        f"{need.fits(int(0.9 * MEMORY) - kept)}",
        f"{flops / 1e12:.3f}",
        f"{seconds / 3600:.0f}",
    ]


def tokenizer(task: TokenizerTask, folder: Path) -> tuple[nn.Module, Items]:
    """The objective with random weights of LPIPS, and random images."""
    weights = None
    if task.loss.perceptual:
        weights = folder / "vgg.safetensors"
        save_file(random_vgg(), weights)
    task = replace(task, loss=replace(task.loss, adversary_start=0, perceptual_weights=weights))
    splits = random_splits(task.data, CLASSES)
    objective = make_objective(make_tokenizer(task, splits.train), task)
    return objective, image_parts(objective, splits).items


def random_vgg() -> dict[str, torch.Tensor]:
    """The convolutions of VGG-16 under torchvision's names."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = vgg16().features.state_dict()
    generator = torch.Generator().manual_seed(0)
    return {f"features.{name}": 0.01 * torch.randn(value.shape, generator=generator) for name, value in shapes.items()}


def latent_model(task: LatentTask) -> tuple[nn.Module, Items]:
    """The model in no memory, and latents of its shape."""
    shape = planned_tokenizer(task.tokenizer).latent_shape
    with torch.device("meta"):
        model = LatentModel(task.model, shape, CLASSES)
    raw = torch.zeros(2, *shape)
    return model, Items(lambda items: LatentBatch(raw[items], items), 2)


def disk_table() -> list[str]:
    """Of ImageNet's training images as stored pixels and as latents."""
    rows = [
        [f"{IMAGENET:,} images, uint8, {side}x{side}", gigabytes(IMAGENET * 3 * side**2), "-", "-"]
        for side in (256, 512)
    ]
    for name in ("imagenet256-fsq", "imagenet256-vq", "imagenet256-kl"):
        shape = planned_tokenizer(Path(name)).latent_shape
        numbers = IMAGENET * torch.Size(shape).numel()
        sizes = [gigabytes(2 * views * numbers) for views in (1, 2, 10)]
        rows.append([f"latents {'x'.join(map(str, shape))} of `{name}`, 16 bits", *sizes])
    return markdown(["what", "size", "with mirrored images", "ten crops"], rows)


def gigabytes(size: float) -> str:
    """`252 GB`, from 1000 on in TB."""
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e12:.3g} TB"


def markdown(heading: list[str], rows: list[list[str]]) -> list[str]:
    """A table; numbers are aligned to the right."""
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (heading, rule, *rows)]


def tables() -> Iterator[tuple[str, list[str]]]:
    """Name and lines of every table of the page."""
    yield "disk", disk_table()
    yield "plan", plan_table([name for name in (*TOKENIZER_RECIPES, *LATENT_RECIPES) if name.startswith("imagenet256")])


def embedded(text: str, name: str, lines: list[str]) -> str:
    """`text` with the lines between `<!-- begin name -->` and `<!-- end name -->`."""
    marks = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(f"{marks[0]}.*?{marks[1]}", re.DOTALL)
    assert len(pattern.findall(text)) == 1, f"{PAGE} has no place for the table '{name}'"
    return pattern.sub(lambda _: "\n".join([marks[0], *lines, marks[1]]), text)


if __name__ == "__main__":
    page = PAGE.read_text()
    for table, lines in tables():
        page = embedded(page, table, lines)
    PAGE.write_text(page)
