"""The flags that commands share: how samples are drawn, from models that are solved and from priors, and tiles."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from midway.gen.core.errors import UsageError, raising
from midway.gen.core.ranges import BATCH, STEPS, check_flag_ranges
from midway.gen.diffusion.load import load_model
from midway.gen.diffusion.model import EVERYWHERE
from midway.tokenizers.tiling import tile_networks
from midway.tokenizers.tokenizer import ImageTokenizer

if TYPE_CHECKING:
    from midway.gen.priors.rules import HeadFlags


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How samples are drawn."""

    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only noise levels sigma / alpha above the first and up to the second number."""
    guide: Path | None = None
    """Autoguidance: run directory of a smaller or less trained model of the same kind, in place of the missing class."""
    adapter: Path | None = None
    """Run directory of an adapter of --model (midway finetune), or a folder of one: it is added to the weights."""
    analytic_first: bool = False
    """Replace the first evaluation by the analytic direction (odd budgets for two-stage solvers)."""
    eta: float = 0.0
    """ddim only: 0 is deterministic, 1 ancestral."""
    batch_size: int = 256
    """Images that are sampled at once; the rest is unchanged but for rounding."""
    precision: Literal["no", "bf16"] = "no"
    """bf16: the network runs under autocast; the solver's state stays float32."""
    graph: bool = False
    """On a GPU, run the trajectory of every full batch as one CUDA graph; nothing changes on a CPU."""

    def __post_init__(self) -> None:
        check_flag_ranges(self, batch_size=BATCH)

    def sampler_options(self, device: torch.device) -> dict[str, Any]:
        """The same as fields of SamplerConfig; the guiding model is loaded."""
        same = ("guidance", "analytic_first", "eta", "batch_size", "precision", "graph")
        weak = load_model(self.guide, device) if self.guide else None
        own = {name: getattr(self, name) for name in same}
        return {**own, "interval": self.guidance_interval or EVERYWHERE, "weak": weak}

    @property
    def guides(self) -> bool:
        """Whether any flag asks for guidance."""
        return self.guidance != 1 or self.guidance_interval is not None or self.guide is not None


@dataclass(frozen=True, kw_only=True)
class PriorFlags:
    """How codes are drawn from priors."""

    temperature: float = 1.0
    """Priors: logits are divided by it; 0 draws the most probable token always."""
    top_k: int = 0
    """Priors: draw from only this many most probable values of each digit; 0: from all."""
    top_p: float = 1.0
    """Priors: draw from only the most probable values that have this probability together."""
    guidance_ramp: float = 0.0
    """Priors: guidance grows from 1 to --guidance as the share of decided tokens to this power; 0: it is the same everywhere."""
    choice_noise: float = 4.5
    """Priors by maskgit: Gumbel noise on the confidences by which tokens stay, at first, falling to 0 linearly."""
    head_solver: str = ""
    """Continuous priors: what draws a token from their diffusion head: dpmpp2m (default), another of docs/solvers.md, or table,
    learned for it (midway train solver table)."""
    head_nfe: int | None = None
    """Continuous priors: evaluations of the head a token (default: 20)."""
    head_grid: str = ""
    """Continuous priors: spacing of the head's steps: karras (default), uniform, logsnr, ..."""

    def check_prior_flags(self) -> None:
        """UsageError for numbers that draw nothing."""
        check_flag_ranges(self, temperature=(0, 100), top_k=(0, 2**20), top_p=(1e-9, 1))
        check_flag_ranges(self, guidance_ramp=(0, 100), choice_noise=(0, 1000), head_nfe=STEPS)

    def without_priors(self, what: str) -> None:
        """UsageError for any of these flags, where `what` is no prior."""
        given = [f.name for f in fields(PriorFlags) if getattr(self, f.name) != f.default]
        if given:
            flag = f"--{given[0].replace('_', '-')}"
            raise UsageError(
                f"{flag} {getattr(self, given[0])}", f"it is for priors over codes, and {what}", f"drop {flag}"
            )

    @property
    def draw_options(self) -> dict[str, Any]:
        """The same as fields of Decoding."""
        same = ("temperature", "top_k", "top_p", "choice_noise")
        return {**{name: getattr(self, name) for name in same}, "ramp": self.guidance_ramp}

    @property
    def head(self) -> "HeadFlags":
        """What draws a continuous token."""
        from midway.gen.priors.rules import HeadFlags

        return HeadFlags(self.head_solver, self.head_nfe, self.head_grid)


@dataclass(frozen=True, kw_only=True)
class TileFlags:
    """How a tokenizer's networks are applied."""

    tile: int | None = None
    """Encode and decode in tiles of this many pixels a side, for large images (default: the whole image at once)."""
    tile_margin: int = 32
    """With --tile: pixels ignored at the inner edges of tiles, which overlap by four times as many."""

    def apply_tiles(self, tokenizer: ImageTokenizer) -> None:
        """Tile the networks of `tokenizer` if --tile is given; UsageError if they cannot be tiled."""
        if self.tile is None:
            return
        flags = f"--tile {self.tile} --tile-margin {self.tile_margin}"
        with raising(UsageError, flags, "change or drop these flags"):
            tile_networks(tokenizer, self.tile, self.tile_margin)
