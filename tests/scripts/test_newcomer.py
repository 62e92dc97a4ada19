"""The five lines of the README as a newcomer types them: the built wheel, another working directory, a folder of PNGs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[2]
LINES = re.findall(
    r"^midway .*$", (ROOT / "README.md").read_text().split("## Your own images")[1].split("```")[1], re.MULTILINE
)
BOUND = "--max-seconds 10"
"""A flag of the README, so that the test ends."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed without its dependencies, which the running interpreter has."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("gen", "samplers", "tokenizers"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    quiet = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *quiet, "-w", folder, folder / "tree"], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *quiet, "--target", folder / "site", wheel], check=True, capture_output=True)
    return folder / "site"


def write_images(folder: Path, labelled: bool, count: int = 240) -> None:
    """Digits as PNG files of 28 x 28 pixels."""
    found: Any = load_digits()
    for index, (pixels, label) in enumerate(zip(found.images[:count], found.target, strict=False)):
        path = folder / (f"digit {label}" if labelled else ".") / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((28, 28), Image.Resampling.BICUBIC).save(path)


@pytest.mark.parametrize("labelled", [True, False], ids=["a folder per class", "no classes"])
def test_five_lines(labelled: bool, installed: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", labelled)
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "2"}
    environment.pop("ACCELERATE_USE_CPU", None)
    where = [sys.executable, "-c", "import midway; print(midway.__file__)"]
    assert subprocess.check_output(where, cwd=tmp_path, env=environment, text=True).strip() == str(
        installed / "midway/__init__.py"
    )
    assert len(LINES) == 5
    for line in LINES:
        words = [*line.split()[1:], *(BOUND.split() if " train " in line else [])]
        done = subprocess.run(
            [sys.executable, installed / "bin" / "midway", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    report = (tmp_path / "runs/model/report/report.html").read_text()
    assert "<svg" in report and "exact" in report
    assert Image.open(tmp_path / "samples.png").size > (28, 28)
