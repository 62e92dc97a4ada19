"""The strip of samples of the README: the same seeds by three solvers at 2, 4, 8 and 20 evaluations, and their exact solution.

python docs/strip.py runs/demo-mnist/model docs/images/strip.png
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from midway.gen.diffusion.load import load_model
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.diffusion.sampling import decode, sample_latents

SOLVERS = {"ddim": "DDIM", "ipndm3": "iPNDM(3)", "dpmpp2m": "DPM-Solver++(2M)"}
BUDGETS = (2, 4, 8, 20)
SEEDS = torch.arange(5)
SCALE, GAP, LEFT, TOP, SIZE = 2, 24, 250, 52, 26


def images(model: Path, solver: str, nfe: int, grid: str) -> Tensor:
    """uint8 (N, C, H, W) of `SEEDS`."""
    trained = load_model(model, torch.device("cpu"))
    (sampler,) = make_samplers(trained, solver, nfe, SamplerConfig((grid,))).values()
    return decode(trained, sample_latents(trained, sampler, SEEDS).latents)


def row(found: Tensor) -> Image.Image:
    """The images side by side, each pixel `SCALE` pixels wide."""
    pixels = torch.cat(list(found), -1).permute(1, 2, 0).expand(-1, -1, 3).numpy()
    wide = Image.fromarray(pixels)
    return wide.resize((wide.width * SCALE, wide.height * SCALE), Image.Resampling.NEAREST)


def strip(model: Path) -> Image.Image:
    """A line for each solver, a block of images for each budget."""
    exact = row(images(model, "dpmpp3m", 128, "logsnr"))
    block, font = exact.width + GAP, ImageFont.load_default(SIZE)
    size = (LEFT + block * (len(BUDGETS) + 1) - GAP, TOP + (exact.height + GAP) * len(SOLVERS) - GAP)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate([*(f"NFE {nfe}" for nfe in BUDGETS), "exact solution"]):
        draw.text((LEFT + column * block, 8), title, "#333333", font)
    for line, (solver, title) in enumerate(SOLVERS.items()):
        top = TOP + line * (exact.height + GAP)
        draw.text((0, top + exact.height // 2 - SIZE // 2 - 4), title, "#333333", font)
        for column, nfe in enumerate(BUDGETS):
            page.paste(row(images(model, solver, nfe, "gits")), (LEFT + column * block, top))
        page.paste(exact, (LEFT + len(BUDGETS) * block, top))
    return page


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    strip(Path(sys.argv[1])).save(sys.argv[2], optimize=True)
