"""What cards of finished models have in common: tables of facts, the data, the environment, and a folder written at once."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError

from midway.gen.core.environment import environment
from midway.gen.core.errors import DiskError, UsageError, raising
from midway.gen.core.files import clear_temporaries, replacing
from midway.gen.core.runs import Run
from midway.gen.core.text import markdown
from midway.gen.data.images import ImageData
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.model import LatentModel
from midway.gen.priors.prior import Prior
from midway.gen.training.config import TrainConfig
from midway.tokenizers.hub import CARD, header, licence, loading
from midway.tokenizers.tokenizer import ImageTokenizer

Rows = Mapping[str, object]
"""A table of the card: a name and a value a row."""
NOTE = ", for the weights; the licence of the data applies too."


def card(
    title: str, license: str, tags: Sequence[str], sections: Mapping[str, Rows], usage: str, note: str = NOTE
) -> str:
    """A card of named tables. UsageError for a licence that is no identifier."""
    with raising(UsageError, f"--license {license}", "give one such as apache-2.0, mit, cc-by-4.0 or other"):
        first, last = header(license, tags), licence(license, note)
    parts = [first, f"# {title}", *(f"## {name}\n\n{table(rows)}" for name, rows in sections.items() if rows)]
    return "\n\n".join([*parts, loading(usage), last]) + "\n"


def table(rows: Rows) -> str:
    """Two columns of Markdown."""
    lines = [f"| {markdown(key)} | {markdown(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def data_rows(config: DataConfig, train: ImageData, held_out: int | None = None) -> dict[str, object]:
    """What was trained on; `held_out` images were not."""
    left = {} if held_out is None else {"held-out images": held_out}
    return {
        "name": train.name,
        "fingerprint of the training images": train.fingerprint,
        "training images": len(train.images),
        **left,
        "split": f"share {config.held_out:g} held out, seed {config.split_seed}",
    }


def model_rows(model: LatentModel | Prior, tokenizer: ImageTokenizer, own: Rows) -> dict[str, object]:
    """Hash and size of a model with its tokenizer, what only its kind has, images and classes."""
    names = ", ".join(model.class_names)
    return {
        "hash": model.hash,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        **own,
        "images": shape_text(tokenizer.image_shape),
        "tokenizer": ", ".join(f"{key} {value}" for key, value in tokenizer.config["quantizer"].items()),
        "classes": model.classes or "none",
        **({"class names": names} if 0 < len(model.class_names) <= 20 else {}),
    }


def training_rows(
    weights: str, steps: int, config: TrainConfig, losses: Sequence[str] = (), finished: bool = True
) -> Rows:
    """How `weights` (averaged or newest) were trained; `losses` are named with their weights."""
    named = {"losses": ", ".join(losses)} if losses else {}
    return {
        "weights": weights,
        "optimizer steps": steps if finished else f"{steps} of {config.steps}, not finished",
        "effective batch": config.batch_size,
        "seed": config.seed,
        "precision": "float32" if config.precision == "no" else config.precision,
        **named,
    }


def environment_rows() -> Rows:
    """Versions, hardware and the command, without the machine's paths."""
    found = environment()
    return {**found, "packages": ", ".join(f"{name} {version}" for name, version in found["packages"].items())}


def shape_text(shape: tuple[int, ...]) -> str:
    """(C, H, W) in words."""
    return f"{shape[0]} channels, {shape[1]}x{shape[2]}"


def write_folder(run: Run, name: str, write: Callable[[Path], None], text: str) -> Path:
    """run.path/name: what `write` puts there and the card, completely or not at all, in place of an older one; its path.

    DiskError if it cannot be written: then the older one is untouched.
    """
    final = run.path / name
    clear_temporaries(run.path)
    causes = (OSError, SafetensorError, DiskError)
    with (
        raising(DiskError, f"{final} was not written", "free space and run again", *causes),
        replacing(final) as folder,
    ):
        folder.mkdir(exist_ok=True)
        write(folder)
        (folder / CARD).write_text(text, encoding="utf-8")
    return final
