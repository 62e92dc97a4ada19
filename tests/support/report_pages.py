"""The four kinds of reports, of made-up figures, as pages for a browser."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measurements import changed, measurement
from PIL import Image

from midway.gen.evaluation.likelihood import LikelihoodRow
from midway.gen.evaluation.records import CEILING, EXACT, FLOOR
from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.evaluation.tokenizers import TokenizerResult
from midway.gen.proving.contest import Cell
from midway.gen.proving.report import Result, write_prove_report
from midway.gen.report import likelihood, tokenizers
from midway.gen.report.drawing import Drawing
from midway.gen.report.html import Block
from midway.gen.report.sections import trajectory_figure
from midway.gen.report.sweep_page import Pictures, report_html
from midway.gen.report.table import ReportContext
from midway.gen.sweep.trajectories import geometry_of

SOLVERS = ("euler", "heun", "amed-plugin-dpmpp3m-constants")
NFES = (3, 4, 5, 6, 7, 8, 9, 10, 20)
CLASSES = tuple(f"class {i}" for i in range(16))


def png(shade: int) -> bytes:
    """A picture of 8 x 4."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), (shade, 80, 255 - shade)).save(buffer, format="PNG")
    return buffer.getvalue()


GRIDS = {(s, k): png(30 * i + k) for i, s in enumerate(SOLVERS) for k in NFES if s != "heun" or k % 2 == 0}
PICTURES = Pictures(
    {**GRIDS, ("vae", 1): png(200)},
    {FLOOR: png(210), CEILING: png(220), EXACT: png(230)},
    {FLOOR: CLASSES, EXACT: CLASSES[::-1]},
)


def context(title: str) -> ReportContext:
    """With a warning, notes and a long command."""
    command = "midway evaluate " + "x" * 90
    notes = ("the reference has 200 steps",)
    warnings = ("flow: step 129 of 4000",)
    return ReportContext(
        title, "flow", "digits", command, "2 cores", {"torch": "2"}, "0-2047", notes, warnings=warnings
    )


def sweep_page(folder: Path) -> Path:
    """Three solvers at nine budgets with an exact solution, a baseline and a section; heun diverges at 3."""
    like = changed(
        measurement("euler", "karras", 4, 5.0, 0.1, 0.2, 1024, 3, 1.5, "cnn-digits@3fa2c1ab90de", "digits-train@9b1e"),
        kid=0.01,
        kid_std=0.002,
        precision=0.8,
        recall=0.7,
        density=0.9,
        coverage=0.8,
        psnr=30,
    )

    def blocks(mean: float) -> tuple[float, ...]:
        return (0.9 * mean, mean, 1.1 * mean)

    cells = [
        changed(
            like,
            solver=s,
            nfe=k,
            training_nfe=99999 * (i == 2),
            distance=1.6 + (3 - i) / k,
            distance_blocks=blocks(1.6 + (3 - i) / k),
            to_exact=3 / (k + i),
            to_exact_blocks=blocks(3 / (k + i)),
        )
        for i, s in enumerate(SOLVERS)
        for k in NFES
    ]
    plain: dict[str, Any] = {"grid": "", "rmse": None, "to_exact": None}
    limits = [
        changed(like, solver=name, nfe=0, distance=value, **plain) for name, value in ((FLOOR, 0.9), (CEILING, 1.3))
    ]
    exact = changed(like, solver=EXACT, nfe=48, distance=1.6, distance_blocks=blocks(1.6), **plain)
    baseline = changed(like, solver="vae", nfe=1, baseline=True, **plain)
    geometry = geometry_of("heun", torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0)).cumsum(1))
    drawing = Drawing("trajectories", "A picture", "", lambda narrow: trajectory_figure(geometry, narrow))
    section = Block("Shape of something", "Its <text>.", (drawing,), folded=True)
    path = folder / "sweep.html"
    page = report_html([*limits, exact, *cells, baseline], context("Budgets"), PICTURES, [section])
    path.write_text(page, encoding="utf-8")
    return path


def tokenizers_page(folder: Path) -> Path:
    """Three tokenizers, two of equal rate, one with a posterior."""
    shares = torch.arange(50, 0, -1).double()
    images = torch.arange(640, dtype=torch.uint8).view(10, 1, 8, 8)
    results = []
    for name, bits, psnr in (("fsq", 160.0, 26.0), ("vq", 161.0, 25.0), ("kl", None, 27.0)):
        fields: dict[str, Any] = dict.fromkeys(TokenizerRow.__dataclass_fields__)
        fields |= {
            "name": name,
            "bits": bits,
            "psnr": psnr,
            "ssim": 0.9,
            "noise": (0.0, 0.4),
            "psnr_noisy": (psnr, 20.0),
        }
        fields |= {
            "codebook": bits and 1000,
            "entropy_bits": bits and 140.0,
            "usage": bits and 0.9,
            "distance": 60 - psnr,
        }
        fields |= {
            "rate": 200.0,
            "psnr_sampled": 25.5,
            "parameters": 1000,
            "groups": 1,
            "tokens": 16,
            "n": 10,
            "floor": 0.3,
        }
        fields |= {
            "encode_seconds": 0.1,
            "decode_seconds": 0.2,
            "latent_rank": 3.0,
            "interpolated": 40.0,
            "features": "cnn",
        }
        results.append(
            TokenizerResult(TokenizerRow(**fields), None if bits is None else shares / shares.sum(), images, images)
        )
    path = folder / "tokenizers.html"
    path.write_text(tokenizers.report_html(results, images, context("Compared")), encoding="utf-8")
    return path


def likelihood_page(folder: Path) -> Path:
    """A baseline, a latent model and a reference."""

    def row(name: str, bits: float | None, **more: Any) -> LikelihoodRow:
        return LikelihoodRow(
            name, "flow", bits, bits and 0.02, 100, 17, 64, "dequantisation, 1 draw", 0, "digits", **more
        )

    model = {"model": "aa", "parameters": 12345, "sample_nfe": 20, "sampler": "dpmpp2m, karras", "features": "cnn"}
    rows = [row("glow", 2.1, distance=3.0, **model), row("dit", None, distance=2.0, **model), row("uniform", 4.1)]
    path = folder / "likelihood.html"
    path.write_text(likelihood.report_html(rows, context("Bits")), encoding="utf-8")
    return path


def prove_page(folder: Path) -> Path:
    """Two solvers at three budgets."""
    cells = [
        Cell(
            solver, nfe, "karras", False, 0, dict.fromkeys(("rmse", "to_data"), (v / nfe, 1.1 * v / nfe, 0.9 * v / nfe))
        )
        for solver, v in (("euler", 2.0), ("dpmpp3m", 1.0))
        for nfe in (4, 6, 8)
    ]
    write_prove_report(folder, Result(tuple(cells), "toy", 100, "0-299", 0.001), context("Proof"))
    return folder / "report.html"


PAGES: dict[str, Callable[[Path], Path]] = {
    "sweep": sweep_page,
    "tokenizers": tokenizers_page,
    "likelihood": likelihood_page,
    "prove": prove_page,
}
"""How each kind of page is written into a folder."""
