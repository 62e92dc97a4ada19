"""One tiny run of the whole path, shared by all tests, and scripts called as a user calls them."""

import io
import os
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from pipelines import SCRIPTS, TINY, TINY_DIT, TINY_LATENT, Outcome, Pipeline, Script
from safetensors.torch import save_file
from torchvision.models import vgg16

from midway.gen.baselines.vae import VAEConfig
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.distillation.amed import DistillConfig
from midway.gen.flags.baseline_tasks import VAETask
from midway.gen.flags.tasks import LatentTask, TokenizerConfig, TokenizerTask
from midway.gen.progress import bar
from midway.gen.report import sections
from midway.gen.report.drawing import Drawing
from midway.gen.training.config import TrainConfig
from midway.gen.trainings import train_baseline, train_features, train_latent, train_solver, train_tokenizer

os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # tests train on the CPU, where runs can be compared
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: more threads than cores are many times slower
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


bar.FIRST = bar.LONGEST = 1e9  # what tests look at does not depend on how busy a machine is


@pytest.fixture(scope="session", autouse=True)
def few_trajectories() -> Iterator[None]:
    """A report's section on trajectories costs more than all the rest of a test's sweep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "SEEDS", 4)
        patch.setattr(sections, "STEPS", 4)
        yield


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """For reports whose plots are not looked at: to draw them takes longer than a small sweep."""
    empty = io.BytesIO()
    Image.new("L", (1, 1)).save(empty, "png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drawing, "png", lambda drawing: empty.getvalue())
        patch.setattr(Drawing, "svg", lambda drawing, narrow: "<svg></svg>")
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tensors so small that threads only wait for one another, and for sums that must be added in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs that can be compared, also on a machine with a GPU; Accelerate keeps one state per process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of VGG-16's convolutions, under torchvision's names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    save_file({name: value for name, value in vgg16(weights=None).state_dict().items() if "features" in name}, path)
    return path


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Digits, 2x2 FSQ latents, a conditional DiT on the cosine schedule, amed-predictor and amed at NFE 4, uniform grid."""
    root = tmp_path_factory.mktemp("pipeline")
    paths = Pipeline(root, root / "tokenizer", root / "features", root / "model", root / "baseline")
    train_tokenizer.train(TokenizerTask(paths.tokenizer, model=TokenizerConfig(width=16, downsample=4), train=TINY))
    train_features.train(train_features.FeaturesTask(paths.features, width=8, dim=8, train=TINY))
    config = LatentModelConfig(schedule="cosine", dit=TINY_DIT)
    train_latent.train(LatentTask(paths.model, paths.tokenizer, model=config, train=TINY_LATENT))
    solver = train_solver.SolverTask(
        paths.model,
        nfe="4",
        grid="uniform",
        distill=DistillConfig(trajectories=32, teacher_steps=4),
        train=TrainConfig(steps=5, batch_size=16, lr=5e-2, warmup=0, ema=0, log_every=5),
    )
    for name in ("amed-predictor", "amed"):
        train_solver.train(replace(solver, solver=name))
    vae = VAEConfig(latent_dim=2, width=8, blocks=1, mixtures=1)
    validated = replace(TINY, validate_every=5)
    train_baseline.train(VAETask(out=paths.baseline, model=vae, validation_images=20, draws=2, train=validated))
    return paths


@pytest.fixture(scope="session")
def unconditional(pipeline: Pipeline) -> Path:
    """A latent model that was trained without classes, on the pipeline's tokenizer."""
    path = pipeline.root / "unconditional"
    config = LatentModelConfig(schedule="cosine", conditional=False, dit=TINY_DIT)
    train_latent.train(LatentTask(path, pipeline.tokenizer, model=config, train=replace(TINY, steps=2)))
    return path


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """`script("sample", "--nfe", 4)` runs midway sample as `__main__` in this process."""

    def call(name: str, *arguments: object) -> Outcome:
        file = str(SCRIPTS / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [file, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(file, run_name="__main__")
        done = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int), f"{name} ended with {code!r}"
        return Outcome(code, done.out, done.err)

    return call


@pytest.fixture
def succeed(script: Script) -> Script:
    """`succeed("sample --nfe 4 --out", path)` runs a command line as `script` does; it must exit with 0."""

    def call(line: str, *arguments: object) -> Outcome:
        done = script(*line.split(), *arguments)
        assert done.code == 0, done.err
        return done

    return call


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages in boxes are not wrapped, whatever terminal runs the tests."""
    monkeypatch.setenv("COLUMNS", "200")
