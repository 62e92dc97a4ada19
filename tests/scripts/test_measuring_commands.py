"""The commands of docs/measuring.md as a user types them, on tiny runs."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train_latent
from PIL import Image
from pipelines import TINY_DIT, TINY_LATENT, Pipeline, Script

from midway.gen.diffusion.model import LatentModelConfig
from tasks import LatentTask

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ("--nfe", 4, "--blocks", 2, "--grids", "uniform", "--n", 24, "--reference-nfe", 0, "--batch-size", 16)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_features_and_out_are_found_beside_and_in_the_model(
    pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    for name in ("model", "features"):
        shutil.copytree(getattr(pipeline, name), tmp_path / name)
    done = succeed("evaluate", "--model", tmp_path / "model", "--solvers", "euler,ddim,dpmpp2m", *SMALL)
    report = tmp_path / "model" / "report"
    assert {row["solver"] for row in rows(report)} == {"floor", "euler", "ddim", "dpmpp2m"}
    plots = ("distance_vs_nfe.png", "distance_vs_seconds.png")
    assert all((report / name).exists() for name in ("results.csv", "report.md", "report.html", *plots))
    assert all(word in done.out for word in ("euler", "floor", "report.html"))


def test_the_defaults_are_four_blocks_and_one_set(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    flags = ("--model", pipeline.model, "--features", pipeline.features, "--out", tmp_path / "a", "--solvers", "ddim")
    succeed("evaluate", *flags, *SMALL[:2], *SMALL[4:])
    assert [row["blocks"] for row in rows(tmp_path / "a")] == [1, 4]
    np.savez(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 256, (45, 8, 8, 1), dtype=np.uint8))
    flags = (
        "--data",
        "digits",
        "--features",
        pipeline.features,
        "--images",
        tmp_path / "a.npz",
        "--out",
        tmp_path / "b",
    )
    succeed("evaluate", *flags, "--metrics", "")
    assert [(row["n"], row["blocks"]) for row in rows(tmp_path / "b")][1] == (45, 1)
    report = (tmp_path / "b" / "report.md").read_text()
    assert "without an error bar" in report and "consecutive" not in report


def test_images_are_saved_as_zip_and_npz(pipeline: Pipeline, script: Script, tmp_path: Path) -> None:
    flags = ("--model", pipeline.model, "--features", pipeline.features, "--out", tmp_path / "out", "--solvers", "ddim")
    done = script("evaluate", *flags, *SMALL, "--save-images", tmp_path / "zips", "--export-npz", tmp_path / "npz")
    assert done.code == 0 and done.out.count("images: ") == 2, done.err
    with zipfile.ZipFile(tmp_path / "zips" / "ddim-uniform-nfe4.zip") as archive:
        assert sum(name.endswith(".png") for name in archive.namelist()) == 48
    with np.load(tmp_path / "npz" / "ddim-uniform-nfe4.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (48, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8


def test_trainings_are_repeated_on_the_command_line(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    config = LatentModelConfig(schedule="cosine", dit=TINY_DIT)
    other = LatentTask(tmp_path / "again", pipeline.tokenizer, model=config, train=replace(TINY_LATENT, seed=1))
    train_latent.train(other)
    flags = ("--model", pipeline.model, "--features", pipeline.features, "--out", tmp_path / "out")
    succeed("evaluate", *flags, "--repeats", tmp_path / "again", "--solvers", "ddim", *SMALL)
    assert [row["trainings"] for row in rows(tmp_path / "out")] == [1, 2]


def test_samples_of_another_size_are_brought_to_the_references(
    pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    (tmp_path / "samples").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 12, 16), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "samples" / f"{index:03d}.jpg")
    flags = ("--data", "digits", "--features", pipeline.features, "--images", tmp_path / "samples")
    more = ("--out", tmp_path / "out", "--blocks", 1, "--metrics", "")
    done = succeed("evaluate", *flags, *more, "--images-resize", 8)
    assert rows(tmp_path / "out")[1]["n"] == 40
    assert "lossy" in done.out and "lossy" in (tmp_path / "out" / "report.md").read_text()


def test_online_evaluation_as_documented(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    shutil.copytree(pipeline.features, tmp_path / "features")
    dit = ("--model.dit.width", 32, "--model.dit.depth", 2, "--model.dit.heads", 2)
    early = ("--measure-every", 2, "--early.nfe", 4, 5, "--early.n", 24, "--early.features", tmp_path / "features")
    train = ("--steps", 4, "--batch-size", 32, "--warmup", 0, "--out", tmp_path / "run")
    succeed("train_latent", "digits-dit", "--tokenizer", pipeline.tokenizer, *dit, *early, *train)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    answers = [record for record in records if record.get("early")]
    assert [answer["step"] for answer in answers] == [2, 4]
    assert all({"distance_nfe_4", "distance_nfe_5"} <= set(answer) and answer["n"] == 24 for answer in answers)
