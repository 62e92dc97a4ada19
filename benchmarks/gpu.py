"""Everything that only a CUDA machine can show, in at most nine minutes: what `make gpu` runs.

Each part runs in a process of its own with a limit of its own, and benchmarks/results/gpu.json is replaced after every part.
What fails, takes too long or lacks a package is a row with its reason. On a machine without CUDA nothing is written.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only graph syncs --budget 120 --out graph.json
    python benchmarks/gpu.py --device cpu --tiny --out rehearsal.json     # every part at sizes that show that it runs
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from midway.gen.core.errors import MidwayError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_parts.driver import Entry, Part, Row, python, run_parts

RESULT = Path(__file__).parent / "results" / "gpu.json"
BUDGET = 540.0
LIMITS: dict[str, tuple[float, str]] = {
    "machine": (25, "hardware, versions, and the ceilings of copies and matrix products"),
    "cuda_tests": (70, "tests of the suite that need CUDA"),
    "graph": (50, "a whole trajectory as one CUDA graph, beside eager and diffusers"),
    "syncs": (30, "how often the host waits for the GPU within a trajectory"),
    "kernels": (35, "the Triton kernels beside torch"),
    "training": (60, "images a second of fit(), beside a bare loop and diffusers' recipe"),
    "precision": (40, "bf16 and TF32 beside float32"),
    "frechet": (25, "the Fréchet distance by Newton-Schulz beside eigenvalues"),
    "cifar": (200, "CIFAR-10: tokenizer, latent model, AMED, sweep"),
    "parallel": (40, "sampling in parallel over time beside the sequential loop"),
    "quantizers": (45, "quantizers beside vector-quantize-pytorch and diffusers"),
    "dit": (90, "DiT beside diffusers' DiTTransformer2DModel of the same weights"),
    "compiled": (100, "torch.compile beside eager"),
}
"""Seconds of each part at most, and what it measures; the parts in order of their worth, since the last ones may find no time."""
SHOWN_APART = ("name", "status", "reason", "held", "peer_name")
LEAST = 15.0
"""Seconds below which no part is worth starting: to import torch takes several."""


def parts_of(arguments: argparse.Namespace) -> list[Part]:
    """The chosen ones; a part is this program with --part."""
    flags = ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    data = ["--data", str(arguments.data)] if arguments.data else []
    patience = 1 if arguments.device == "cuda" else 5  # of a rehearsal, which is about nobody's time
    return [
        Part(name, about, python(Path(__file__).resolve(), "--part", name, *flags, *data), patience * limit, LEAST)
        for name, (limit, about) in LIMITS.items()
        if not arguments.only or name in arguments.only
    ]


def show(part: str, row: Row) -> None:
    """One line of a row, or of a part that has ended."""
    if "limit_s" in row:
        print(f"{part}: {row['status']} in {row['seconds']:.0f} s {row['reason']}".rstrip(), flush=True)
        return
    columns = ("ours", "peer", "ratio", "unit") if "ours" in row else [key for key in row if key not in SHOWN_APART]
    figures = " ".join(f"{key} {row[key]}" for key in columns if row.get(key) not in (None, ""))
    beside = f" beside {row['peer_name']}" if row.get("peer_name") else ""
    held = {"True": "held", "False": "MISSED"}.get(str(row.get("held")), "")
    status = "" if row["status"] == "measured" else f"{row['status']}: {row['reason']}"
    print("    " + " ".join(word for word in (f"{row['name']}{beside}:", figures, held, status) if word), flush=True)


def run_one(arguments: argparse.Namespace) -> int:
    """Measure one part, in the process that the driver has started for it."""
    from gpu_parts.part import Setting, run_part

    device = torch.device(arguments.device)
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, arguments.seconds, Path(folder), arguments.tiny, arguments.data)
        return run_part(arguments.part, setting, arguments.rows)


def wrong(entries: list[Entry]) -> int:
    """1 if a part or a row failed, or a target was missed; what is skipped is not wrong."""
    rows: list[dict[str, Any]] = [row for entry in entries for row in entry.rows]
    failed = any(entry.status not in ("done", "skipped") for entry in entries)
    return int(failed or any(row.get("status") == "failed" or row.get("held") is False for row in rows))


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all parts together")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), help="these parts alone")
    parser.add_argument(
        "--data", type=Path, help="CIFAR-10 as a zip or folder (default: ../shared/data/cifar10-train.zip)"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu for a rehearsal, with --tiny")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that everything runs, not how fast")
    for name in ("--part", "--rows", "--seconds"):
        kind = {"--rows": Path, "--seconds": float}.get(name, str)
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run all parts and write the report; 0 also without CUDA, 1 for a failure or a missed target, 128 + a signal's number."""
    arguments = arguments_of(argv)
    if arguments.part:
        return run_one(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(f"no CUDA device, nothing to measure and nothing written (torch {torch.__version__})")
        return 0
    try:
        entries, stopped = run_parts(parts_of(arguments), arguments.out, arguments.budget, show, {})
    except MidwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {arguments.out}")
    return wrong(entries) if stopped is None else 128 + stopped


if __name__ == "__main__":
    sys.exit(main())
