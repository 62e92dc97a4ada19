"""Options of the training scripts: one dataclass each, whose fields are its flags. recipes.py has their presets."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from midway.gen.core.config import PER_CALL
from midway.gen.core.ranges import COUNT, LAYERS, WEIGHT, WIDTH, check_flag_ranges, check_ranges
from midway.gen.data.places import DataPathFlag
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.diffusion.pairs import ReflowConfig
from midway.gen.flags.cli import Flat
from midway.gen.flags.sampling_flags import TileFlags
from midway.gen.networks.adapters import AdapterConfig
from midway.gen.objectives.alignment import AlignConfig
from midway.gen.priors.config import PriorConfig, PriorOnlineConfig
from midway.gen.tokenizer.loss_config import LossConfig
from midway.gen.training.config import ABSENT, OnlineConfig, TrainConfig
from midway.tokenizers.hub import LICENSE

Resume = Literal["no", "auto"]
QuantizerName = Literal[
    "fsq", "vq", "vq_gradient", "simvq", "lfq", "bsq", "residual", "grouped", "two_level", "kl", "identity"
]
QUANTIZER_FIELDS = ("quantizer", "levels", "form", "codebook_size", "dim", "options", "kl_weight")
"""Those of TokenizerConfig that only the quantizer reads."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Size and quantizer of an image tokenizer."""

    quantizer: QuantizerName = "fsq"
    """Kind of quantizer."""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """fsq: levels per channel; their product is the codebook size."""
    form: Literal["tanh", "sigmoid", "ifsq", "fsp"] = "tanh"
    """fsq: the bounding function; fsp also trains with noise of one bin in place of rounding."""
    codebook_size: int = 512
    """vq, vq_gradient, simvq: number of codes."""
    dim: int = 8
    """vq, vq_gradient, simvq, kl: channels of a code; of lfq and bsq, whose channels are bits, log2 of the number of codes."""
    options: str = "{}"
    """More arguments of the quantizer as JSON, {"normalize": true}; residual, grouped and two_level have no others:
    {"base": {"type": "vq", "codebook_size": 256, "dim": 8}, "depth": 4}."""
    kl_weight: float = 1e-4
    """kl: weight of the KL term."""
    width: int = 48
    """Channels of the residual blocks at the lowest resolution."""
    downsample: int = 2
    """Pixels of the image per latent pixel, a power of two."""
    blocks: int = 2
    """Residual blocks of the encoder, and of the decoder."""
    upsample: Literal["pixel_shuffle", "nearest", "bilinear", "transposed"] = "pixel_shuffle"
    """How the decoder doubles the resolution."""
    attention: bool = False
    """Self-attention among the residual blocks at the lowest resolution."""
    multipliers: tuple[int, ...] = (1,)
    """Multiples of width of the residual blocks at each resolution, the finest first; (1,): the lowest resolution only."""
    shortcut: Literal["principal", "orthogonal"] = field(
        default="orthogonal", metadata={"absent": ABSENT["model.shortcut"]}
    )
    """Start of the linear shortcuts of conv: principal components of the first images' patches, or random orthogonal maps."""
    network: Literal["conv", "vit"] = "conv"
    """vit: a transformer; its patches are `downsample` pixels a side, and width is a multiple of heads."""
    depth: int = 4
    """vit: blocks of the encoder, and of the decoder."""
    heads: int = 4
    """vit: attention heads."""
    latent_tokens: int | None = None
    """vit: number of codes of an image, without positions; by default one per patch."""
    latent_space: Literal["pre", "post"] = "pre"
    """Training data of a latent model: values before quantization, or the codes."""
    snap_on_decode: bool = True
    """Snap a latent model's samples to the nearest code before decoding."""

    def __post_init__(self) -> None:
        check_ranges(
            self, levels=WIDTH, dim=WIDTH, width=WIDTH, downsample=WIDTH, blocks=(0, LAYERS[1]), multipliers=WIDTH
        )
        check_ranges(self, depth=LAYERS, heads=WIDTH, latent_tokens=WIDTH, codebook_size=(1, 2**62), kl_weight=WEIGHT)

    def quantizer_config(self, channels: int) -> dict[str, Any]:
        """The quantizer's own configuration. ValueError if `options` is not a JSON object."""
        try:
            more = json.loads(self.options)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f'--model.options {self.options:.80} is not JSON ({error}): write {{"normalize": true}}'
            ) from None
        if not isinstance(more, dict):
            raise ValueError(f'--model.options {self.options} is not a JSON object: write {{"normalize": true}}')
        codes = {"codebook_size": self.codebook_size, "dim": self.dim}
        own = {
            "fsq": {"levels": list(self.levels), "form": self.form},
            "vq": codes,
            "vq_gradient": codes,
            "simvq": codes,
            "lfq": {"bits": self.dim},
            "bsq": {"bits": self.dim},
            "kl": {"dim": self.dim, "weight": self.kl_weight},
            "identity": {"dim": channels if self.downsample == 1 else self.dim},
        }
        return {"type": self.quantizer, **own.get(self.quantizer, {}), **more}

    def network_config(self) -> dict[str, Any]:
        """The fields that are arguments of ImageTokenizer."""
        networks = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in QUANTIZER_FIELDS}
        return {**networks, "multipliers": list(self.multipliers)}


@dataclass(frozen=True)
class TrainingTask:
    """The flags of every training that has a run directory of its own."""

    out: Path
    """Run directory to create."""
    train: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig, kw_only=True)
    license: str = field(default=LICENSE, kw_only=True)
    """Licence of the weights, for the card of the folder to share."""
    overwrite: bool = field(default=False, kw_only=True, metadata=PER_CALL)
    """Delete a run that is already at --out."""
    resume: Resume = field(default="no", kw_only=True, metadata=PER_CALL)
    """auto: continue from the newest checkpoint at --out, or start if there is none."""
    dry_run: bool = field(default=False, kw_only=True, metadata=PER_CALL)
    """Build everything, train two steps on random images of the configured size, and print parameters, memory, speed and the
    time that the training would take. Neither data nor --out are touched."""
    dry_run_classes: int = field(default=1000, kw_only=True, metadata=PER_CALL)
    """With --dry-run: classes of the random images."""


@dataclass(frozen=True)
class TokenizerTask(TrainingTask):
    """Train an image tokenizer."""

    data: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    quantizer: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Kind and arguments of the quantizer, where --quantizer flags or a file have them: then `model` has only its name."""

    def quantizer_config(self, channels: int) -> dict[str, Any]:
        """The quantizer's own configuration, for images of so many channels. ValueError as of TokenizerConfig."""
        if not self.quantizer:
            return self.model.quantizer_config(channels)
        own = {"dim": channels if self.model.downsample == 1 else self.model.dim}
        return {**(own if self.quantizer.get("type") == "identity" else {}), **self.quantizer}


@dataclass(frozen=True)
class LatentTask(DataPathFlag, TileFlags, TrainingTask):
    """Train a latent model on a tokenizer's latents."""

    tokenizer: Path
    """Run directory of the tokenizer; its data set is used."""
    latents: Path | None = None
    """Latent cache (default: next to the tokenizer; created if missing)."""
    model: LatentModelConfig = field(default_factory=LatentModelConfig)
    init: Path | None = None
    """Run directory of a trained latent model of the same sizes: training starts from its averaged weights, which jump as Euler's
    method steps."""
    teacher: Path | None = None
    """Distillation: run directory of a trained flow model, whose velocities objectives of jumps take in place of the samples'."""
    reflow: ReflowConfig = field(default_factory=ReflowConfig)
    """Train on pairs of noise and samples of another model in place of images, where it names one as source."""
    align: AlignConfig = field(default_factory=AlignConfig)
    """Align hidden tokens with the feature map of a trained network, where it names one as teacher."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    early: OnlineConfig = field(default_factory=OnlineConfig)
    """Settings of --measure-every."""


@dataclass(frozen=True)
class FinetuneTask(TrainingTask):
    """Train a latent model further on other images: small matrices beside its weights, or all of its weights."""

    model: Path
    """Run directory of the latent model. It stays as it is; its tokenizer is used."""
    data: Annotated[DataConfig, Flat]
    method: Literal["adapter", "full"] = "adapter"
    """What learns. adapter: matrices of low rank beside the layers of attention and MLP, and labels of new classes. full: all
    weights."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Of the method adapter."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""


@dataclass(frozen=True)
class PriorTask(DataPathFlag, TileFlags, TrainingTask):
    """Train a prior: a law of a tokenizer's codes by class, or of its latents token by token, from which images are drawn."""

    tokenizer: Path
    """Run directory of the tokenizer; its data set is used."""
    codes: Path | None = None
    """Folder of codes, of a continuous prior of latents (default: next to the tokenizer; created if missing)."""
    model: PriorConfig = field(default_factory=PriorConfig)
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    validation_images: int | None = None
    """Number of held-out images in validation (default: all)."""
    masks: int | None = None
    """Masked priors: masks of an image in the bound of held-out bits (default: one a token, at most 16)."""
    early: PriorOnlineConfig = field(default_factory=PriorOnlineConfig)
    """Settings of --measure-every."""

    def __post_init__(self) -> None:
        check_flag_ranges(self, validation_images=COUNT, masks=COUNT)
