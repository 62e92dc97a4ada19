"""The commands of docs/measuring.md as a user types them, on tiny runs."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipelines import Pipeline, Script

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
SMALL = ("--nfe", 4, "--blocks", 2, "--grids", "uniform", "--n", 24, "--exact-nfe", 0, "--batch-size", 16)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_features_and_out_have_defaults_and_images_are_exported(
    pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    """EfficientNet-Lite0, and in the model; as zip and NPZ."""
    shutil.copytree(pipeline.model, tmp_path / "model")
    flags = f"--solvers euler,ddim,dpmpp2m --save-images {tmp_path}/zips --export-npz {tmp_path}/npz"
    done = succeed(f"evaluate --model {tmp_path}/model {flags}", *SMALL)
    report = tmp_path / "model" / "report"
    assert {row["solver"] for row in rows(report)} == {"floor", "ceiling", "euler", "ddim", "dpmpp2m"}
    assert {row["features"] for row in rows(report)} == {"effnet-lite0@579344248a93+bicubic-32, 64 axes"}
    plots = ("distance_vs_nfe.png", "distance_vs_seconds.png")
    assert all((report / name).exists() for name in ("results.csv", "report.md", "report.html", *plots))
    assert all(word in done.out for word in ("euler", "floor", "report.html")) and done.out.count("\nimages: ") == 6
    with zipfile.ZipFile(tmp_path / "zips" / "ddim-uniform-nfe4.zip") as archive:
        assert sum(name.endswith(".png") for name in archive.namelist()) == 48
    with np.load(tmp_path / "npz" / "ddim-uniform-nfe4.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (48, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8


def test_the_defaults_are_four_blocks_and_one_set(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    runs = f"--features {pipeline.features} --out {tmp_path}"
    succeed(f"evaluate --model {pipeline.model} {runs}/a --solvers ddim", *SMALL[:2], *SMALL[4:])
    assert [row["blocks"] for row in rows(tmp_path / "a")] == [1, 1, 4]
    np.savez(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 256, (45, 8, 8, 1), dtype=np.uint8))
    succeed(f"evaluate --data digits {runs}/b --images {tmp_path}/a.npz --metrics", "")
    assert [(row["n"], row["blocks"]) for row in rows(tmp_path / "b")][1] == (45, 1)
    report = (tmp_path / "b" / "report.md").read_text()
    assert "without an error bar" in report and "consecutive" not in report
