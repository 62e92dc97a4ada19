"""--precision auto: what it chooses and where, that a run keeps the choice, and that bfloat16 trains as well."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate.state import AcceleratorState
from multiprocess import together
from pipelines import TINY, Pipeline

from midway.gen.baselines.vae import VAEConfig
from midway.gen.core.errors import UsageError
from midway.gen.data.splits import load_splits
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.distillation.amed import DistillConfig
from midway.gen.flags.baseline_tasks import VAETask
from midway.gen.flags.tasks import LatentTask, TokenizerConfig, TokenizerTask
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.recipes.recipes import TOKENIZER_RECIPES
from midway.gen.tokenizer.objective import evaluate_tokenizer
from midway.gen.training import precision
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.config import TrainConfig
from midway.gen.training.precision import LEAST_WIDTH, has_bf16, resolve_precision
from midway.gen.trainings import train_baseline, train_features, train_latent, train_solver, train_tokenizer
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")
AUTO = replace(TINY, steps=1, precision="auto")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Have this machine multiply bfloat16 in hardware, or not; every training of the test has its own Accelerator."""

    def become(able: bool) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(precision, "has_bf16", lambda: able)

    return become


@pytest.mark.parametrize(
    ("able", "network", "width", "expected"),
    [
        (True, "conv", LEAST_WIDTH["conv"], "bf16"),
        (True, "conv", LEAST_WIDTH["conv"] - 1, "no"),
        (True, "conv", 0, "no"),
        (True, "transformer", LEAST_WIDTH["transformer"], "bf16"),
        (True, "transformer", LEAST_WIDTH["conv"], "no"),
        (False, "conv", 512, "no"),
        (False, "transformer", 512, "no"),
    ],
)
def test_the_hardware_and_the_width_decide(
    machine: Callable[[bool], None], able: bool, network: Literal["conv", "transformer"], width: int, expected: str
) -> None:
    machine(able)
    config, lines = resolve_precision(AUTO, None, network, width)
    assert config == replace(AUTO, precision=expected)
    assert [line.split(":")[0] for line in lines] == [f"precision {expected}"]
    for given in ("no", "bf16"):
        assert resolve_precision(replace(AUTO, precision=given), None, network, width)[1] == ()


@pytest.mark.parametrize(
    ("gpu", "use_cpu", "avx512_bf16", "amx", "expected"),
    [
        (True, "false", False, False, True),
        (True, "true", False, False, False),
        (True, "true", True, False, True),
        (False, "false", False, True, True),
        (False, "false", False, False, False),
    ],
)
def test_the_device_of_the_training_is_the_one_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, use_cpu: str, avx512_bf16: bool, amx: bool, expected: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_bf16() == expected


def trainings(pipeline: Pipeline, out: Path) -> dict[str, tuple[Callable[[Any], object], Any, Path, str]]:
    """Every command that trains, on its own network: what it calls, its task, its run and the precision that auto chooses."""
    conv = TokenizerConfig(width=64, downsample=4)
    vit = replace(conv, network="vit", depth=1)
    wide = LatentModelConfig(dit=DiTConfig(width=256, depth=1, heads=2))
    narrow = LatentModelConfig(dit=DiTConfig(width=64, depth=1, heads=2))
    solver = train_solver.SolverTask(
        pipeline.model, "amed", "4", "uniform", distill=DistillConfig(trajectories=8, teacher_steps=4),
        train=replace(AUTO, ema=0, batch_size=8), overwrite=True,
    )  # fmt: skip
    vae = VAETask(
        out, model=VAEConfig(latent_dim=2, width=64, blocks=1, mixtures=1), validation_images=8, draws=2, train=AUTO
    )
    tokenizer = train_tokenizer.train
    return {
        "tokenizer": (tokenizer, TokenizerTask(out, model=conv, train=AUTO), out, "bf16"),
        "narrow at the finest level": (
            tokenizer, TokenizerTask(out, model=replace(conv, width=32, multipliers=(1, 2)), train=AUTO), out, "no",
        ),
        "transformer": (tokenizer, TokenizerTask(out, model=replace(vit, width=256), train=AUTO), out, "bf16"),
        "narrow transformer": (tokenizer, TokenizerTask(out, model=vit, train=AUTO), out, "no"),
        "latent model": (train_latent.train, LatentTask(out, pipeline.tokenizer, model=wide, train=AUTO), out, "bf16"),
        "narrow latent model": (train_latent.train, LatentTask(out, pipeline.tokenizer, model=narrow, train=AUTO), out, "no"),
        "features": (train_features.train, train_features.FeaturesTask(out, width=64, train=AUTO), out, "no"),
        "baseline": (train_baseline.train, vae, out, "no"),
        "solver": (train_solver.train, solver, pipeline.model / "solvers", "no"),
    }  # fmt: skip


TRAININGS = (
    "tokenizer", "narrow at the finest level", "transformer", "narrow transformer", "latent model", "narrow latent model",
    "features", "baseline", "solver",
)  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_every_training_records_what_was_chosen(
    name: str, pipeline: Pipeline, tmp_path: Path, machine: Callable[[bool], None]
) -> None:
    machine(True)
    train, task, run, expected = trainings(pipeline, tmp_path / "run")[name]
    found = train(task)
    run = found[0].path if isinstance(found, list) else run
    assert f"precision: {expected if expected == 'bf16' else repr(expected)}\n" in (run / "config.yaml").read_text()
    assert json.loads((run / "env.json").read_text())["starts"][-1]["precision"] == expected
    assert f"precision {expected}: " in (run / "log.txt").read_text()


@pytest.mark.parametrize("began", ["bf16", "no"])
def test_a_resumed_run_keeps_its_precision_on_another_machine(
    began: str, tmp_path: Path, machine: Callable[[bool], None]
) -> None:
    machine(began == "bf16")
    config = replace(AUTO, steps=2)
    task = TokenizerTask(tmp_path / "run", model=TokenizerConfig(width=64, downsample=4), train=config)
    train_tokenizer.train(replace(task, train=replace(config, max_steps=1)))
    machine(began != "bf16")
    with pytest.raises(UsageError, match=r"train\.precision"):
        other = replace(config, precision="no" if began == "bf16" else "bf16")
        train_tokenizer.train(replace(task, train=other, resume="auto"))
    machine(began != "bf16")
    resumed = train_tokenizer.train(replace(task, resume="auto"))
    assert resumed is not None
    starts = json.loads((resumed.path / "env.json").read_text())["starts"]
    assert [start["precision"] for start in starts if "precision" in start][-1] == began
    assert (resumed.checkpoints / "step-2").is_dir()


def test_processes_that_chose_differently_raise_on_every_one() -> None:
    together(_different, 2)


def _different(rank: int) -> None:
    with pytest.raises(UsageError, match="1 of 2 processes train in bf16"):
        make_accelerator(TrainConfig(precision="bf16" if rank else "no"))


@pytest.mark.slow
def test_quality_in_bfloat16_is_that_of_float32(tmp_path: Path) -> None:
    """The digits recipe cut short, same seeds: the difference is small beside that between seeds (benchmarks/precision.py)."""
    recipe = TOKENIZER_RECIPES["digits-fsq"]()
    held_out = load_splits(recipe.data).held_out.images

    def psnr(kind: Literal["no", "bf16"], seed: int) -> float:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = replace(recipe.train, steps=60, warmup=10, seed=seed, precision=kind)
        run = train_tokenizer.train(replace(recipe, out=tmp_path / f"{kind}-{seed}", train=config))
        assert run is not None
        return evaluate_tokenizer(ImageTokenizer.from_pretrained(run.path / "tokenizer"), held_out)["psnr"]

    differences = [psnr("bf16", seed) - psnr("no", seed) for seed in (0, 1)]
    assert max(map(abs, differences)) < 0.15, differences
    assert any(differences), "two different trainings"
