"""encode.py and train_latent.py on folders of latents: every flag, several processes, going on, what cannot be used."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from multiprocess import launch
from pipelines import SCRIPTS, TINY, TINY_DIT, Pipeline, Script

from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.diffusion.load import load_tokenizer
from midway.gen.files.records import open_records
from midway.gen.flags.tasks import TokenizerConfig, TokenizerTask
from midway.gen.tokenizer.latents import open_latents
from midway.gen.trainings import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
DIT = f"--model.dit.width {TINY_DIT.width} --model.dit.depth 1 --model.dit.heads 2 --steps 2 --batch-size 16"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def of_windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 6x6 windows of digits."""
    out, model = tmp_path_factory.mktemp("windows") / "tokenizer", TokenizerConfig("kl", dim=2, width=8, blocks=1)
    train_tokenizer.train(TokenizerTask(out, DataConfig(crop=6), model, train=replace(TINY, steps=1)))
    return out


def test_ten_crops_in_float16_by_two_processes_are_trained_on(
    of_windows: Path, succeed: Script, script: Script, tmp_path: Path
) -> None:
    flags = ["--tokenizer", of_windows, "--crops", 10, "--dtype", "float16", "--batch-size", 90]
    printed = launch(SCRIPTS / "encode.py", *flags, "--out", tmp_path / "two", processes=2)
    assert "saved" in printed[0] and printed[1] == ""
    one = succeed("encode", *flags)
    (default,) = of_windows.glob("latents-*-crops10-float16")
    assert contents(default) == contents(tmp_path / "two")
    records = open_records(default, "latents", "")
    assert records.shape == (10, 2, 3, 3) and records.dtype == "float16"
    assert f"float16: relative RMS error {records.facts['rms_error']:.2e}" in one.out
    for flip in ("", "--flip"):
        succeed(
            f"train_latent digits-dit --tokenizer {of_windows} --latents {default} {flip} {DIT} --out {tmp_path}/{flip}m"
        )
    done = script("encode", *flags)
    assert done.code == 2 and "exists" in done.err


def test_training_encodes_with_all_its_processes(of_windows: Path, succeed: Script, tmp_path: Path) -> None:
    """Which it does not do again, and what encode.py writes is the same."""
    command = f"digits-dit --tokenizer {of_windows} --flip {DIT} --out {tmp_path}/m".split()
    launch(SCRIPTS / "train_latent.py", *command, processes=2)
    (made,) = of_windows.glob("latents-*-flip")
    found = contents(made)
    succeed(f"encode --tokenizer {of_windows} --flip --overwrite --dtype float32")
    assert contents(made) == found
    tokenizer, data = load_tokenizer(of_windows)
    assert open_latents(made, load_splits(data).train, tokenizer, flip=True).read(torch.arange(3)).views.shape[1] == 2


def test_crops_of_whole_images_are_a_usage_error(pipeline: Pipeline, script: Script, tmp_path: Path) -> None:
    done = script("encode", "--tokenizer", pipeline.tokenizer, "--crops", 10, "--out", tmp_path / "latents")
    assert done.code == 2 and "--crops 10" in done.err and "--crop on larger" in done.err
    assert not (tmp_path / "latents").exists()
