"""How to train: the configuration of fit(), the learning rate in closed form, and which settings a resumed run may change."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from midway.gen.core.checkpoints import recorded_run
from midway.gen.core.config import PER_CALL, RECORDED_AS
from midway.gen.core.errors import UsageError
from midway.gen.core.ranges import BATCH, COUNT, EVENTS, SEED, STEPS, WEIGHT, check_ranges
from midway.gen.training.power_ema import WIDEST

Decay = Literal["constant", "cosine", "inverse_sqrt"]
THREADS = 256
"""Most threads that read batches."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `batch_size` is the global batch of one optimizer step, whatever the processes and accumulation."""

    steps: int = 1000
    """Optimizer steps of the whole training."""
    batch_size: int = 128
    """Images of an optimizer step, over all processes and micro-batches."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: torch.optim.Muon on the hidden matrices, its updates scaled to AdamW's size; AdamW on everything else."""
    lr: float = 1e-3
    """Learning rate after the warm-up."""
    warmup: int = 50
    """Optimizer steps of linear warm-up."""
    decay: Decay = "constant"
    """Learning rate after the warm-up: constant, cosine to 0 at `steps`, or inverse_sqrt (see plateau)."""
    plateau: int = 1000
    """inverse_sqrt: the rate is lr sqrt(plateau / step) from this step on."""
    weight_decay: float = 0.0
    """AdamW's, as a multiple of the learning rate."""
    betas: tuple[float, ...] = (0.9, 0.99)
    """Decays of the means that AdamW keeps of gradients and of their squares."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.999
    """Decay of the weight average; 0 keeps the newest weights only."""
    posthoc: tuple[float, ...] = ()
    """Relative widths of power-function averages to track for post-hoc EMA, for example 0.05 0.10."""
    posthoc_every: int = 1000
    """Optimizer steps between snapshots of those averages."""
    accumulation: int = 1
    """Micro-batches of one optimizer step."""
    workers: Literal["auto"] | int = "auto"
    """Threads that read batches ahead (0: the training loop reads them itself). auto: by the cores, the processes and how long a
    batch takes to read. Samples and results are the same with any number."""
    precision: Literal["no", "bf16", "auto"] = "no"
    """bf16 runs the networks under autocast; parameters, noise and x_t stay float32. auto: bf16 for tokenizers and latent
    models where it was measured to be faster and as good (see precision.py); the run records the choice and keeps it."""
    gradient_checkpointing: bool = False
    """Compute the blocks of the network again in the backward pass instead of keeping their activations."""
    compile: bool = False
    """torch.compile the networks (needs a C++ compiler; the first step takes long)."""
    deterministic: bool = False
    """On a GPU, only kernels whose sums have a fixed order: exact resume needs it there. CPUs are so by themselves."""
    patience: int = 10
    """Steps in a row without a finite loss and gradient before the run is reset to its last checkpoint, once."""
    max_seconds: float | None = field(default=None, metadata=PER_CALL)
    """Stop after this much training time of this start, save, and exit normally; --resume auto continues."""
    max_steps: int | None = field(default=None, metadata=PER_CALL)
    """Stop after this many optimizer steps of this start, save, and exit normally; --resume auto continues."""
    save_every: int = 0
    """Optimizer steps between checkpoints (0: only by time and at the end)."""
    save_seconds: float = 600.0
    """Seconds between checkpoints (0: never by time)."""
    keep: int = 2
    """Newest checkpoints to keep."""
    validate_every: int = 0
    """Optimizer steps between validations; there is one after the last step, too (0: none)."""
    patience_validations: int = 0
    """Stop after so many validations in a row without a new best (0: never)."""
    measure_every: int = 0
    """Latent models and priors: optimizer steps between online evaluation, the Fréchet distance at a few budgets (0: none)."""
    log_every: int = 50
    """Optimizer steps between lines of the log."""
    preview_every: int = 0
    """Optimizer steps between preview grids (0: by time, see preview_seconds)."""
    preview_seconds: float = 180.0
    """Seconds between preview grids, or more so that they take at most 2 % of the time and a day makes some 150 (0: none by time;
    there is one at the end)."""
    log_with: tuple[str, ...] = ()
    """Trackers besides metrics.jsonl: tensorboard, wandb, trackio or any other that Accelerate supports."""
    seed: int = 0
    """Seed of everything random: start of the weights, order of the images, noise."""

    @property
    def weights_name(self) -> str:
        """The weights behind a picture or figure, for its caption."""
        return "averaged" if self.ema else "newest"

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "log_every", "plateau", "posthoc_every", "patience", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        least_0 = (
            "steps",
            "warmup",
            "lr",
            "weight_decay",
            "preview_every",
            "save_every",
            "save_seconds",
            "seed",
            "preview_seconds",
        )
        for name in (*least_0, "validate_every", "patience_validations", "measure_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.workers != "auto" and not 0 <= self.workers <= THREADS:
            raise ValueError(f"workers must be auto or 0 to {THREADS}, got {self.workers}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be 1 or more, got {self.max_steps}")
        if self.patience_validations and not self.validate_every:
            raise ValueError(f"patience_validations is {self.patience_validations}: it needs validate_every too")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}; 0 keeps the newest weights")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if len(set(self.posthoc)) != len(self.posthoc):
            raise ValueError(f"posthoc widths must differ, got {self.posthoc}")
        check_ranges(self, batch_size=BATCH, accumulation=BATCH, steps=EVENTS, warmup=EVENTS, keep=COUNT, seed=SEED)
        check_ranges(self, lr=WEIGHT, weight_decay=WEIGHT, clip=WEIGHT, max_seconds=WEIGHT, posthoc=(1e-6, WIDEST))


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimizer step `step` (from 0), in closed form."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.decay == "inverse_sqrt":
        return config.lr * math.sqrt(config.plateau / max(config.plateau, step))
    if config.decay == "constant":
        return config.lr
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


# ---- what a resumed run may change ----

PATHS = (
    "out",
    "tokenizer",
    "latents",
    "codes",
    "init",
    "teacher",
    "align.teacher",
    "reflow.source",
    "reflow.folder",
    "reflow.batch_size",
    "model",
    "data.data",
    "loss.perceptual_weights",
    "tile",
    "tile_margin",
)
"""Their contents are compared by fingerprint."""
EARLIER = ("overwrite", "resume", "train.max_seconds", "train.max_steps", "data.download")
"""Flags of one call, which checkpoints of earlier versions name."""
BUDGETS = ("save_every", "save_seconds", "keep", "patience", "patience_validations")
LOADING = ("workers",)
REPORTS = ("log_every", "preview_every", "preview_seconds", "log_with", "validate_every", "measure_every")
ROUNDING = ("accumulation", "gradient_checkpointing", "compile", "deterministic")
"""The same numbers up to the order of floating-point sums."""


ABSENT = {
    "model.shortcut": "orthogonal",
    "model.dit.time_scale": 1000.0,
    "model.dit.norm": "layer",
    "model.dit.mlp": "gelu",
    "model.dit.positions": "sincos",
    "model.dit.qk_norm": True,
    "model.dit.conditioning": "adaln",
    "model.dit.mixer": "softmax",
    "model.dit.attention_scale": "fixed",
    "model.dit.mup_base_width": 0,
    "model.dit.mup_base_heads": 0,
    "model.objective": "flow",
    "model.time_mode": 1.29,
    "model.time_shift": 1.0,
    "model.weight": "own",
    "model.min_snr_gamma": 5.0,
    "model.scales": 1,
    "model.direction": 0.0,
    "model.start": "random",
    "model.network": "dit",
    "model.inputs": "own",
    "origin.init": "",
    "origin.teacher": "",
    "origin.pairs": "",
    "origin.images": 0,
    "origin.evaluations": 0,
    "origin.aligned": [],
}
"""What a key means where it is missing: in the configuration of a run from before there was such a key."""
LATER = ("model.jump.", "model.unet.", "model.dit.details.", "reflow.", "align.")
"""Groups of keys that runs from before them do not depend on."""


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    pairs: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        pairs |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return pairs


def may_change(key: str, train: TrainConfig) -> bool:
    """Whether a resumed run may have another value of this flat key."""
    return train.decay != "cosine" if key.removeprefix("train.") == "steps" else is_bookkeeping(key)


def is_bookkeeping(key: str) -> bool:
    """Whether a flat key sets paths, budgets or reports, which change the result by rounding at most."""
    last = key.removeprefix("train.")
    return key in (*PATHS, *EARLIER) or key.startswith("early.") or last in (*BUDGETS, *LOADING, *REPORTS, *ROUNDING)


def check_resumable(before: dict[str, Any], now: dict[str, Any], train: TrainConfig) -> list[str]:
    """Compare two flat configurations; UsageError naming every key that makes another run of it.

    Returns the keys whose change leaves the run the same up to rounding.
    """
    before = {key: value for key, value in ABSENT.items() if key in now} | before
    missing = tuple(group for group in LATER if not any(key.startswith(group) for key in before))
    every = [key for key in {**before, **now} if not key.startswith(missing)]
    changed = [key for key in every if before.get(key) != now.get(key)]
    fatal = [key for key in changed if not may_change(key, train)]
    if fatal:
        raise UsageError(
            f"this run was started with another {', '.join(fatal)}",
            "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in fatal),
            "give the old values, or start a new run with another --out",
        )
    return [key for key in changed if key.removeprefix("train.") in ROUNDING]


@dataclass(frozen=True)
class OnlineConfig:
    """Online evaluation, every `--measure-every` steps."""

    nfe: tuple[int, ...] = (5, 10, 20)
    """Network evaluations per image."""
    n: int = 1000
    """Images of each budget, seeds 0 to n - 1."""
    solver: str = ""
    """Solver that samples; by default dpmpp2m, of a model that jumps its own."""
    grid: str = ""
    """Its time grid; by default karras, of a model that jumps uniform."""
    features: str | None = field(default=None, metadata={RECORDED_AS: recorded_run})
    """Feature network, as in midway evaluate (default: effnet-lite0)."""

    def __post_init__(self) -> None:
        if self.n < 2 or not self.nfe or min(self.nfe) < 1:
            raise ValueError(f"online evaluation of n {self.n} at NFE {self.nfe}: use n >= 2 and NFE >= 1")
        check_ranges(self, n=COUNT, nfe=STEPS)
