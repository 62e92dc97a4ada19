"""The scripts as a user calls them: every flag has an effect, images depend on their seeds alone, budgets are exact."""

import csv
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from multiprocess import launch
from PIL import Image
from pipelines import SCRIPTS, TINY, TINY_DIT, TINY_LATENT, Outcome, Pipeline, Script
from regression import records
from resuming import contents, newest, seal, unchanged
from safetensors.torch import load_file, save_file
from sweeps import measured, sweep_task
from torch import Tensor

from midway.gen.commands import evaluate
from midway.gen.core.config import from_dict, read_yaml, to_dict, write_yaml
from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.runs import Run
from midway.gen.data import places
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.diffusion import sampling
from midway.gen.diffusion.load import TrainedModel, load_model, load_tokenizer, solver_path
from midway.gen.diffusion.model import Guidance, LatentModel, LatentModelConfig
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.diffusion.sampling import Samples, SamplingConfig, decode, sample_latents
from midway.gen.distillation.amed import DistillConfig
from midway.gen.distillation.table import TRIAL, TableConfig
from midway.gen.evaluation.records import LIMITS, Measurement, to_records
from midway.gen.files.records import open_records
from midway.gen.flags.cli import resolve
from midway.gen.flags.tasks import LatentTask, QuantizerName, TokenizerConfig, TokenizerTask
from midway.gen.proving import report as proving
from midway.gen.recipes.baseline_recipes import BASELINE_RECIPES
from midway.gen.recipes.generic import GENERIC_TOKENIZERS
from midway.gen.recipes.prior_recipes import PRIOR_RECIPES
from midway.gen.recipes.recipes import LATENT_RECIPES, TOKENIZER_RECIPES
from midway.gen.report import likelihood, tokenizers
from midway.gen.sweep.choice import Choice
from midway.gen.sweep.run import Sweep
from midway.gen.tokenizer.objective import evaluate_tokenizer
from midway.gen.training.config import TrainConfig
from midway.gen.trainings import train_latent, train_solver, train_tokenizer
from midway.samplers.grids import GRIDS
from midway.samplers.prediction import TARGETS
from midway.samplers.schedule import SCHEDULES
from midway.samplers.solvers import ALIASES, SOLVERS
from midway.samplers.table import Table
from midway.tokenizers.networks import Upsample
from midway.tokenizers.quantizers import QUANTIZERS

ALL_SCRIPTS = sorted(p.stem for p in SCRIPTS.glob("*.py") if '__name__ == "__main__"' in p.read_text())
REPORT = ("results.csv", "results.jsonl", "report.md", "report.html", "distance_vs_nfe.png", "distance_vs_seconds.png")
pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
TINY_FLAGS = ("--steps", "2", "--batch-size", "16", "--warmup", "0", "--log-every", "1")


def _fresh(*calls: str) -> list[Outcome]:
    """Run scripts, each given as its name and flags, one after another in one new process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    if not torch.cuda.is_available():
        environment.pop("ACCELERATE_USE_CPU", None)  # scripts find the device themselves
    lines = json.dumps(
        [f"{SCRIPTS}/{name}.py {flags}".split() for name, flags in (call.split(" ", 1) for call in calls)]
    )
    command = [sys.executable, SCRIPTS.parent / "tests/support/run_scripts.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, input=lines)
    return [Outcome(*outcome) for outcome in json.loads(done.stdout.splitlines()[-1])]


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def _weights(run: Path, name: str) -> dict[str, Tensor]:
    """The one file of that name in the run's newest checkpoint."""
    (file,) = (run / "checkpoints").glob(f"step-*/{name}")
    return load_file(file)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether these are the same tensors by the same names, to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


TOKENIZER_FILE = "tokenizer/diffusion_pytorch_model.safetensors"


# ---- command lines ----


def _commands(pipeline: Pipeline, root: Path) -> dict[str, str]:
    """Flags of every script, which writes to the folder of its name in `root`."""
    model, features, tokenizer = pipeline.model, pipeline.features, pipeline.tokenizer
    vae = pipeline.root / "vae"
    AutoencoderTiny(1, 1, (8, 8), (8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(vae)
    tiny = " ".join(TINY_FLAGS)
    distill = "--distill.analytic-first True --distill.trajectories 16 --distill.teacher-steps 4"
    flags = {
        "train_tokenizer": f"digits-fsq {tiny} --model.levels 5 5 --model.width 16",
        "import_tokenizer": f"--source {vae}",
        "evaluate_tokenizer": f"--tokenizers {tokenizer} --features {features} --n 16",
        "train_latent": f"digits-flow {tiny} --tokenizer {tokenizer}",
        "train_prior": f"digits-causal {tiny} --tokenizer {tokenizer} --model.width 16 --model.depth 1 --validate-every 1",
        "train_features": f"{tiny} --width 8",
        "train_baseline": f"digits-vae {tiny} --model.width 8 --validation-images 20",
        "evaluate_likelihood": f"--models {pipeline.baseline} --features pixels --n 16 --iwae 2 --draws 2",
        "evaluate": f"--model {model} --features {features} --solvers euler,heun --nfe 4 --n 16 --exact-nfe 8",
        "posthoc_ema": f"{model} --std 0.08",
        "data": "check digits",
        "prove_solvers": "--data digits --axes 6 --components 2 --n 64 --blocks 1 --nfe 3 --solvers ddim --learned none",
    }
    return {name: f"{words} --out {root}/{name}" for name, words in flags.items()} | {
        "encode": f"--tokenizer {tokenizer} --out {root}/encode/latents.safetensors",
        "train_solver": f"amed-predictor --model {model} --nfe 5 --grid shift {tiny} {distill}",
        "sample": f"--model {model} --solver ddim --nfe 3 --n 4 --seed 0 --out {root}/sample/grid.png",
        "verify_resume": f"{model} --steps 4",
    }


ELSEWHERE = {
    "demo",
    "download_weights",
    "check_metric",
    "completion",
    "finetune",
    "merge_adapter",
    "import_model",
}
"""test_demo.py; test_weights.py, since it needs a network or a server; test_check_metric.py; test_midway_command.py;
test_adapter_commands.py; test_import_model.py."""


@pytest.fixture(scope="module")
def called(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Outcome, Path]]:
    """Every script as a command line, with the directory that it was given."""
    root = tmp_path_factory.mktemp("called")
    calls = _commands(pipeline, root)
    outcomes = _fresh(*(f"{name} {flags}" for name, flags in calls.items()))
    return {name: (outcome, root / name) for name, outcome in zip(calls, outcomes, strict=True)}


@pytest.mark.parametrize("name", [s for s in ALL_SCRIPTS if s not in ELSEWHERE])
def test_a_script_works_as_a_command_line(
    name: str, called: dict[str, tuple[Outcome, Path]], pipeline: Pipeline
) -> None:
    done, out = called[name]
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    solver = pipeline.model / "solvers/amed-predictor-shift-nfe5/checkpoints/step-2/solver.safetensors"
    imported = (f"checkpoints/step-0/{TOKENIZER_FILE}", TOKENIZER_FILE, "tokenizer/README.md")
    expected: dict[str, tuple[str | Path, ...]] = {
        "train_tokenizer": (f"checkpoints/step-2/{TOKENIZER_FILE}", "env.json"),
        "encode": ("latents.safetensors",),
        "import_tokenizer": imported,
        "evaluate_tokenizer": tokenizers.FILES,
        "train_latent": ("checkpoints/step-2/ema.safetensors", "samples/averaged-000002-nfe20.png"),
        "train_prior": ("best/step-2/ema.safetensors", "model/README.md", "samples/averaged-000002-nfe4.png"),
        "train_features": ("checkpoints/step-2/features.safetensors",),
        "train_baseline": ("best/step-2/ema.safetensors", "samples/traversals.png"),
        "evaluate_likelihood": likelihood.FILES,
        "train_solver": (solver,),
        "sample": ("grid.png",),
        "evaluate": REPORT,
        "posthoc_ema": ("checkpoints/step-25/ema.safetensors",),
        "verify_resume": (),
        "data": ("data.json",),
        "prove_solvers": proving.FILES,
    }
    assert all((out / file).stat().st_size > 0 for file in expected[name])
    assert all(_pixels(out / file).size > 1 for file in expected[name] if str(file).endswith(".png"))


EVERY_TRAINING_FLAG = (
    "--steps 6 --batch-size 16 --optimizer muon --lr 1e-3 --warmup 1 --decay inverse_sqrt --plateau 3 --weight-decay 0.01 "
    "--betas 0.9 0.95 --clip 0.5 --ema 0.9 --posthoc 0.05 0.1 --posthoc-every 2 --accumulation 2 --precision bf16 "
    "--gradient-checkpointing --deterministic --patience 3 --max-seconds 100 --save-every 2 --save-seconds 50 --keep 1 "
    "--log-every 2 --preview-every 3 --log-with tensorboard --seed 3 --flip --model.dit.dropout 0.1 --model.dit.depth 2"
)


def test_every_training_flag_together(pipeline: Pipeline, tmp_path: Path) -> None:
    """A run with all of them stops at --max-steps, resumes, and writes all files."""
    pytest.importorskip("tensorboard", reason="a tracker to log with")
    out = tmp_path / "out"
    call = f"train_latent digits-flow --tokenizer {pipeline.tokenizer} --out {out} {EVERY_TRAINING_FLAG} --resume auto"
    first, second = _fresh(f"{call} --max-steps 3", call)
    assert first.code == 0 and "stopped at step 3 of 6" in first.out, first.err
    assert second.code == 0 and "resuming from step 3" in second.out, second.err
    assert "16 samples a step, 1 process(es) x 2 micro-batch(es) of 8" in second.out
    assert [r["step"] for r in records(out)] == [2, 4, 6]
    assert [r["lr"] for r in records(out)] == pytest.approx([1e-3, 1e-3, 1e-3 * math.sqrt(3 / 5)])
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["latest", "step-6"]
    assert len(list((out / "posthoc").iterdir())) == 6
    assert sorted(p.name for p in (out / "samples").iterdir()) == [f"averaged-00000{n}-nfe20.png" for n in (3, 6)]
    assert list(out.rglob("events.out.tfevents*"))
    assert len(json.loads((out / "env.json").read_text())["starts"]) == 2


RECIPES = {
    "train_tokenizer": TOKENIZER_RECIPES,
    "train_latent": LATENT_RECIPES,
    "train_prior": PRIOR_RECIPES,
    "train_baseline": BASELINE_RECIPES,
}


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_help_ends_with_0_and_names_flags_and_recipes(name: str, script: Script) -> None:
    done = script(name, "--help")
    assert done.code == 0 and done.err == ""
    assert all(word in done.out for word in ("usage", "--help", *RECIPES.get(name, ())))


LEARNED = ("amed-predictor", "amed")
"""What the pipeline learns, at 4 evaluations."""

# ---- an image depends on its seed alone ----

WAYS = {
    "heun": ("heun", SamplerConfig(grids=("karras",))),
    "dpmpp2m guided": ("dpmpp2m", SamplerConfig(grids=("uniform",), guidance=2.0)),
    "ddim with noise": ("ddim", SamplerConfig(grids=("uniform",), eta=0.8)),
    "amed-predictor": ("amed-predictor", SamplerConfig(grids=("uniform",))),
    "amed": ("amed", SamplerConfig(grids=("uniform",))),
}


def _draw(
    trained: TrainedModel, solver: str, nfe: int, seeds: Tensor, config: SamplerConfig, batch_size: int
) -> Samples:
    (plan,) = make_samplers(trained, solver, nfe, config).values()
    return sample_latents(trained, plan, seeds, replace(config.sampling(), batch_size=batch_size))


@pytest.mark.parametrize("way", WAYS)
def test_an_image_depends_on_its_seed_alone(way: str, pipeline: Pipeline) -> None:
    (solver, config), trained = WAYS[way], pipeline.load()
    seeds = torch.arange(7, 12)
    together = _draw(trained, solver, 4, seeds, config, 5).latents
    in_twos = _draw(trained, solver, 4, seeds, config, 2).latents
    alone = torch.cat([_draw(trained, solver, 4, seed[None], config, 5).latents for seed in seeds])
    backwards = _draw(trained, solver, 4, seeds.flip(0), config, 3).latents.flip(0)
    for other in (in_twos, alone, backwards):
        # a matrix product's last bits depend on the batch, and Heun's first step magnifies them a hundredfold
        torch.testing.assert_close(other, together, rtol=1e-5, atol=1e-4 if solver == "heun" else 1e-5)
        assert torch.equal(decode(trained, other), decode(trained, together))
    assert not torch.allclose(together[:1], together[1:], atol=1e-2), "different seeds must differ"


def test_the_seed_test_sees_noise_that_follows_the_batch(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one stream for all samples the test above fails, so it can fail."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        sampling.SeededNoise, "__call__", lambda self, x: torch.randn(x.shape, generator=generator).to(x)
    )
    with pytest.raises(AssertionError):
        test_an_image_depends_on_its_seed_alone("ddim with noise", pipeline)


def test_the_predictor_gives_samples_of_their_own(pipeline: Pipeline) -> None:
    """The learned solvers are neither each other nor DPM-Solver-2, which both start from."""
    trained, seeds, config = pipeline.load(), torch.arange(4), SamplerConfig(grids=("uniform",))
    found = [_draw(trained, solver, 4, seeds, config, 4).latents for solver in ("dpm2", *LEARNED)]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(found) for b in found[:i])


# ---- budgets ----


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", [*SOLVERS, *LEARNED])
def test_the_network_is_evaluated_as_often_as_the_budget(solver: str, guidance: float, pipeline: Pipeline) -> None:
    trained = pipeline.load()
    calls: list[int] = []
    trained.model.network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    nfe = (
        4 if solver in LEARNED else 12 - SOLVERS[solver].to_data
    )  # solvers of 1, 2, 3 or 4 evaluations a step can spend 12
    (plan,) = make_samplers(trained, solver, nfe, SamplerConfig(grids=("uniform",))).values()
    counted = sample_latents(trained, plan, torch.arange(3), SamplingConfig(Guidance(guidance))).nfe
    assert counted == nfe * guidance, "guidance 2 runs the network twice, which here is also the factor"
    assert sum(calls) == 3 * counted


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_analytic_first_step_saves_one_evaluation(solver: str, pipeline: Pipeline) -> None:
    trained, seeds = pipeline.load(), torch.arange(3)
    plain, analytic = SamplerConfig(grids=("uniform",)), SamplerConfig(grids=("uniform",), analytic_first=True)
    nfe = 12 - SOLVERS[solver].to_data
    with_it = _draw(trained, solver, nfe - 1, seeds, analytic, 3)
    assert with_it.nfe == nfe - 1
    assert with_it.latents.isfinite().all()
    without = _draw(trained, solver, nfe, seeds, plain, 3)  # as many steps
    assert not torch.equal(with_it.latents, without.latents)


# ---- sample.py ----


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    """Grids by their flags, each drawn once."""
    return {}


@pytest.fixture
def grid_of(
    succeed: Script, pipeline: Pipeline, tmp_path: Path, drawn: dict[str, np.ndarray]
) -> Callable[..., np.ndarray]:
    """Pixels of a grid of 4 by sample.py with these flags over a base call."""

    def draw(flags: Flags | None = None) -> np.ndarray:
        values: Flags = {"solver": "ddim", "nfe": 4, "grid": "uniform", "n": 4, "seed": 3, **(flags or {})}
        if str(values) not in drawn:
            words = {k: v if isinstance(v, tuple) else () if v is True else (v,) for k, v in values.items()}
            arguments = [word for k, v in words.items() for word in (f"--{k}", *v)]
            done = succeed("sample", "--model", pipeline.model, "--out", tmp_path / "grid.png", *arguments)
            assert f"{values['n']} images" in done.out
            drawn[str(values)] = _pixels(tmp_path / "grid.png")
        return drawn[str(values)]

    return draw


Flags = dict[str, object]
GUIDED: Flags = {"guidance": 8.0}
IN_INTERVAL: Flags = {**GUIDED, "guidance-interval": (0.1, 5.0)}
ODD_HEUN: Flags = {"solver": "heun", "nfe": 5, "analytic-first": True}
CHANGES: list[tuple[Flags, Flags]] = [
    *(({}, {"solver": name}) for name in ("heun", "amed-predictor", "amed", "unipc2", "dpmpp2m_sde")),
    *(({}, {"grid": name}) for name in ("logsnr", "karras", "shift", "quadratic", "vp")),
    ({"grid": "karras"}, {"grid": "gits"}),
    *(({}, {"grid": "ays_sd"}), ({"grid": "ays_sd"}, {"grid": "ays_sdxl"}), ({}, {"solver": "rk45"})),
    ({"solver": "rk45"}, {"solver": "rk45", "atol": 0.3}),
    ({"solver": "rk45", "atol": 1.0}, {"solver": "rk45", "atol": 1.0, "rtol": 1.0}),
    *(({}, {"nfe": 9}), ({}, {"seed": 4}), ({}, {"labels": "5"}), ({}, {"analytic-first": True}), ({}, {"eta": 1.0})),
    *(({}, GUIDED), ({}, IN_INTERVAL), (GUIDED, IN_INTERVAL), ({"solver": "heun", "nfe": 6}, ODD_HEUN)),
]


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)
def test_a_flag_of_sample_changes_the_images(before: Flags, after: Flags, grid_of: Callable[..., np.ndarray]) -> None:
    assert grid_of(before).shape == grid_of(after).shape
    assert not np.array_equal(grid_of(before), grid_of(after))


@pytest.fixture(scope="module")
def twin(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latent model with weights that differ in the last digits, without its solvers."""
    run = tmp_path_factory.mktemp("twin") / "model"
    shutil.copytree(pipeline.model, run, ignore=shutil.ignore_patterns("solvers"))
    (file,) = run.glob("checkpoints/step-*/ema.safetensors")
    save_file({name: value * (1 + 1e-7) for name, value in load_file(file).items()}, file)
    seal(file.parent)
    return run


def test_flags_without_an_effect_change_no_image(grid_of: Callable[..., np.ndarray], twin: Path) -> None:
    """Guidance at all noise levels, guidance by the same but for rounding, and a graph, which a CPU does not have."""
    assert np.array_equal(grid_of(GUIDED), grid_of({**GUIDED, "guidance-interval": (0.0, 1e9)}))
    assert np.array_equal(grid_of(), grid_of({**GUIDED, "guide": twin}))
    assert np.array_equal(grid_of(), grid_of({"graph": True}))


def test_bf16_reaches_the_network_and_nothing_else(
    grid_of: Callable[..., np.ndarray], pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states stay float32: only a little changes, too little for the pixels of these codes."""
    trained, config = pipeline.load(), SamplerConfig(grids=("uniform",))
    whole, half = (
        _draw(trained, "ddim", 4, torch.arange(4), replace(config, precision=precision), 4).latents
        for precision in ("no", "bf16")
    )
    assert half.dtype == torch.float32
    assert 1e-5 < (whole - half).abs().max() < 0.1
    used: list[str] = []
    real = sampling._autocast
    monkeypatch.setattr(
        sampling, "_autocast", lambda device, config: used.append(config.precision) or real(device, config)
    )
    grid_of({"precision": "bf16"})
    assert used == ["bf16"]


@pytest.mark.parametrize("method", ["gaussian", "picard"])
def test_sampling_in_parallel_gives_the_same_images_in_fewer_waves(
    method: str, grid_of: Callable[..., np.ndarray], succeed: Script, pipeline: Pipeline, tmp_path: Path
) -> None:
    flags = {"nfe": 20, "grid": "logsnr"}
    assert np.array_equal(grid_of(flags), grid_of({**flags, "parallel": method, "tolerance": 1e-4, "window": 15}))
    call = f"sample --model {pipeline.model} --out {tmp_path}/grid.png --solver ddim --nfe 20 --n 4 --parallel {method}"
    done = succeed(call)
    waves = int(done.out.split(" waves")[0].split()[-1])
    assert 1 < waves < 20


def test_one_tile_changes_no_image_and_four_do(grid_of: Callable[..., np.ndarray]) -> None:
    """GroupNorm's statistics are those of a tile."""
    whole = grid_of()
    assert np.array_equal(whole, grid_of({"tile": 8, "tile-margin": 0}))
    assert not np.array_equal(whole, grid_of({"tile": 4, "tile-margin": 0}))


def test_sample_draws_the_seeds_that_follow_its_seed(grid_of: Callable[..., np.ndarray]) -> None:
    """Image k of `--seed 3` is image k - 1 of `--seed 4`: both rows of two shift by one."""
    cell = grid_of().shape[0] // 2
    first, shifted = grid_of(), grid_of({"seed": 4})
    assert np.array_equal(first[:cell, cell:], shifted[:cell, :cell])
    assert np.array_equal(first[cell:, cell:], shifted[cell:, :cell])


def test_n_and_batch_size_change_the_count_and_the_batches(
    grid_of: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    four, nine = grid_of(), grid_of({"n": 9})
    assert nine.shape[0] == four.shape[0] // 2 * 3
    cell = four.shape[0] // 2
    assert np.array_equal(four[:cell], nine[:cell, : 2 * cell])
    sizes: list[int] = []
    real = sampling.noise_of
    monkeypatch.setattr(sampling, "noise_of", lambda seeds, *more: sizes.append(len(seeds)) or real(seeds, *more))
    assert np.array_equal(grid_of({"batch-size": 3}), four)
    assert sizes == [3, 1]


# ---- evaluate.py ----


SWEPT = {"solvers": "ddim,heun,amed-predictor,amed", "grids": "uniform,logsnr", "blocks": 3}


@pytest.fixture(scope="module")
def swept(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep]:
    """Two tables on two grids, and both learned solvers."""
    out = tmp_path_factory.mktemp("report")
    return out, evaluate.run(sweep_task(pipeline, out, **SWEPT))


def _rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "results.csv").read_text().splitlines()))


def test_results_csv_has_the_columns_and_the_limits_once_and_first(swept: tuple[Path, Sweep]) -> None:
    rows = _rows(swept[0])
    assert {"solver", "grid", "nfe", "distance", "to_exact", "rmse", "n", "seconds", "features", "seeds"} <= set(
        rows[0]
    )
    assert [row["solver"] for row in rows[:3]] == list(LIMITS) and not {row["solver"] for row in rows[3:]} & {*LIMITS}
    assert all(float(row["distance"]) >= 0 and row["rmse"] == row["to_exact"] == "" for row in rows[:3])
    assert {row["features"] for row in rows} == {rows[0]["features"]} and "@" in rows[0]["features"]
    assert {(row["n"], row["seeds"], row["blocks"]) for row in rows[2:]} == {("20", "0-59", "3")}
    assert all(math.isfinite(float(row[c])) for row in rows[3:] for c in ("distance", "to_exact", "rmse", "seconds"))


def test_every_solver_is_measured_on_one_grid(swept: tuple[Path, Sweep]) -> None:
    grids = {(row["solver"], row["nfe"]): row["grid"] for row in _rows(swept[0])[3:]}
    assert grids.keys() == {(solver, "4") for solver in ("ddim", "heun", *LEARNED)} and len(_rows(swept[0])) == 7
    choice = swept[1].choice
    assert isinstance(choice, Choice) and choice.seeds == "60-67"
    for solver in ("ddim", "heun"):
        figures = {grid: choice.figures[solver, grid, 4] for grid in ("uniform", "logsnr")}
        assert grids[solver, "4"] == min(figures, key=lambda grid: figures[grid])


def test_the_training_cost_of_a_learned_solver_is_reported(swept: tuple[Path, Sweep]) -> None:
    costs = {row["solver"]: int(row["training_nfe"]) for row in _rows(swept[0])}
    assert costs["ddim"] == costs["heun"] == 0
    assert costs["amed-predictor"] == costs["amed"] > 0


def test_the_report_is_complete_and_results_jsonl_agrees_with_the_csv(swept: tuple[Path, Sweep]) -> None:
    out, sweep = swept
    assert all((out / name).stat().st_size > 0 for name in REPORT)
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert records == json.loads(json.dumps(to_records(sweep.measurements)))
    assert [r["distance"] for r in records] == [float(row["distance"]) for row in _rows(out)]
    page = (out / "report.html").read_text()
    assert page.count("data:image/") >= 2 + len(sweep.grids) and "<svg" in page


def test_more_evaluations_bring_heun_to_the_fine_solution(pipeline: Pipeline, tmp_path: Path) -> None:
    sweep = evaluate.run(sweep_task(pipeline, tmp_path, solvers="heun", nfe="4,8,64", exact_nfe=256, blocks=1))
    coarse, middle, fine = (cell.value("rmse") for cell in measured(sweep))
    assert coarse is not None and middle is not None and fine is not None
    assert fine < 0.1 * coarse and middle < 0.5 * coarse


@pytest.fixture(scope="module")
def base(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep."""
    out = tmp_path_factory.mktemp("base")
    evaluate.run(sweep_task(pipeline, out))
    return out


@pytest.fixture(scope="module")
def base_cell(base: Path, pipeline: Pipeline) -> Measurement:
    return measured(evaluate.run(sweep_task(pipeline, base)))[0]


EFFECTS: dict[str, tuple[dict[str, Any], Callable[[Measurement, Measurement], bool]]] = {
    "solvers": ({"solvers": "euler"}, lambda a, b: b.solver == "euler" and a.value("rmse") != b.value("rmse")),
    "nfe": ({"nfe": "5"}, lambda a, b: b.nfe == 5 and a.value("rmse") != b.value("rmse")),
    "grids": ({"grids": "karras"}, lambda a, b: b.grid == "karras" and a.value("rmse") != b.value("rmse")),
    "n": ({"n": 30}, lambda a, b: b.n == 30 and b.seeds == "0-59"),
    "blocks": (
        {"blocks": 1},
        lambda a, b: (b.blocks, b.std("distance")) == (1, None) and a.std("distance") is not None,
    ),
    "seed": ({"seed": 100}, lambda a, b: b.seeds == "100-139" and a.value("rmse") != b.value("rmse")),
    "guidance": ({"guidance": 4.0}, lambda a, b: b.nfe == 2 * a.nfe and a.value("rmse") != b.value("rmse")),
    "guidance_interval": ({"guidance": 4.0, "guidance_interval": (0.1, 5.0)}, lambda a, b: a.nfe < b.nfe < 2 * a.nfe),
    "precision": ({"precision": "bf16"}, lambda a, b: a.nfe == b.nfe and a.value("rmse") != b.value("rmse")),
    "graph": ({"graph": True, "fresh": True}, lambda a, b: a.nfe == b.nfe and a.value("rmse") == b.value("rmse")),
    "analytic_first": ({"analytic_first": True}, lambda a, b: a.nfe == b.nfe and a.value("rmse") != b.value("rmse")),
    "metrics": ({"metrics": "kid,precision"}, lambda a, b: "precision" in b.metrics.keys() - a.metrics.keys()),
    "eta": ({"eta": 1.0}, lambda a, b: a.nfe == b.nfe and a.value("rmse") != b.value("rmse")),
    "exact_nfe": (
        {"exact_nfe": 4},
        lambda a, b: a.value("rmse") != b.value("rmse") and a.distance == b.distance,
    ),
}


@pytest.mark.parametrize("flag", EFFECTS)
def test_a_flag_of_evaluate_changes_what_is_measured(
    flag: str, base: Path, base_cell: Measurement, pipeline: Pipeline, tmp_path: Path
) -> None:
    """Also in a folder with measurements of the base, which are not taken for those with the flag."""
    changes, differs = EFFECTS[flag]
    out = Path(shutil.copytree(base, tmp_path / "out"))
    sweep = evaluate.run(sweep_task(pipeline, out, **changes))
    assert len(measured(sweep)) == 1
    assert differs(base_cell, measured(sweep)[0])
    assert set(sweep.grids) == {(measured(sweep)[0].solver, measured(sweep)[0].nfe)}, "pictures for the report"


def test_a_model_guided_by_the_same_but_for_rounding_is_measured_unguided(
    base_cell: Measurement, pipeline: Pipeline, twin: Path, tmp_path: Path
) -> None:
    """At twice the evaluations: both networks are counted."""
    sweep = evaluate.run(sweep_task(pipeline, tmp_path, guidance=4.0, guide=twin))
    assert measured(sweep)[0].nfe == 2 * base_cell.nfe
    assert measured(sweep)[0].value("rmse") == pytest.approx(base_cell.value("rmse"), rel=1e-3)


def test_budgets_out_of_reach_are_left_out_on_request(pipeline: Pipeline, tmp_path: Path) -> None:
    sweep = evaluate.run(
        sweep_task(pipeline, tmp_path, solvers="ddim,heun", nfe="3,4", skip_unreachable=True, blocks=1)
    )
    assert [(cell.solver, cell.nfe) for cell in measured(sweep)] == [("ddim", 3), ("ddim", 4), ("heun", 4)]
    with pytest.raises(UsageError, match="3 network evaluations cannot be reached"):
        evaluate.run(sweep_task(pipeline, tmp_path, solvers="ddim,heun", nfe="3,4"))


def test_the_training_cost_of_a_fitted_grid_is_reported(pipeline: Pipeline, tmp_path: Path) -> None:
    fitted, uniform = (
        measured(evaluate.run(sweep_task(pipeline, tmp_path / grid, grids=grid, nfe="5")))[0]
        for grid in ("gits", "uniform")
    )
    tried = (fitted.training_nfe // 64 - 60) // 5  # paths on which the solver was run
    assert tried in (0, 2, 3, 4)
    assert (fitted.grid, fitted.training_nfe, uniform.training_nfe) == ("gits", 64 * (60 + tried * 5), 0)
    assert fitted.value("rmse") != uniform.value("rmse") and fitted.nfe == uniform.nfe == 5


def test_batch_size_title_and_out_of_evaluate(
    base_cell: Measurement, succeed: Script, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 7 of 40 images; the distance may differ in the last bits of the latents alone."""
    sizes: list[int] = []
    real = sampling.start_state
    monkeypatch.setattr(sampling, "start_state", lambda *a: sizes.append(len(a[2])) or real(*a))
    out = tmp_path / "there"
    flags = "--solvers ddim --nfe 4 --grids uniform --n 20 --blocks 2 --exact-nfe 8 --batch-size 7 --title Sieben"
    succeed(f"evaluate --model {pipeline.model} --features {pipeline.features} --out {out} {flags}")
    choice = 2 * [*18 * [7], 2]
    scored = 5 * [7, 7, 6]
    assert sizes == choice + scored, "128 seeds by the exact solution, twice; an untimed block, two of it and of ddim"
    assert "# Sieben" in (out / "report.md").read_text() and "Sieben" in (out / "report.html").read_text()
    assert float(_rows(out)[-1]["distance"]) == pytest.approx(base_cell.distance, rel=1e-4)


# ---- every schedule, target, quantizer and recipe ----


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_and_target_trains_and_samples(
    schedule: str, target: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    config = from_dict(LatentModelConfig, {"schedule": schedule, "target": target, "dit": to_dict(TINY_DIT)})
    run = train_latent.train(
        LatentTask(tmp_path / "m", pipeline.tokenizer, model=config, train=replace(TINY, steps=2, log_every=1))
    )
    assert run is not None
    assert [m["step"] for m in records(run.path)] == [1, 2]
    assert all(math.isfinite(v) for m in records(run.path) for v in m.values())
    trained = load_model(run.path, torch.device("cpu"))
    pairs = [*zip(SOLVERS, itertools.cycle(GRIDS)), *(("ddim", grid) for grid in GRIDS)]
    for solver, grid in pairs[list(TARGETS).index(target) :: len(TARGETS)]:  # over its targets, a schedule has them all
        nfe = 12 - SOLVERS[solver].to_data
        (plan,) = make_samplers(trained, solver, nfe, SamplerConfig(grids=(grid,))).values()
        latents = sample_latents(trained, plan, torch.arange(4)).latents
        assert latents.isfinite().all() and latents.std() > 1e-3


CODEBOOKS: tuple[QuantizerName, ...] = ("vq", "vq_gradient", "simvq", "lfq", "bsq")
SMALL_VQ = '{"type": "vq", "codebook_size": 16, "dim": 3}'
TOKENIZERS = {
    **{f"fsq {u}": TokenizerConfig(levels=(5, 3), width=16, downsample=4, upsample=u) for u in get_args(Upsample)},
    "fsq sigmoid post": TokenizerConfig(levels=(5, 3), width=16, form="sigmoid", latent_space="post"),
    "fsq ifsq": TokenizerConfig(levels=(5, 3), width=16, form="ifsq", options='{"noise_dropout": 0.5}'),
    "fsq fsp": TokenizerConfig(levels=(5, 4), width=16, form="fsp"),
    "fsq, attention": TokenizerConfig(levels=(5, 3), width=16, downsample=4, attention=True, multipliers=(1, 2)),
    "fsq, vit": TokenizerConfig(levels=(5, 3), width=16, downsample=4, network="vit", depth=1, heads=2),
    "vq, latent tokens": TokenizerConfig(
        quantizer="vq", codebook_size=32, dim=4, width=16, downsample=4, network="vit", depth=1, latent_tokens=3
    ),
    **{name: TokenizerConfig(quantizer=name, codebook_size=32, dim=4, width=16) for name in CODEBOOKS},
    "vq normalized": TokenizerConfig(
        quantizer="vq", codebook_size=32, dim=4, width=16, options='{"normalize": true, "gradient": "rotation"}'
    ),
    "residual": TokenizerConfig(
        quantizer="residual", width=16, options=f'{{"base": {SMALL_VQ}, "depth": 3, "dropout": 0.5}}'
    ),
    "grouped": TokenizerConfig(quantizer="grouped", width=16, options=f'{{"base": {SMALL_VQ}, "groups": 2}}'),
    "two_level": TokenizerConfig(
        quantizer="two_level", width=16, options=f'{{"top": {SMALL_VQ}, "bottom": {SMALL_VQ}}}'
    ),
    "kl": TokenizerConfig(quantizer="kl", dim=4, width=16),
    "pixels": TokenizerConfig(quantizer="identity", downsample=1),
    "identity": TokenizerConfig(quantizer="identity", dim=3, width=16),
}


def test_every_quantizer_is_trained_here() -> None:
    assert {config.quantizer for config in TOKENIZERS.values()} == set(QUANTIZERS) == set(get_args(QuantizerName))


def test_a_latent_model_learns_from_latent_tokens(succeed: Script, tmp_path: Path) -> None:
    flags = "--model.network vit --model.downsample 4 --model.latent-tokens 6 --model.depth 1"
    succeed(f"train_tokenizer digits-fsq {flags} --out {tmp_path}/t", *TINY_FLAGS)
    succeed("train_latent", "digits-dit", *TINY_FLAGS, "--tokenizer", tmp_path / "t", "--out", tmp_path / "m")
    trained = load_model(tmp_path / "m", torch.device("cpu"))
    assert trained.model.latent_shape == (6, 1, 6)
    (plan,) = make_samplers(trained, "ddim", 4, SamplerConfig(grids=("uniform",))).values()
    assert decode(trained, sample_latents(trained, plan, torch.arange(3)).latents).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tokenizer_trains_and_comes_back_from_its_run(name: str, tmp_path: Path) -> None:
    """What the run reported about held-out images holds for the tokenizer that is read from it, to the last bit."""
    task = TokenizerTask(tmp_path / "t", model=TOKENIZERS[name], train=replace(TINY, steps=5))
    run = train_tokenizer.train(task)
    assert run is not None
    tokenizer, data = load_tokenizer(run.path)
    quality = evaluate_tokenizer(tokenizer, load_splits(data).held_out.images)
    reported = {k.removeprefix("held_out_"): v for k, v in records(run.path)[-1].items() if k.startswith("held_out_")}
    assert {k: v if math.isfinite(v) else None for k, v in quality.items()} == reported
    assert (quality["mse"] == 0) == (name == "pixels")
    tokenizer.save_pretrained(tmp_path / "again")
    assert _equal(_weights(run.path, TOKENIZER_FILE), load_file(tmp_path / "again/diffusion_pytorch_model.safetensors"))


def test_a_run_saves_the_average_of_its_weights(pipeline: Pipeline, tmp_path: Path) -> None:
    """With `ema 0` the same training saves its newest weights, which are others."""
    task = resolve(TokenizerTask, TOKENIZER_RECIPES, ["--config", str(pipeline.tokenizer / "config.yaml")])
    train_tokenizer.train(replace(task, out=tmp_path / "t", train=replace(task.train, ema=0)))
    newest = _weights(tmp_path / "t", TOKENIZER_FILE)
    assert not _equal(_weights(pipeline.tokenizer, TOKENIZER_FILE), newest)
    averaged = _weights(pipeline.model, "ema.safetensors")
    assert not _equal(averaged, _weights(pipeline.model, "model.safetensors"))
    assert _equal(dict(pipeline.load().model.state_dict()), averaged)


LARGE = ("imagenet256-dit-xl",)
"""Recipes whose networks take seconds to build."""


def _recipe(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name


@pytest.mark.parametrize(
    "name", [_recipe(n) for n in [*TOKENIZER_RECIPES, *LATENT_RECIPES] if n not in GENERIC_TOKENIZERS]
)
def test_a_recipe_builds_and_its_configuration_survives_yaml(name: str) -> None:
    if name in TOKENIZER_RECIPES:
        task = resolve(TokenizerTask, TOKENIZER_RECIPES, [name])
        assert task == TOKENIZER_RECIPES[name]() == from_dict(TokenizerTask, to_dict(task))
        if task.data.data == "digits":
            assert train_tokenizer.make_tokenizer(task, load_splits(task.data).train).tokens in (4, 16, 64)
    else:
        task = resolve(LatentTask, LATENT_RECIPES, [name])
        assert task == LATENT_RECIPES[name]() == from_dict(LatentTask, to_dict(task))
        assert LatentModel(task.model, (4, 8, 8), 10).classes == 10


def test_flags_override_a_recipe() -> None:
    flags = "digits-fsq --model.levels 8 6 5 --steps 7 --held-out 0.3 --out x"
    task = resolve(TokenizerTask, TOKENIZER_RECIPES, [*map(str, flags.split())])
    assert (task.model.levels, task.train.steps, task.data.held_out) == ((8, 6, 5), 7, 0.3)
    assert task.train.lr == TOKENIZER_RECIPES["digits-fsq"]().train.lr


# ---- --config repeats a run ----


@pytest.mark.parametrize(
    ("kind", "file"),
    [("tokenizer", TOKENIZER_FILE), ("features", "features.safetensors"), ("model", "ema.safetensors")],
)
def test_the_config_of_a_run_repeats_it(
    kind: str, file: str, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    name = {"tokenizer": "train_tokenizer", "features": "train_features", "model": "train_latent"}[kind]
    first, second = getattr(pipeline, kind), tmp_path / "second"
    succeed(name, "--config", first / "config.yaml", "--out", second)
    assert read_yaml(second / "config.yaml") == {**read_yaml(first / "config.yaml"), "out": str(second)}
    assert _equal(_weights(first, file), _weights(second, file))


@pytest.mark.parametrize("solver", LEARNED)
def test_the_config_of_a_learned_solver_repeats_it(
    solver: str, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    """Whatever random numbers were drawn before in the process: first weights come from the seed."""
    model = Path(shutil.copytree(pipeline.model, tmp_path / "model"))
    run = model / "solvers" / f"{solver}-uniform-nfe4"
    before = _weights(run, "solver.safetensors")
    torch.manual_seed(12345)
    succeed("train_solver", "--config", run / "config.yaml", "--model", model, "--overwrite")
    assert _equal(before, _weights(run, "solver.safetensors"))


def test_flags_override_a_config_file(pipeline: Pipeline) -> None:
    file = str(pipeline.model / "config.yaml")
    task = resolve(LatentTask, LATENT_RECIPES, ["--config", file, "--lr", "0.5", "--out", "elsewhere"])
    assert task.train == replace(TINY_LATENT, lr=0.5)
    assert (task.out, task.tokenizer) == (Path("elsewhere"), pipeline.tokenizer)


SOLVER_RUN = "solvers/amed-predictor-uniform-nfe4"
EARLIER = {"overwrite": True, "resume": "auto"}
"""Flags of one call, which config.yaml had in earlier versions; the contradiction of these two raises."""


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("train_tokenizer", "tokenizer", ""),
        ("train_features", "features", ""),
        ("train_baseline", "baseline", ""),
        ("train_latent", "model", ""),
        ("train_solver", "model", SOLVER_RUN),
    ],
)
def test_the_flags_of_one_call_are_not_repeated(
    name: str, kind: str, part: str, pipeline: Pipeline, script: Script, succeed: Script, tmp_path: Path
) -> None:
    """Neither deleting, nor resuming, nor the limits of a start, by config.yaml and checkpoints of today and of before."""
    root = Path(shutil.copytree(getattr(pipeline, kind), tmp_path / kind))
    run = root / part
    place = ("--model", root) if part else ("--out", root)
    values = read_yaml(run / "config.yaml")
    limits = {"max_steps": 1, "max_seconds": 0.0}
    assert not (EARLIER.keys() & values) and not (limits.keys() & values["train"])
    values |= {**EARLIER, "train": {**values["train"], **limits}}
    values |= {"data": {**values["data"], "download": True}} if "data" in values else {}
    write_yaml(run / "config.yaml", values)
    checkpoint = newest(run)
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"] |= {**EARLIER, "train.max_steps": 1, "train.max_seconds": 0.0, "data.download": True}
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)
    with unchanged(root):
        done = script(name, "--config", run / "config.yaml", *place)
        assert done.code == 2 and "already holds a run" in done.err, done.err
    weights, steps = contents(checkpoint), values["train"]["steps"] + 2
    succeed(f"{name} --config {run}/config.yaml --resume auto", *place)
    assert newest(run) == checkpoint and contents(checkpoint) == weights
    if values["train"]["decay"] != "cosine":
        succeed(f"{name} --config {run}/config.yaml --resume auto --steps {steps}", *place)
        assert newest(run).name == f"step-{steps}"
    assert not (EARLIER.keys() & read_yaml(run / "config.yaml"))


def test_overwriting_and_limits_leave_no_trace(
    pipeline: Pipeline, script: Script, succeed: Script, tmp_path: Path
) -> None:
    """Of a run that was made with --overwrite and stopped by --max-steps; of an imported one; of a reconstructed average."""
    run, tiny = tmp_path / "run", " ".join(TINY_FLAGS)
    for _ in range(2):
        succeed(f"train_tokenizer digits-fsq {tiny} --model.width 16 --max-steps 1 --overwrite --download --out {run}")
    again = f"train_tokenizer --config {run}/config.yaml"
    with unchanged(run):
        assert script(*again.split()).code == 2
    succeed(f"{again} --resume auto")
    assert newest(run).name == "step-2"
    vae = tmp_path / "vae"
    AutoencoderTiny(1, 1, (8, 8), (8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(vae)
    for call in (f"import_tokenizer --source {vae}", f"posthoc_ema {pipeline.model} --std 0.08"):
        succeed(f"{call} --overwrite --out {tmp_path}/made")
        assert "overwrite" not in (tmp_path / "made/config.yaml").read_text()
        shutil.rmtree(tmp_path / "made")


def test_a_sweep_of_a_model_downloads_its_images_if_it_may(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def load(config: DataConfig) -> None:
        asked.append(config.download)
        raise DataError("no images", "this test has none", "none")

    monkeypatch.setattr(places, "load_splits", load)
    for download in (False, True):
        with pytest.raises(DataError):
            evaluate.run(sweep_task(pipeline, tmp_path, data=replace(evaluate.EvaluateTask().data, download=download)))
    assert asked == [False, True]


def test_overwrite_replaces_a_run_and_its_learned_solvers(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pipeline.model, tmp_path / "model"))
    succeed("train_latent", "--config", model / "config.yaml", "--out", model, "--steps", 2, "--overwrite")
    assert [p.name for p in (model / "checkpoints").glob("step-*")] == ["step-2"]
    assert not (model / "solvers").exists()


def test_encode_writes_what_train_latent_reads(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    cache = tmp_path / "latents"
    succeed("encode", "--tokenizer", pipeline.tokenizer, "--out", cache, "--batch-size", 100)
    (own,) = (p for p in pipeline.tokenizer.glob("latents-*") if not p.name.endswith("-flip"))
    made, stored = (open_records(path, "latents", "") for path in (cache, own))
    assert torch.equal(made.tensor("labels"), stored.tensor("labels"))
    everything = torch.arange(len(made))
    torch.testing.assert_close(made.read(everything), stored.read(everything), rtol=1e-5, atol=1e-5)
    config = pipeline.model / "config.yaml"
    succeed(f"train_latent --config {config} --latents {cache} --steps 2 --out {tmp_path}/m")


def test_several_budgets_train_one_solver_each(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pipeline.model, tmp_path / "model"))
    distill = "--guidance 2 --distill.trajectories 16 --distill.teacher-steps 4"
    succeed(f"train_solver amed --model {model} --nfe 2,6 {distill}", *TINY_FLAGS)
    trained = load_model(model, torch.device("cpu"))
    for nfe in (2, 6):
        plans = make_samplers(trained, "amed", nfe, SamplerConfig(guidance=2.0))
        assert sample_latents(trained, plans["best"], torch.arange(2), SamplingConfig(Guidance(2.0))).nfe == 2 * nfe


@pytest.fixture(scope="module")
def with_a_table(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model with a learned table at 3 evaluations, and an AMED plugin learned end to end at 4."""
    model = Path(shutil.copytree(pipeline.model, tmp_path_factory.mktemp("learned") / "model"))
    train = TrainConfig(steps=2, batch_size=16, lr=0.03, warmup=0, ema=0, log_every=1)
    table = TableConfig(pairs=16, teacher_steps=6)
    train_solver.train(train_solver.SolverTask(model, "table", "3", "best", table=table, train=train))
    distill = DistillConfig(mode="end_to_end", trajectories=16, teacher_steps=4)
    plugin = ("amed-plugin-dpmpp2m", "4", "uniform")
    train_solver.train(train_solver.SolverTask(model, *plugin, distill=distill, train=train))
    return model


def test_tables_learned_together_are_those_learned_alone(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    """The second budget takes the teacher's end states from the first, and counts their evaluations as its own."""
    model = Path(shutil.copytree(pipeline.model, tmp_path / "model"))
    flags = ("--steps", 2, "--batch-size", 4, "--table.pairs", 8, "--table.teacher-steps", 6)
    written = []
    for budgets in ("2,3", "3"):
        done = succeed("train_solver", "table", "--model", model, "--nfe", budgets, "--overwrite", *flags)
        folder = Run.open(solver_path(model, "table", "best", 3), "solver").checkpoint
        written.append(Table.load(folder / "solver.safetensors"))
        cost, trials = 8 * 6 + len(GRIDS) * 8 * 3 + 2 * 4 * 3, 2 * (TRIAL.steps + 1) * 8 * 3
        assert any(f" {spent:,} evaluations of training" in done.out for spent in (cost, cost + trials))
        assert "its table: gain " in done.out
    assert written[0] == written[1]


def test_a_learned_table_is_sampled_and_measured_by_name(
    with_a_table: Path, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    (plan,) = make_samplers(load_model(with_a_table, torch.device("cpu")), "table", 3, SamplerConfig()).values()
    assert isinstance(plan, Table) and plan.nfe == 3
    card = plan.card
    assert card is not None and card.mode == "end_to_end" and card.base.startswith("dpmpp3m on ")
    out = tmp_path / "grid.png"
    done = succeed("sample", "--model", with_a_table, "--solver", "table", "--nfe", 3, "--n", 4, "--out", out)
    assert "3 evaluations each" in done.out
    solvers = "ddim,table,amed-plugin-dpmpp2m"
    task = replace(sweep_task(pipeline, tmp_path / "report", nfe="3"), model=with_a_table, blocks=1)
    cells = measured(evaluate.run(replace(task, solvers="ddim,table")))
    assert [(c.solver, c.nfe, c.training_nfe > 0) for c in cells] == [("ddim", 3, False), ("table", 3, True)]
    assert cells[1].value("rmse") != cells[0].value("rmse")
    with pytest.raises(UsageError, match="table at NFE 4 has not been learned"):
        evaluate.run(replace(task, solvers=solvers, nfe="4"))
    cells = measured(evaluate.run(replace(task, solvers="amed-plugin-dpmpp2m", nfe="4")))
    assert [(cell.nfe, cell.training_nfe > 0) for cell in cells] == [(4, True)]


def test_all_names_every_solver_and_what_was_learned_for_every_budget(with_a_table: Path) -> None:
    trained = load_model(with_a_table, torch.device("cpu"))
    plain = set(SOLVERS) - set(ALIASES)
    assert evaluate.solver_names("ab1,heun", trained, (4,)) == ("ab1", "heun")
    assert evaluate.solver_names("ddim,heun", trained, (4,)) == ("ddim", "heun")
    everything = evaluate.solver_names("all", trained, (4,))
    assert set(everything) == {*plain, "amed-predictor", "amed", "amed-plugin-dpmpp2m"}
    assert set(evaluate.solver_names("all", trained, (3,))) == {*plain, "table"}
    assert set(evaluate.solver_names("all", trained, (3, 4))) == {*plain}


def test_a_table_serves_one_guidance_and_one_model(with_a_table: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    trained = load_model(with_a_table, torch.device("cpu"))
    with pytest.raises(UsageError, match=r"learned at guidance 1\.0"):
        make_samplers(trained, "table", 3, SamplerConfig(guidance=2.0))
    with pytest.raises(DataError, match="learned for other weights"):
        make_samplers(replace(trained, hash="0" * 12), "table", 3, SamplerConfig())


# ---- two processes ----


def _assert_same_training(one: Path, two: Path, start: dict[str, Tensor], file: str) -> None:
    """Parameters agree to 1e-4 although they moved by more, and the metrics are those of one run."""
    alone, together = _weights(one, file), _weights(two, file)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert max((alone[k].float() - v.float()).abs().max() for k, v in start.items()) > 2e-3
    assert len(records(one)) == len(records(two))
    for a, b in zip(records(one), records(two), strict=True):
        assert a.keys() == b.keys() and all(math.isfinite(v) for v in b.values())
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


def test_two_processes_train_what_one_trains(pipeline: Pipeline, tmp_path: Path) -> None:
    train = TrainConfig(steps=4, batch_size=32, lr=1e-3, warmup=0, ema=0, log_every=2)
    one, two = tmp_path / "t1", tmp_path / "t2"
    task = TokenizerTask(one, model=TokenizerConfig(width=32), train=train)
    torch.manual_seed(0)
    start = train_tokenizer.make_tokenizer(task, load_splits(task.data).train).state_dict()
    train_tokenizer.train(task)
    launch(SCRIPTS / "train_tokenizer.py", "--config", one / "config.yaml", "--out", two)
    _assert_same_training(one, two, start, TOKENIZER_FILE)

    one, two = tmp_path / "m1", tmp_path / "m2"
    config = LatentModelConfig(schedule="cosine", dit=TINY_DIT)
    torch.manual_seed(0)
    start = LatentModel(config, (4, 2, 2), 10).state_dict()
    train_latent.train(LatentTask(one, pipeline.tokenizer, model=config, train=train))
    launch(SCRIPTS / "train_latent.py", "--config", one / "config.yaml", "--out", two)
    _assert_same_training(one, two, start, "model.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m1", "m2", "t1", "t2"]
