"""Time from a command's start to its first training step, and its peak memory then, on built sets of few and of many images.

    python benchmarks/first_step.py --folder /tmp/sets --counts 200 20000

The sets are one JPEG of 256 x 256 under many names (20,000 images take 4 GB on the disk, and are removed at the end). Each count
is measured in a process of its own, in turns; the medians are written to benchmarks/results/first_step.json.
"""

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

from midway.gen.core.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "first_step.json"
RECIPE = (
    *("digits-fsq", "--model.width", "4", "--model.downsample", "32", "--batch-size", "4"),
    *("--steps", "1000", "--log-every", "1", "--overwrite"),
)
"""A small tokenizer, so that a step is short beside what comes before it."""


def build(folder: Path, count: int) -> Path:
    """A built set of `count` images in two classes."""
    source, out = folder / f"{count}.zip", folder / f"set-{count}"
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, "JPEG")
    with zipfile.ZipFile(source, "w") as archive:
        for index in range(count):
            archive.writestr(f"{'ab'[index % 2]}/{index:06}.jpg", file.getvalue())
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "data.py", "build", source, "--out", out], check=True, stdout=sys.stderr
    )
    source.unlink()
    return out


def first_step(data: Path, out: Path) -> tuple[float, float]:
    """Seconds until the first step is logged, and the peak memory of the process then in MB (0 where there is no /proc)."""
    command = [sys.executable, ROOT / "scripts" / "train_tokenizer.py", *RECIPE, "--data", data, "--out", out]
    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            if has_step(out / "metrics.jsonl"):
                taken, memory = time.perf_counter() - begun, peak(process.pid)
                process.kill()
                return taken, memory
            time.sleep(0.01)
        assert process.stderr is not None
        raise RuntimeError(f"no first step: {process.stderr.read()[-1000:]}")


def has_step(log: Path) -> bool:
    """Whether a step was logged."""
    try:
        return log.stat().st_size > 0
    except OSError:
        return False


def peak(pid: int) -> float:
    """Peak resident memory in MB."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def main(folder: Path, counts: list[int], turns: int, out: Path) -> None:
    """Measure all counts in turns, and write the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {count: build(folder, count) for count in counts}
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for _ in range(turns):
        for count, data in sets.items():
            found[count].append(first_step(data, folder / "run"))
    rows: list[dict[str, Any]] = [
        {
            "images": count,
            "seconds": round(statistics.median(seconds for seconds, _ in pairs), 2),
            "peak_mb": round(statistics.median(memory for _, memory in pairs), 1),
        }
        for count, pairs in found.items()
    ]
    print("\n".join(f"{row['images']:>8} images: {row['seconds']:.2f} s, {row['peak_mb']:.0f} MB" for row in rows))
    out.write_text(json.dumps({"turns": turns, "environment": environment(), "results": rows}, indent=2) + "\n")
    for data in sets.values():
        shutil.rmtree(data)
    shutil.rmtree(folder / "run")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[200, 20_000])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.counts, arguments.turns, arguments.out)
