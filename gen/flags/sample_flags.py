"""The flags of midway sample, and the checks that need nothing but them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from midway.gen.core.errors import UsageError
from midway.gen.core.ranges import COUNT, SEED, STEPS, WIDTH, check_flag_ranges
from midway.gen.flags.sampling_flags import PriorFlags, SamplingFlags, TileFlags


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """What is drawn."""

    model: Path
    """Run directory of the latent model, or of a prior over codes."""
    out: Path = Path("grid.png")
    """grid.png: a grid. A folder, .zip or .npz: single images. With --invert: noise, .safetensors."""
    solver: str = ""
    """euler, ddim, heun, dpmpp2m, ... (docs/solvers.md), rk45, or one learned for this model: table, amed, amed-plugin-...; of a
    model that jumps: jump, consistency. By default dpmpp2m, or what the model was trained for. Of a prior over codes its rule:
    causal, or of masked ones halton (default), random, certain, maskgit."""
    nfe: int | None = None
    """Network evaluations per image (guidance doubles what the network runs): 10 by default, of priors one a token."""
    grid: str = ""
    """Spacing of the steps: uniform, logsnr, karras, shift, quadratic, vp, ays_sd, ays_sdxl or gits; learned ones have theirs. By
    default karras, of jumps uniform. Of masked priors how the share of missing tokens falls: cosine (default), arccos, linear."""
    n: int | None = None
    """Number of images: 64, or as many as --init, --noise, --invert or --prompt has."""
    seed: int = 0
    """Seed of the first image; the others follow."""
    labels: str | None = None
    """Classes, by number or name: 3, or cat,dog. Seed s has number s mod N of these N; otherwise all classes in turn."""
    init: str | None = None
    """Image to image: an image, a folder, a zip, an .npz or a named source. Seed s begins at image number s mod N."""
    strength: float | None = None
    """With --init: the share of the steps that run, in (0, 1]; 1 begins at the noise of the first step. 0.6 by default."""
    invert: str | None = None
    """Find the noise that gives these images (as --init names them), and write it to --out."""
    noise: Path | None = None
    """Begin at the noise that --invert has written; its classes unless --labels names others."""
    parallel: Literal["no", "gaussian", "picard"] = "no"
    """Evaluate many times at once, in waves, until nothing changes (samplers/parallel.py); costs evaluations, saves waiting."""
    tolerance: float = 1e-3
    """With --parallel: a state has settled when it changes by less, in standard deviations."""
    window: int | None = None
    """With --parallel: evaluations of a wave, per image; by default the whole trajectory."""
    rtol: float = 1e-5
    """With --solver rk45, which has no budget and chooses its steps: greatest error of a step, relative to the state."""
    atol: float = 1e-5
    """The same, absolute."""


@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """What priors complete."""

    prompt: str | None = None
    """Priors: draw the rest of images (as --init names them), or of codes: a folder of midway encode --kind codes, or `codes`
    of a .safetensors or .npz. Seed s completes number s mod N."""
    prompt_tokens: int | None = None
    """With --prompt: the number of tokens that are kept, row by row (default: half of them)."""
    prompt_region: str | None = None
    """With --prompt: what is kept instead: top, bottom, left, right, center, border, or the white of a picture."""

    def check_prompt_flags(self) -> None:
        """UsageError for flags that do not go together."""
        check_flag_ranges(self, prompt_tokens=STEPS)
        given = [f"--{name.replace('_', '-')}" for name in ("prompt_tokens", "prompt_region") if getattr(self, name)]
        if given and self.prompt is None:
            raise UsageError(
                f"{given[0]} without --prompt", "there is nothing to complete", "give --prompt, or drop it"
            )
        if len(given) > 1:
            raise UsageError(" and ".join(given), "both name what is kept", "drop one of them")


@dataclass(frozen=True, kw_only=True)
class SampleTask(TileFlags, PromptFlags, PriorFlags, SamplingFlags, SampleFlags):
    """Draw samples of a model; an image depends on its seed alone.

    A grid: --out grid.png. Single images named by seed and class: --out FOLDER, x.zip or x.npz, with any --n; after a kill
    the same command draws what is missing, and processes share it: accelerate launch --num_processes 4 -m midway sample ...

    Image to image: --init photos --strength 0.6. Inversion: --invert photos --out n.safetensors, then --noise n.safetensors.
    The rest of images, by a prior: --prompt photos --prompt-region top.
    """

    def __post_init__(self) -> None:
        SamplingFlags.__post_init__(self)
        self.check_prior_flags()
        self.check_prompt_flags()
        check_flag_ranges(self, n=COUNT, nfe=STEPS, seed=SEED, window=STEPS, tile=WIDTH)
        given = [f"--{name}" for name in ("init", "noise", "invert") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(" and ".join(given), "images begin at one of them", "drop all but one")
        if self.strength is not None and self.init is None:
            raise UsageError("--strength without --init", "there are no images to begin at", "give --init, or drop it")
        if self.invert is not None and (self.analytic_first or self.parallel != "no"):
            flag = "--analytic-first" if self.analytic_first else "--parallel"
            raise UsageError(f"--invert with {flag}", "the reversed grid begins at data, row by row", f"drop {flag}")
