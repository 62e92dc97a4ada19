"""Priors of runs, each with its tokenizer.

prior run          checkpoints/step-N/model.json, model.safetensors, ema.safetensors (if averaged), tokenizer/
                   best/step-N/, the same of the best validation
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from midway.gen.core.files import read_tensors, read_text, reading, state_hash
from midway.gen.core.runs import Run
from midway.gen.data.places import data_of
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.load import CPU, read_tokenizer, which_weights
from midway.gen.priors.registry import Prior, layout_for
from midway.gen.progress.finished import progress_of, selected
from midway.tokenizers.tokenizer import ImageTokenizer

KIND = "prior"


@dataclass(frozen=True)
class TrainedPrior:
    """A prior with averaged weights, its tokenizer, and the data it was trained on; in eval mode, frozen."""

    prior: Prior
    tokenizer: ImageTokenizer
    data: DataConfig
    hash: str
    run: Run
    weights: str = ""
    """Which weights these are, for reports: the average and its width, or the newest, and the optimizer step."""

    @cached_property
    def decoder_hash(self) -> str:
        """12 hexadecimal digits of the tokenizer's weights."""
        return state_hash("decoder", self.tokenizer.state_dict())


def write_prior(folder: Path, prior: Prior, tokenizer: ImageTokenizer) -> None:
    """Add the description of a prior and its tokenizer to a checkpoint directory."""
    (folder / "model.json").write_text(prior.text)
    tokenizer.write(folder / "tokenizer")


def load_prior(path: Path, device: torch.device = CPU) -> TrainedPrior:
    """The averaged prior of a run, the best in validation if it has one, with its tokenizer, on `device`.

    DataError for files that are missing, damaged, or do not go together.
    """
    run = Run.open(path, KIND)
    folder = selected(run)
    averaged = folder / "ema.safetensors"  # absent if the run kept no average
    tokenizer = read_tokenizer(folder / "tokenizer", device)
    file, retrain = folder / "model.json", "train the prior again with --overwrite"
    with reading(folder, retrain):
        weights = averaged if averaged.exists() else folder / "model.safetensors"
        text, (state, _) = read_text(file), read_tensors(weights)
        prior = Prior.built(text, state, file, retrain)
        check_layout(prior, tokenizer)
    return TrainedPrior(
        prior=prior.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        data=data_of(run),
        hash=state_hash(text, state),
        run=run,
        weights=_which(run, folder, averaged.exists()),
    )


def check_layout(prior: Prior, tokenizer: ImageTokenizer) -> None:
    """ValueError unless the prior is one of this tokenizer's codes or latents."""
    own = layout_for(prior.config, tokenizer)
    if own != prior.layout:
        raise ValueError(f"the prior is of {prior.layout.about}, its tokenizer has {own.about}")
    if prior.config.kind == "continuous" and not bool(tokenizer.latents_measured):
        raise ValueError("the mean and std of its tokenizer's latents were never measured")


def _which(run: Run, folder: Path, averaged: bool) -> str:
    """`averaged, EMA 0.999, step 3000, the best in validation`."""
    best = folder.parent == run.best
    progress = None if best else progress_of(run, folder)
    return f"{which_weights(run, averaged)}, {progress or folder.name.replace('-', ' ')}" + (
        ", the best in validation" if best else ""
    )
