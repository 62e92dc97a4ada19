"""Artefacts of runs: tokenizers, latent models (with their tokenizer inside) and learned solvers.

tokenizer run      checkpoints/step-N/tokenizer/           (save_pretrained: config.json and safetensors)
latent model run   checkpoints/step-N/model.json, model.safetensors, ema.safetensors (if averaged), tokenizer/
                   solvers/<name>-<grid>-nfe<k>/           runs of kind `solver` that belong to this model
features run       checkpoints/step-N/features.safetensors
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from midway.gen.core import checkpoints
from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.files import read_tensors, read_text, reading, state_hash
from midway.gen.core.runs import Run
from midway.gen.data.places import data_of
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.loss import differences, evaluations_of
from midway.gen.diffusion.model import LatentModel
from midway.gen.features.extractor import weights_of
from midway.gen.progress.finished import progress_of
from midway.gen.training.config import TrainConfig
from midway.samplers.learned_solver import LEARNED as AMED
from midway.samplers.learned_solver import LearnedSolver, same_schedule
from midway.samplers.residual_solver import NAMES as RESIDUALS
from midway.samplers.residual_solver import ResidualTable
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule, fingerprint
from midway.samplers.table import NOISY, Table
from midway.tokenizers.tokenizer import ImageTokenizer

CPU = torch.device("cpu")
TABLE = "table"
"""The learned solver that is a table: DPM-Solver++(3M) with learned corrections, times and evaluation times."""
BEST = "best"
"""The grid of a learned solver that began on whichever grid was nearest to the teacher."""
LEARNED = (TABLE, *RESIDUALS, NOISY, *AMED)
"""Names of all solvers that can be learned."""


TRAINED_ONLY = "alignment."
"""Weights in a checkpoint that its training alone has."""


@dataclass(frozen=True)
class TrainedModel:
    """A latent model with averaged weights, its tokenizer, and the data it was trained on; in eval mode, frozen."""

    model: LatentModel
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


@dataclass(frozen=True)
class Origin:
    """What a model was made from, by hash, and what that took: images seen in training, and passes of images through networks."""

    init: str = ""
    """The model of its first weights."""
    teacher: str = ""
    """The model whose velocities it learned."""
    pairs: str = ""
    """The pairs of noise and samples that it learned from, in place of images."""
    images: int = 0
    evaluations: int = 0
    aligned: tuple[str, ...] = ()
    """Names of the feature networks that hidden tokens were aligned with, its own or those of what it was made from."""

    def __add__(self, other: "Origin") -> "Origin":
        hashes = self.init or other.init, self.teacher or other.teacher, self.pairs or other.pairs
        aligned = tuple(dict.fromkeys((*self.aligned, *other.aligned)))
        return Origin(*hashes, self.images + other.images, self.evaluations + other.evaluations, aligned)


NOTHING = Origin()


def origin_of(trained: TrainedModel) -> Origin:
    """What a trained model took, with all that it was made from."""
    run = trained.run
    before = recorded_origin(run)
    config, train = trained.model.config, run.part("train", TrainConfig)
    steps = int(run.checkpoint.name.removeprefix("step-"))
    images = steps * train.batch_size
    half = differences(config, steps) if train.precision == "bf16" else 0.0
    passes = evaluations_of(config, bool(before.teacher), half)
    evaluations = before.evaluations + round(images * passes)
    return Origin(images=before.images + images, evaluations=evaluations, aligned=before.aligned)


def recorded_origin(run: Run) -> Origin:
    """What a run says that its model was made from; older runs say nothing."""
    return run.part("origin", Origin) if "origin" in run.config else NOTHING


def check_apart(name: str, aligned: Sequence[str], features: str) -> None:
    """UsageError for the network of these features, if the model `name` was aligned with its weights."""
    if weights_of(features) in map(weights_of, aligned):
        raise UsageError(
            f"{name} cannot be measured by {features}",
            "its hidden tokens were aligned with this network, so that the distance would be what it was trained for",
            "measure it in another feature space with --features, or train with another --align.teacher",
        )


def load_tokenizer(path: Path, device: torch.device = CPU) -> tuple[ImageTokenizer, DataConfig]:
    """The tokenizer of a run, and the data it was trained on."""
    run = Run.open(path, "tokenizer")
    return read_tokenizer(run.checkpoint / "tokenizer", device), data_of(run)


def read_tokenizer(folder: Path, device: torch.device = CPU) -> ImageTokenizer:
    """`from_pretrained`, frozen, with an error that names the fix."""
    with reading(folder, "train the tokenizer again"):
        tokenizer = ImageTokenizer.from_pretrained(folder)
    nn.Module.to(tokenizer, device)  # diffusers' own `to` hides the signature
    return tokenizer.eval().requires_grad_(False)


def write_model(folder: Path, model: LatentModel, tokenizer: ImageTokenizer) -> None:
    """Add the model's configuration and the tokenizer to a checkpoint directory."""
    (folder / "model.json").write_text(model.text)
    tokenizer.write(folder / "tokenizer")


def load_model(path: Path, device: torch.device) -> TrainedModel:
    """The averaged model of a latent-model run, with its tokenizer, on `device`."""
    run = Run.open(path, "latent_model")
    folder = run.checkpoint
    averaged = folder / "ema.safetensors"  # absent if the run kept no average
    tokenizer = read_tokenizer(folder / "tokenizer", device)
    file, retrain = folder / "model.json", "train the model again with --overwrite"
    with reading(folder, retrain):
        text, (state, _) = (
            read_text(file),
            read_tensors(averaged if averaged.exists() else folder / "model.safetensors"),
        )
        state = {name: value for name, value in state.items() if not name.startswith(TRAINED_ONLY)}
        model = LatentModel.built(text, state, file, retrain)
        if model.latent_shape != tokenizer.latent_shape:
            raise ValueError(
                f"model.json is of latents {model.latent_shape}, its tokenizer makes {tokenizer.latent_shape}"
            )
        if not bool(tokenizer.latents_measured):
            raise ValueError("the mean and std of its tokenizer's latents were never measured")
    return TrainedModel(
        model=model.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        data=data_of(run),
        hash=state_hash(text, state),
        run=run,
        weights=f"{which_weights(run, averaged.exists())}, {progress_of(run, folder) or folder.name.replace('-', ' ')}",
    )


@dataclass(frozen=True)
class Posthoc:
    """What midway posthoc-ema writes into config.yaml: the run, the width and the step of an average."""

    source: str
    std: float
    step: int


@dataclass(frozen=True)
class Source:
    """What midway import-model writes into config.yaml: whose names the weights had, their file and its hash."""

    layout: str
    file: str
    sha256: str


def which_weights(run: Run, averaged: bool) -> str:
    """`averaged` by what, or `newest`."""
    if "imported" in run.config:
        return f"imported from {run.part('imported', Source).file}"
    if "posthoc" in run.config:
        return f"averaged post hoc, width {run.part('posthoc', Posthoc).std}"
    return f"averaged, EMA {run.part('train', TrainConfig).ema}" if averaged else "newest"


def solver_path(model: Run | Path, name: str, grid: str, nfe: int) -> Path:
    """The run directory of a learned solver of this model; those of an older checkpoint, `RUN@300`, are in solvers/step-300."""
    run = Run(model, "latent_model") if isinstance(model, Path) else model
    newest = [path.name for path in checkpoints.directories(run.checkpoints)[:1]]
    chosen = run.step is not None and newest != [f"step-{run.step}"]
    root = run.path / "solvers"
    return (root / f"step-{run.step}" if chosen else root) / f"{name}-{grid}-nfe{nfe}"


class SolvedNetwork(Protocol):
    """A latent model, or the head of a continuous prior."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def feature_dim(self) -> int: ...


class Solved(Protocol):
    """What learned solvers belong to."""

    @property
    def model(self) -> SolvedNetwork: ...

    @property
    def hash(self) -> str: ...

    @property
    def run(self) -> Run: ...


def load_solver(trained: Solved, name: str, grid: str, nfe: int) -> Table | LearnedSolver | ResidualTable | None:
    """The learned solver of this model, None when it was not trained.

    DataError for a file whose numbers are of no solver for this model, name, grid and budget, and for other weights.
    """
    path = solver_path(trained.run, name, grid, nfe)
    if not (path / "config.yaml").exists():
        return None
    run = Run.open(path, "solver")
    file = run.checkpoint / "solver.safetensors"
    retrain = (
        f"train it again: midway train solver {name} --model {trained.run.place} --nfe {nfe} --grid {grid} --overwrite"
    )
    with reading(file, retrain):
        schedule = trained.model.schedule
        kind = Table if name in (TABLE, NOISY) else ResidualTable if name in RESIDUALS else LearnedSolver
        solver = kind.load(file, schedule)
        if isinstance(solver, ResidualTable) and (best := checkpoints.directories(run.best)):
            file = checkpoints.verify(best[0]).path / "solver.safetensors"
            solver = replace(
                ResidualTable.load(file, schedule), card=solver.card
            )  # the weights of then, the cost of all
        card = solver.card
        _check_place(solver, trained, (name, grid, nfe))
    if card is None or card.model_hash != trained.hash:
        raise DataError(
            f"{path} was learned for other weights",
            f"model {card.model_hash if card else 'not named'}, this model is {trained.hash}",
            retrain,
        )
    return solver


def _check_place(solver: Sampler, trained: Solved, place: tuple[str, str, int]) -> None:
    """ValueError unless the solver is that of its folder: (name, grid, NFE), and the model's schedule and features."""
    card = solver.card
    if card is None:
        return
    if (card.name, card.grid_name, card.nfe) != place or solver.nfe != card.nfe:
        raise ValueError(
            f"it holds {card.name} on {card.grid_name} at NFE {solver.nfe}, in the place of {' '.join(map(str, place))}"
        )
    if not same_schedule(card.schedule, trained.model.schedule):
        raise ValueError(
            f"its card names schedule {card.schedule}, the model has {fingerprint(trained.model.schedule)}"
        )
    if isinstance(solver, ResidualTable):
        solver.check_shape(trained.model.latent_shape)
    width = trained.model.feature_dim
    if isinstance(solver, LearnedSolver) and solver.rule.feature_dim not in (0, width):
        raise ValueError(f"it reads {solver.rule.feature_dim} features, the model has {width}")
