"""--tile of the commands that encode, train on latents and measure: other latents, apart from those of whole images."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import Pipeline, Script

from midway.gen.core.runs import Run
from midway.gen.data.splits import load_splits
from midway.gen.diffusion.load import load_model, load_tokenizer
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.evaluation.sources import EvaluatedLatentModel, SolverSource
from midway.gen.tokenizer.latents import open_latents
from midway.gen.tokenizer.stored import tokenizer_hash
from midway.tokenizers.tiling import tile_networks

CPU = torch.device("cpu")
TILES = "--tile 4 --tile-margin 0"


@pytest.fixture
def tokenizer_run(pipeline: Pipeline, tmp_path: Path) -> Path:
    """A copy without latents."""
    shutil.copytree(pipeline.tokenizer, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("latents-*"))
    return tmp_path / "tokenizer"


def test_latents_of_tiles_are_stored_apart_and_are_those_of_the_tiled_networks(
    tokenizer_run: Path, succeed: Script
) -> None:
    succeed(f"encode --tokenizer {tokenizer_run}")
    succeed(f"encode --tokenizer {tokenizer_run} {TILES}")
    folders = sorted(tokenizer_run.glob("latents-*"))
    assert len(folders) == 2
    whole, data = load_tokenizer(tokenizer_run)
    tiled, _ = load_tokenizer(tokenizer_run)
    tile_networks(tiled, 4, 0)
    train = load_splits(data).train
    named = {tokenizer_hash(each)[:8]: each for each in (whole, tiled)}
    assert len(named) == 2
    means = [open_latents(next(f for f in folders if key in f.name), train, each).mean for key, each in named.items()]
    assert not torch.equal(*means), "a decoder of 8x8 digits is not local in tiles of 4 pixels"


def test_a_latent_model_is_trained_on_the_latents_of_its_tiles(
    tokenizer_run: Path, succeed: Script, script: Script, tmp_path: Path
) -> None:
    cache = tmp_path / "tiled"
    succeed(f"encode --tokenizer {tokenizer_run} --out {cache} {TILES}")
    line = f"train_latent digits-dit --tokenizer {tokenizer_run} --latents {cache} --out {tmp_path}/model --steps 1"
    line += " --model.dit.width 16 --model.dit.depth 1"
    stale = script(*line.split())
    assert stale.code == 3 and "tokenizer" in stale.err
    succeed(f"{line} {TILES}")
    assert Run.open(tmp_path / "model", "latent_model").config["tile"] == 4
    resumed = succeed(f"{line} {TILES} --resume auto --tile-margin 0")
    assert "error" not in resumed.err


def test_measurements_of_tiles_are_kept_apart(pipeline: Pipeline) -> None:
    trained = load_model(pipeline.model, CPU)
    sampler = make_samplers(trained, "ddim", 4, SamplerConfig())["uniform"]
    source = SolverSource(trained, sampler, SamplerConfig().sampling())
    before, described = source.identity, EvaluatedLatentModel(trained).description
    tile_networks(trained.tokenizer, 4, 0)
    assert source.identity == {**before, "tiles": [4, 0]} and "tiles" not in before
    assert EvaluatedLatentModel(replace(trained)).description == f"{described}; decoded in tiles of 4 pixels, margin 0"


def test_a_sweep_decodes_in_tiles(pipeline: Pipeline, succeed: Script, script: Script, tmp_path: Path) -> None:
    line = f"evaluate --model {pipeline.model} --features {pipeline.features} --solvers ddim --nfe 4 --grids uniform"
    line += " --samples 20 --blocks 1 --exact-nfe 0"
    texts = []
    for name, tiles in (("whole", ""), ("tiled", TILES)):
        succeed(f"{line} --out {tmp_path}/{name} {tiles}")
        texts.append((tmp_path / name / "results.csv").read_text())
    assert texts[0] != texts[1]
    assert "decoded in tiles of 4 pixels" in (tmp_path / "tiled" / "report.md").read_text()
    bad = script(*f"{line} --out {tmp_path}/bad --tile 5".split())
    assert bad.code == 2 and "--tile 5 --tile-margin 32" in bad.err
    alone = script(*f"evaluate --images x --data digits --out {tmp_path}/bad --tile 4".split())
    assert alone.code == 2 and "only tokenizers of ours are tiled" in alone.err
