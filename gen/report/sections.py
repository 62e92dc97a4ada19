"""Sections of a report beyond its tables: how flat the model's trajectories are, and which codes its samples use."""

from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from midway.gen.data.images import to_float
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.sampling import SamplingConfig
from midway.gen.evaluation.trajectories import random_walk, trajectory_geometry
from midway.gen.metrics.code_usage import CodeUse
from midway.gen.report.html import image_tag
from midway.gen.report.trajectory_plot import trajectory_png
from midway.samplers.grids import GRIDS
from midway.samplers.solvers import SOLVERS
from midway.tokenizers.tokenizer import ImageTokenizer

SEEDS = 64
STEPS = 32
CODED = 1000
"""Images at most whose codes are counted."""


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph of plain text, and a picture with its description."""

    title: str
    text: str
    png: bytes | None = None
    alt: str = ""


def section_html(section: Section) -> str:
    """The section as a part of the page."""
    picture = "" if section.png is None else f'<div class="plot">{image_tag(section.png, section.alt)}</div>'
    return f"<h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>{picture}"


def trajectory_section(trained: TrainedModel, config: SamplingConfig) -> Section:
    """Principal components of trajectories of Heun's method at 64 evaluations."""
    table = SOLVERS["heun"].build(trained.model.schedule, GRIDS["karras"](trained.model.schedule, STEPS))
    found = trajectory_geometry(trained, table, torch.arange(SEEDS), config)
    rank, off, two = found.effective_rank, found.deviation, found.explained[1]
    walk = random_walk(found.steps, 2).sum().item()
    text = (
        f"{found.count} trajectories of Heun's method in {found.steps} steps: two principal components hold "
        f"{100 * two.mean:.1f} ± {100 * two.std:.1f} % of a trajectory's variance, its effective rank is {rank.mean:.2f} ± "
        f"{rank.std:.2f}, and its deviation from its chord is {off.mean:.2f} ± {off.std:.2f} of the chord's length. Steps at "
        f"right angles to one another, in no plane at all, would have {100 * walk:.0f} % in two. The nearer to a plane, the more "
        "a single learned direction can do, the assumption of AMED; where alpha and sigma trace a curve, as under cosine or "
        "vp, part of the plane is the schedule's own."
    )
    alt = "variance explained by the first components, and trajectories, each on its own first two components"
    return Section("Shape of the trajectories", text, trajectory_png(found), alt)


@torch.no_grad()
def code_section(trained: TrainedModel, held_out: Tensor, latents: Tensor) -> Section | None:
    """Codes of held-out images uint8 (N, C, H, W) and of samples' standardised latents (N, C, h, w); None without a codebook."""
    tokenizer = trained.tokenizer
    if tokenizer.quantizer.codebook_size is None:
        return None
    images = to_float(held_out[:CODED].to(tokenizer.device))
    raw = latents[:CODED].to(tokenizer.device) * _channelwise(tokenizer.latent_std) + _channelwise(
        tokenizer.latent_mean
    )
    real = _use(tokenizer, tokenizer.encode_indices(images))
    drawn = _use(tokenizer, tokenizer.quantizer.codes_to_indices(raw))
    text = (
        f"{tokenizer.tokens} codes an image, each of {tokenizer.quantizer.codebook_size:,}. {_text(real, len(images))} "
        f"held-out images; {_text(drawn, min(CODED, len(latents)))} samples (the fine solution, snapped to codes). "
        "Perplexity is the number of equally used codes of the same entropy; it cannot exceed the number of tokens."
    )
    return Section("Use of the codes", text)


def _channelwise(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1)


def _use(tokenizer: ImageTokenizer, indices: Tensor) -> CodeUse:
    """Counts of the codes that occur in indices (N, *S) or (N, *S, G)."""
    size = tokenizer.quantizer.codebook_size
    assert size is not None
    tokens = indices.reshape(-1, tokenizer.quantizer.groups).cpu().T
    counts = [row.unique(return_counts=True)[1].sort(descending=True).values for row in tokens]
    return CodeUse(size, tuple(counts))


def _text(use: CodeUse, images: int) -> str:
    perplexity = sum(use.perplexities) / len(use.perplexities)
    return f"{use.used:,} different ones (perplexity {perplexity:,.0f}) in {use.counted:,} tokens of {images:,}"
