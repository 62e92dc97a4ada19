"""A run resumed from a checkpoint is the run that was never stopped, bit for bit; a damaged checkpoint is never used."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nobody import NOBODY
from other_digits import other_digits
from PIL import Image
from pipelines import TINY_DIT, Pipeline
from resuming import (
    DATA,
    TRAIN,
    VQ,
    Task,
    assert_same_files,
    assert_same_run,
    contents,
    everything,
    newest,
    records,
    seal,
    steps_of,
    train,
    train_together,
    unchanged,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from traps import Trap

from midway.gen.baselines.flow_config import glow
from midway.gen.baselines.vae import VAEConfig
from midway.gen.core import checkpoints
from midway.gen.core.config import from_dict, read_yaml, write_yaml
from midway.gen.core.errors import DataError, MidwayError, UsageError
from midway.gen.core.files import MACHINE
from midway.gen.core.locks import lock
from midway.gen.core.runs import Run
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.load import solver_path
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.distillation.amed import DistillConfig
from midway.gen.distillation.table import TableConfig
from midway.gen.flags.baseline_tasks import FlowTask, VAETask
from midway.gen.flags.tasks import FinetuneTask, LatentTask, PriorTask, TokenizerConfig, TokenizerTask
from midway.gen.networks.adapters import AdapterConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.presets import MODERN
from midway.gen.objectives.alignment import AlignConfig
from midway.gen.objectives.jump_config import JumpConfig
from midway.gen.priors.config import Kind, PriorConfig, TokenHeadConfig
from midway.gen.tokenizer.loss_config import LossConfig
from midway.gen.tokenizer.objective import TokenizerObjective
from midway.gen.training.batches import Context, ImageBatch
from midway.gen.training.config import LATER, TrainConfig
from midway.gen.trainings import train_tokenizer
from midway.gen.trainings.train_features import FeaturesTask
from midway.gen.trainings.train_solver import SolverTask
from midway.tokenizers import vq

pytestmark = pytest.mark.usefixtures("one_thread")  # so that sums are added in the same order, on a busy machine too

DIT = LatentModelConfig(schedule="cosine", dit=replace(TINY_DIT, dropout=0.2))
LATENT = replace(TRAIN, batch_size=256)  # of 1437 latents: an epoch ends in step 5 here too
SOLVER = replace(TRAIN, batch_size=12, lr=5e-2, warmup=0, ema=0, posthoc=(), clip=1e6)


def tokenizer_task(out: Path, train: TrainConfig = TRAIN, model: TokenizerConfig = VQ) -> TokenizerTask:
    """A tokenizer of 5,781 parameters."""
    return TokenizerTask(out, DATA, model, flip=True, train=train, resume="auto")


def latent_task(out: Path, pipeline: Pipeline, train: TrainConfig = LATENT) -> LatentTask:
    """A DiT with everything random that it has: flips, dropout, dropped labels."""
    return LatentTask(out, pipeline.tokenizer, model=DIT, flip=True, train=train, resume="auto")


def modern_task(out: Path, pipeline: Pipeline, **switches: Any) -> LatentTask:
    """The modern blocks, and others, on other times and weights."""
    task = latent_task(out, pipeline, replace(LATENT, optimizer="muon"))
    model = replace(DIT, target="x0", time="mode", time_shift="auto", weight="velocity")
    model = replace(model, direction=0.5, scales=2)
    return replace(task, model=replace(model, dit=replace(DIT.dit, **{**MODERN, "mup_base_width": 8, **switches})))


def aligned_task(out: Path, pipeline: Pipeline) -> LatentTask:
    """Jumps whose tokens are aligned with a classifier in the first 6 of 11 steps, in micro-batches."""
    align = AlignConfig(str(pipeline.features), block=1, normalize="spatial", until=0.5)
    task = jump_task(out, pipeline, "shortcut")
    return replace(task, align=align, train=replace(LATENT, accumulation=2))


def jump_task(out: Path, pipeline: Pipeline, objective: str) -> LatentTask:
    """A DiT that jumps, guided in training; alpha falls within the run from jumps of its own to derivatives."""
    dit = replace(DIT.dit, time_scale=1.0)
    model = replace(DIT, schedule="linear", objective=objective, jump=JumpConfig(guidance=3.0), dit=dit)
    return replace(latent_task(out, pipeline), model=model)


def distilled_task(out: Path, pipeline: Pipeline) -> LatentTask:
    """From the weights of a flow model on its guided velocities."""
    task = jump_task(out, pipeline, "imf")
    jump = JumpConfig(teacher_guidance=2.0)
    return replace(
        task,
        model=replace(task.model, schedule="cosine", jump=jump),
        init=pipeline.model,
        teacher=pipeline.model,
        flip=False,
    )


def finetune_task(out: Path, pipeline: Pipeline, **options: Any) -> FinetuneTask:
    """Adapters from a gradient, of which one matrix learns faster, and a new class."""
    data = DataConfig(data=str(other_digits(pipeline.root / "other-digits")))
    adapter = AdapterConfig(rank=2, start="gradient", b_rate=4.0)
    train = replace(TRAIN, posthoc=(), accumulation=2)
    return FinetuneTask(out, pipeline.model, data, adapter=adapter, flip=True, train=train, resume="auto", **options)


def prior_task(out: Path, pipeline: Pipeline, kind: Kind) -> PriorTask:
    """A prior with everything random that it has, orders among it, and validation that may end it."""
    head = TokenHeadConfig(width=16, depth=1, repeats=1)
    shuffled = 8 if kind == "causal" else 0
    model = PriorConfig(kind, width=16, depth=1, heads=2, dropout=0.2, shuffle_steps=shuffled, head=head)
    train = replace(LATENT, posthoc=(), accumulation=2, validate_every=2, patience_validations=5)
    return PriorTask(
        out, tokenizer=pipeline.tokenizer, model=model, flip=True, validation_images=20, train=train, resume="auto"
    )


def solver_task(out: Path, pipeline: Pipeline) -> SolverTask:
    """A per-sample predictor, learned in a copy of the model's run."""
    if not out.exists():
        shutil.copytree(pipeline.model, out, ignore=shutil.ignore_patterns("solvers"))
    distill = DistillConfig(trajectories=30, teacher_steps=4)
    return SolverTask(out, nfe="4", grid="uniform", distill=distill, train=SOLVER, resume="auto")


def table_task(out: Path, pipeline: Pipeline) -> SolverTask:
    """A learned table that first chooses where it begins."""
    task = solver_task(out, pipeline)
    return replace(task, solver="table", grid="best", table=TableConfig(pairs=30, teacher_steps=4))


def plugin_task(out: Path, pipeline: Pipeline) -> SolverTask:
    """AMED inside another solver, learned end to end on a grid that is chosen by trials."""
    task = replace(solver_task(out, pipeline), grid="best")
    return replace(task, solver="amed-plugin-dpmpp2m-predictor", distill=replace(task.distill, mode="end_to_end"))


VALIDATED = replace(TRAIN, posthoc=(), validate_every=2)


def vae_task(out: Path) -> VAETask:
    """A VAE that keeps what is best in validation."""
    model = VAEConfig(latent_dim=2, width=8, blocks=1, mixtures=1, kl_warmup=5)
    return VAETask(out=out, data=DATA, model=model, validation_images=20, draws=2, train=VALIDATED, resume="auto")


def flow_task(out: Path) -> FlowTask:
    """A conditional flow that initialises from data and rarely has a better validation: its rate is far too high."""
    train = replace(VALIDATED, lr=0.3, patience_validations=6)
    return FlowTask(
        out=out, data=DATA, model=glow(8, 1, 2), conditional=True, validation_images=20, train=train, resume="auto"
    )


CRITIC = LossConfig(
    pixel="charbonnier",
    adversary="hinge",
    adaptive=True,
    adversary_start=2,
    critic_width=8,
    critic_layers=1,
    critic_rate=0.5,
    spectral_norm=True,
    r1=0.1,
    gradient_penalty=0.1,
    lecam=0.1,
)
"""Everything that a game remembers from step to step, begun within the first part of a run."""
Make = Callable[[Path, Pipeline], Task]
SLOW = ("full fine-tuning", "latent by tokens", "unet", "shortcut", "meanflow", "imf", "distilled", "continuous prior")
"""Kinds whose parts another kind has: alphaflow goes from jumps of its own to derivatives of the network."""
COSINE = replace(TRAIN, decay="cosine", save_every=2, keep=2)
KINDS: dict[str, Make] = {
    "vq": lambda out, _: tokenizer_task(out),
    "vq in micro-batches": lambda out, _: tokenizer_task(out, replace(COSINE, accumulation=2)),
    "vq without an average": lambda out, _: tokenizer_task(out, replace(TRAIN, ema=0, posthoc=())),
    "fsq": lambda out, _: tokenizer_task(out, COSINE, TokenizerConfig(levels=(5, 5), width=8, blocks=1)),
    "fsq from principal components": lambda out, _: tokenizer_task(
        out, TRAIN, TokenizerConfig(levels=(5, 5), width=8, blocks=1, shortcut="principal")
    ),
    "kl": lambda out, _: tokenizer_task(out, TRAIN, TokenizerConfig(quantizer="kl", width=8, blocks=1, dim=4)),
    "critic": lambda out, _: replace(tokenizer_task(out), loss=CRITIC),
    "critic in micro-batches": lambda out, _: replace(
        tokenizer_task(out, replace(COSINE, accumulation=2)),
        loss=replace(CRITIC, spectral_norm=False, adversary_start=0),
    ),
    "latent": lambda out, pipeline: replace(
        latent_task(out, pipeline, replace(LATENT, decay="inverse_sqrt", plateau=5)),
        model=replace(DIT, weight="learned"),
    ),
    "latent with muon": lambda out, pipeline: replace(
        latent_task(out, pipeline, replace(LATENT, optimizer="muon", accumulation=2)),
        model=replace(DIT, time="cosmap", weight="min_snr", min_snr_gamma=2.0),
    ),
    "modern latent": modern_task,
    "latent by tokens": partial(modern_task, conditioning="tokens", norm="dyt", mixer="linear"),
    "unet": lambda out, pipeline: replace(
        latent_task(out, pipeline),
        model=replace(DIT, time="uniform", time_shift=2.0, weight="learned", network="unet", dit=DiTConfig()),
    ),
    "aligned": aligned_task,
    "alphaflow": lambda out, pipeline: jump_task(out, pipeline, "alphaflow"),
    **{objective: partial(jump_task, objective=objective) for objective in ("shortcut", "meanflow", "imf")},
    "distilled": lambda out, pipeline: distilled_task(out, pipeline),
    "adapter": finetune_task,
    "full fine-tuning": partial(finetune_task, method="full"),
    **{f"{kind} prior": partial(prior_task, kind=kind) for kind in ("causal", "masked", "continuous")},
    "features": lambda out, _: FeaturesTask(out, DATA, width=8, dim=8, train=COSINE, resume="auto"),
    "vae": lambda out, _: vae_task(out),
    "flow": lambda out, _: flow_task(out),
    "solver": solver_task,
    "table": table_task,
    "plugin": plugin_task,
}


def shortened(task: Task, steps: int | None) -> Task:
    """The same, stopping after so many steps."""
    return replace(task, train=replace(task.train, max_steps=steps))


# ---- stopped and resumed ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The VQ run that was never stopped."""
    torch.set_num_threads(1)
    return train(tokenizer_task(tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped at step 7, with checkpoints of steps 4, 6 and 7."""
    torch.set_num_threads(1)
    config = replace(TRAIN, save_every=2, keep=3, max_steps=7)
    run = train(tokenizer_task(tmp_path_factory.mktemp("half") / "run", config))
    assert steps_of(run) == [7, 6, 4]
    return run


@pytest.fixture
def stopped(half: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run, in another place."""
    return Path(shutil.copytree(half, tmp_path / "run"))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in KINDS])
def test_a_run_that_was_stopped_twice_is_one_that_was_not(kind: str, pipeline: Pipeline, tmp_path: Path) -> None:
    """After 3 and after 7 of 11 steps: within an epoch, within a log interval. Steps, losses and every saved byte agree."""
    make = KINDS[kind]
    whole = train(make(tmp_path / "whole", pipeline))
    parts = train(shortened(make(tmp_path / "parts", pipeline), 3))
    assert steps_of(parts)[0] == 3
    assert any(record.get("partial") for record in records(parts)), "stopped within an interval"
    train(shortened(make(tmp_path / "parts", pipeline), 4))
    assert steps_of(parts)[0] == 7
    train(make(tmp_path / "parts", pipeline))
    assert_same_run(parts, whole)
    assert [record["step"] for record in records(parts) if "loss" in record] == [4, 8, 11]
    assert not any("partial" in record for record in records(parts))


def test_a_run_may_stop_after_every_single_step(tmp_path: Path) -> None:
    config = replace(TRAIN, steps=6)
    whole, parts = train(tokenizer_task(tmp_path / "whole", config)), tmp_path / "parts"
    for step in range(1, 7):
        train(tokenizer_task(parts, replace(config, max_steps=1)))
        assert steps_of(parts)[0] == step
    assert_same_run(parts, whole)


def test_the_vq_runs_restart_codes_throughout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would say nothing about restarts."""
    restarted, restart = [], vq._restart

    def counting(count: Tensor, total: Tensor, candidates: Tensor, limit: Tensor) -> None:
        before = total.clone()
        restart(count, total, candidates, limit)
        restarted.append(int((total != before).any(1).sum()))

    monkeypatch.setattr(vq, "_restart", counting)
    run = train(tokenizer_task(tmp_path / "run"))
    assert len(restarted) == TRAIN.steps
    assert all(sum(part) > 0 for part in (restarted[:3], restarted[3:7], restarted[7:])), restarted
    assert load_file(newest(run) / "model.safetensors")["tokenizer.bottleneck.step"].item() == TRAIN.steps


def test_steps_that_were_skipped_stay_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of steps 1 and 6 are NaN: before and after the stop."""
    loss = TokenizerObjective.loss

    def broken(self: TokenizerObjective, batch: ImageBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        value, logs = loss(self, batch, context)
        return (value * torch.nan if context.step in (1, 6) else value), logs

    monkeypatch.setattr(TokenizerObjective, "loss", broken)
    whole = train(tokenizer_task(tmp_path / "whole"))
    train(tokenizer_task(tmp_path / "parts", replace(TRAIN, max_steps=3)))
    parts = train(tokenizer_task(tmp_path / "parts"))
    assert_same_run(parts, whole)
    assert [record["skipped"] for record in records(parts) if "loss" in record] == [1, 2, 2]
    assert "2 of 11 steps were skipped" in (parts / "log.txt").read_text()


def test_a_stopped_solver_reports_the_evaluations_of_an_unbroken_one(pipeline: Pipeline, tmp_path: Path) -> None:
    """Although its teacher ran twice: what the second start recomputed is no cost of the method."""
    train(solver_task(tmp_path / "whole", pipeline))
    parts = solver_task(tmp_path / "parts", pipeline)
    train(shortened(parts, 5))
    train(parts)
    logged = [
        (solver_path(tmp_path / name, "amed", "uniform", 4) / "log.txt").read_text() for name in ("whole", "parts")
    ]
    costs = [text[: text.index(" evaluations of training")].rsplit(maxsplit=1)[-1] for text in logged]
    assert costs[0].replace(",", "").isdigit()
    last = logged[1].rpartition(" evaluations of training")[0]
    assert last.endswith(f" {costs[0]}")


def test_a_run_is_resumed_after_its_time_limit(whole: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    for step in (1, 2, 3):
        train(tokenizer_task(parts, replace(TRAIN, max_seconds=0.0)))
        assert steps_of(parts)[0] == step, "time that is over still does one step"
    assert "stopped at step 3 of 11; --resume auto continues" in (parts / "log.txt").read_text()
    train(tokenizer_task(parts))
    assert_same_run(parts, whole)


def test_seconds_count_all_starts(tmp_path: Path) -> None:
    run = train(tokenizer_task(tmp_path / "run", replace(TRAIN, max_steps=4)))
    before = json.loads((newest(run) / "state.json").read_text())["seconds"]
    time.sleep(0.3)
    train(tokenizer_task(tmp_path / "run"))
    seconds = [json.loads(x)["seconds"] for x in (run / "metrics.jsonl").read_text().splitlines() if "loss" in x]
    assert len(seconds) == 3 and seconds == sorted(seconds) and seconds[0] <= before < seconds[1]


def test_resuming_in_an_empty_place_is_starting(whole: Path, tmp_path: Path) -> None:
    assert_same_run(train(replace(tokenizer_task(tmp_path / "run"), resume="no")), whole)


def test_resuming_a_finished_run_does_no_further_step(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    weights, logged = contents(newest(run)), records(run)
    train(tokenizer_task(run))
    assert contents(newest(run)) == weights and records(run) == logged


def test_half_written_files_of_a_killed_process_are_removed(stopped: Path, whole: Path) -> None:
    """A temporary directory, one that was about to be replaced, temporary files, and half a line of metrics."""
    root = stopped / "checkpoints"
    for name in (f".step-8.{NOBODY}.tmp", f".step-7.{NOBODY}.old"):
        shutil.copytree(root / "step-7", root / name)
    (root / f".step-8.{NOBODY}.tmp" / "manifest.json").unlink()
    for name in ("checkpoints/.latest", ".metrics.jsonl", ".env.json", ".config.yaml"):
        (stopped / f"{name}.{NOBODY}.tmp").write_text("half")
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    train(tokenizer_task(stopped))
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-11", "step-7"]
    assert (root / "latest").read_text() == "step-11\n"
    assert [p.name for p in stopped.rglob(".*")] == [".lock"]
    assert_same_run(stopped, whole)


def test_a_finished_run_is_tidied_too(whole: Path, tmp_path: Path) -> None:
    """Half-written files wherever it writes, and checkpoints that its process was killed before it removed them."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for step in (8, 9, 10):
        shutil.copytree(newest(whole), run / f"checkpoints/step-{step}")
        seal(run / f"checkpoints/step-{step}")
    for folder in ("best", "posthoc", "samples", "checkpoints", "tokenizer", "solvers/a/checkpoints"):
        (run / folder).mkdir(parents=True, exist_ok=True)
        for owner in (NOBODY, f"{MACHINE}-{NOBODY}"):
            (run / folder / f".latest.{owner}.tmp").write_text("half")
    train(tokenizer_task(run))
    assert steps_of(run) == [11, 10]
    assert [p.name for p in run.rglob(".*")] == [".lock"]
    assert_same_run(run, whole)


LEFT = ["half a configuration", "a configuration", "half of env.json"]


@pytest.mark.parametrize("left", LEFT)
def test_a_process_killed_while_it_made_the_run_is_no_obstacle(left: str, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if left == "half a configuration":
        (run / f".config.yaml.{NOBODY}.tmp").write_bytes((whole / "config.yaml").read_bytes()[:50])
    if left in ("a configuration", "half of env.json"):
        (run / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
    if left == "half of env.json":
        (run / "env.json").write_bytes((whole / "env.json").read_bytes()[:50])
    assert_same_run(train(tokenizer_task(run)), whole)
    assert json.loads((run / "env.json").read_text())["starts"][0]["step"] == 0


def test_a_run_from_before_an_option_goes_on_as_it_began(tmp_path: Path) -> None:
    """Its files lack the key of the shortcuts' start, and it began with orthogonal ones, whatever is the default by now."""
    task = tokenizer_task(tmp_path / "run", model=replace(VQ, shortcut="orthogonal"))
    whole = train(replace(task, out=tmp_path / "whole"))
    run = train(shortened(task, 3))
    values = read_yaml(run / "config.yaml")
    del values["model"]["shortcut"]
    write_yaml(run / "config.yaml", values)
    checkpoint = newest(run)
    state = json.loads((checkpoint / "state.json").read_text())
    del state["config"]["model.shortcut"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)
    with unchanged(run), pytest.raises(UsageError, match=r"another model\.shortcut") as caught:
        train(replace(task, model=replace(VQ, shortcut="principal")))
    assert "was 'orthogonal', now 'principal'" in str(caught.value)
    train(replace(from_dict(TokenizerTask, Run.open(run, "tokenizer").config), resume="auto"))
    assert_same_run(run, whole)


def test_a_latent_run_from_before_jumps_goes_on_as_it_began(pipeline: Pipeline, tmp_path: Path) -> None:
    """Its files name no objective, no time scale, no kinds of blocks, no densities or weights of later and no origin."""
    later = [field.name for field in fields(DiTConfig)][6:]
    drawn = ("time_mode", "time_shift", "weight", "min_snr_gamma", "scales", "direction")
    new = {"model.objective", "model.network", "init", "teacher", *(f"model.dit.{name}" for name in later)}
    new |= {f"model.{name}" for name in drawn}
    config = replace(TRAIN, steps=3, posthoc=())
    whole = train(latent_task(tmp_path / "whole", pipeline, config))
    run = train(shortened(latent_task(tmp_path / "run", pipeline, config), 1))
    values = read_yaml(run / "config.yaml")
    for name in ("objective", "jump", "network", "unet", *drawn):
        del values["model"][name]
    values["model"]["dit"] = {key: value for key, value in values["model"]["dit"].items() if key not in later}
    for name in ("origin", "init", "teacher", "align"):
        values.pop(name, None)
    write_yaml(run / "config.yaml", values)
    checkpoint = newest(run)
    state = json.loads((checkpoint / "state.json").read_text())
    old = {key: value for key, value in state["config"].items() if key not in new and not key.startswith(LATER)}
    state["config"] = {key: value for key, value in old.items() if not key.startswith("origin.")}
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)
    assert_same_run(train(latent_task(run, pipeline, config)), whole)


# ---- several processes ----


@pytest.mark.parametrize(
    "kind",
    [
        "vq",
        "latent",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("aligned", "critic", "vae", "adapter", "masked prior")
        ),
    ],
)
def test_two_processes_resume_bit_for_bit_and_one_up_to_rounding(kind: str, pipeline: Pipeline, tmp_path: Path) -> None:
    """Stopped after 5 of 9 steps, within a log interval whose sums each process keeps for itself."""
    task = KINDS[kind](tmp_path / "whole", pipeline)
    task = replace(task, train=replace(task.train, steps=9, lr=3e-3))
    assert isinstance(task, TokenizerTask | LatentTask | FinetuneTask | PriorTask | VAETask)
    whole, parts, alone = tmp_path / "whole", tmp_path / "parts", tmp_path / "alone"
    train_together(task)
    train_together(shortened(replace(task, out=parts), 5))
    shutil.copytree(parts, alone)
    train_together(replace(task, out=parts))
    assert_same_run(parts, whole)
    note = "note: processes changed, so that last digits may differ from an unbroken run"
    assert note not in (parts / "log.txt").read_text()

    train(replace(task, out=alone))
    assert note in (alone / "log.txt").read_text()
    idle = without_gradient(whole)
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        tensors, expected = load_file(newest(alone) / file), load_file(newest(whole) / file)
        assert tensors.keys() == expected.keys()
        for name in expected.keys() - idle:
            torch.testing.assert_close(tensors[name], expected[name], rtol=1e-4, atol=1e-4, msg=f"{file} {name}")
    losses, expected = ({r["step"]: r["loss"] for r in records(run) if "loss" in r} for run in (alone, whole))
    assert losses.keys() == expected.keys() == {4, 8, 9}
    assert [losses[s] for s in (4, 9)] == pytest.approx([expected[s] for s in (4, 9)], rel=1e-4)


def without_gradient(run: Path) -> set[str]:
    """Parameters that act on nothing, such as a bias before a normalisation: AdamW moves them by rounding alone."""
    state = load_file(newest(run) / "optimizer.safetensors")
    seconds = {name.rpartition("/")[0]: value for name, value in state.items() if name.endswith("/exp_avg_sq")}
    idle = {name for name, value in seconds.items() if value.max() < 1e-15}
    assert len(idle) < len(seconds) / 2
    return idle


# ---- damaged checkpoints ----


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1 << 3
    file.write_bytes(content)


def clear(folder: Path) -> None:
    for file in folder.glob("*.*"):
        file.unlink()


def write_text(folder: Path) -> None:
    """The smallest thing that a checkpoint can hold."""
    (folder / "a").write_text("text")


@dataclass(frozen=True)
class Damage:
    """What happened to a file of the newest checkpoint, and the words that name it."""

    file: str
    harm: Callable[[Path], None]
    words: str


DAMAGES = {
    "one bit of the exported tokenizer flipped": Damage("tokenizer/config.json", flip, "tokenizer/config.json is not"),
    "manifest cut": Damage("manifest.json", cut, "its manifest cannot be used"),
    "everything missing": Damage("", clear, "its manifest cannot be used"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(
    name: str, whole: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name and the reason are on the terminal and in the log, and it is set aside."""
    damage, root = DAMAGES[name], stopped / "checkpoints"
    damage.harm(root / "step-7" / damage.file)
    as_found = everything(root / "step-7")
    train(tokenizer_task(stopped))
    for output in (capsys.readouterr().out, (stopped / "log.txt").read_text()):
        (skipped,) = [line for line in output.splitlines() if line.startswith("skipped")]
        assert skipped.startswith("skipped step-7: ") and damage.words in skipped
        assert "resuming from step 6" in output
    assert everything(root / "damaged-step-7") == as_found
    assert_same_run(stopped, whole)


def test_two_damaged_checkpoints_are_skipped_and_a_run_without_a_valid_one_starts_again(
    whole: Path, stopped: Path, tmp_path: Path
) -> None:
    for step in (7, 6):
        flip(stopped / "checkpoints" / f"step-{step}" / "model.safetensors")
    worse = Path(shutil.copytree(stopped, tmp_path / "worse"))
    flip(worse / "checkpoints" / "step-4" / "model.safetensors")
    train(tokenizer_task(stopped))
    assert "resuming from step 4" in (stopped / "log.txt").read_text()
    assert_same_run(stopped, whole)
    train(tokenizer_task(worse))
    assert (worse / "log.txt").read_text().count("training on cpu") == 2, "from the beginning, twice"
    assert {p.name for p in (worse / "checkpoints").glob("damaged-*")} == {f"damaged-step-{n}" for n in (4, 6, 7)}
    assert_same_run(worse, whole)


def test_no_flipped_bit_of_a_manifest_leads_astray(tmp_path: Path) -> None:
    """One bit of each byte in turn: the checkpoint is invalid, or is still the one that it is (a version may differ)."""
    saved = checkpoints.save(tmp_path, 12, write_text)
    file = saved.path / checkpoints.MANIFEST
    content = file.read_bytes()
    invalid = 0
    for i in range(len(content)):
        file.write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 7)]) + content[i + 1 :])
        found = next(checkpoints.valid(tmp_path, lambda _: None), None)
        assert found in (None, saved), f"byte {i}"
        invalid += found is None
    assert invalid > 100


def test_tensors_of_other_shapes_raise_an_error_of_three_lines(stopped: Path, whole: Path) -> None:
    """A checkpoint of an older version of a network, under the same configuration."""
    file = newest(stopped) / "model.safetensors"
    state = load_file(file)
    save_file({key: value[..., None].clone() for key, value in state.items()}, file)
    seal(file.parent)
    with unchanged(stopped / "checkpoints"), pytest.raises(DataError, match="does not fit this training") as caught:
        train(tokenizer_task(stopped))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_a_pickle_raises_and_is_not_executed(name: str, stopped: Path, tmp_path: Path) -> None:
    """Even one whose manifest vouches for it."""
    file, marker = newest(stopped) / f"{name}.safetensors", tmp_path / "marker"
    state = {key: value.clone() for key, value in load_file(file).items()}  # what was loaded is a view of the file
    torch.save({**state, "trap": Trap(marker)}, file)
    seal(file.parent)
    with unchanged(stopped / "checkpoints"), pytest.raises(DataError, match="no safetensors file") as caught:
        train(tokenizer_task(stopped))
    assert not marker.exists()
    assert caught.value.exit_code == 3 and str(file) in str(caught.value)


# ---- other configurations ----


def changed(out: Path, **train: object) -> TokenizerTask:
    """The stopped run's task, but for these settings of its training."""
    return tokenizer_task(out, replace(TRAIN, **train))  # pyright: ignore[reportArgumentType]


CHANGES: dict[str, Callable[[Path], TokenizerTask]] = {
    "train.lr": lambda out: changed(out, lr=2e-3),
    "train.seed": lambda out: changed(out, seed=1),
    "train.batch_size": lambda out: changed(out, batch_size=16),
    "train.ema": lambda out: changed(out, ema=0.5),
    "train.posthoc": lambda out: changed(out, posthoc=(0.05,)),
    "train.decay": lambda out: changed(out, decay="cosine"),
    "train.clip": lambda out: changed(out, clip=2.0),
    "model.width": lambda out: tokenizer_task(out, model=replace(VQ, width=16)),
    "model.codebook_size": lambda out: tokenizer_task(out, model=replace(VQ, codebook_size=32)),
    "flip": lambda out: replace(tokenizer_task(out), flip=False),
    "data.held_out": lambda out: replace(tokenizer_task(out), data=replace(DATA, held_out=0.8)),
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_configuration_raises_with_its_key_and_changes_nothing(key: str, stopped: Path) -> None:
    with unchanged(stopped), pytest.raises(UsageError) as caught:
        train(CHANGES[key](stopped))
    assert caught.value.exit_code == 2
    assert f"another {key}" in caught.value.what and f"{key} was " in caught.value.why


def test_every_changed_key_is_named(stopped: Path) -> None:
    with pytest.raises(UsageError, match="another") as caught:
        train(changed(stopped, lr=2e-3, seed=1, max_seconds=9.0))
    assert caught.value.what == "this run was started with another train.lr, train.seed"
    assert caught.value.why == "train.lr was 0.01, now 0.002; train.seed was 0, now 1"


def test_more_steps_under_a_cosine_are_invalid(tmp_path: Path) -> None:
    """Every rate would have been another."""
    run = train(changed(tmp_path / "run", decay="cosine", max_steps=3))
    with unchanged(run), pytest.raises(UsageError, match=r"train\.steps was 11, now 12"):
        train(changed(run, decay="cosine", steps=12))


def test_a_finished_run_takes_more_steps_at_a_constant_rate(whole: Path, tmp_path: Path) -> None:
    run = train(changed(tmp_path / "run", steps=8))
    assert records(run)[-1]["final"]
    train(changed(run, steps=11))
    assert_same_files(newest(run), newest(whole))
    assert records(run) == records(whole)


def test_budgets_and_reports_may_change(whole: Path, stopped: Path) -> None:
    """In another place than where the run was started, too. config.yaml then has the new values, but of one start's limits."""
    budgets = {"save_every": 3, "keep": 1, "patience": 3, "save_seconds": 0.0}
    train(changed(stopped, **budgets, max_seconds=1000.0, log_with=("tensorboard",)))
    assert_same_run(stopped, whole)
    config = (stopped / "config.yaml").read_text()
    assert all(f"{key}: {value}" in config for key, value in budgets.items()) and "max_" not in config
    assert "note:" not in (stopped / "log.txt").read_text()


def test_the_log_interval_may_change(whole: Path, stopped: Path) -> None:
    train(changed(stopped, log_every=3))
    assert_same_files(newest(stopped), newest(whole))
    assert [record["step"] for record in records(stopped)] == [4, 9, 11, 11]


SMOOTH = TokenizerConfig(quantizer="kl", width=8, blocks=1, dim=4)
"""A tokenizer without codes, which rounding could turn into others."""


def test_more_accumulation_is_noted_and_changes_results_by_rounding_only(tmp_path: Path) -> None:
    """Changed within an interval, all of whose steps have equal weights."""
    whole = train(tokenizer_task(tmp_path / "whole", TRAIN, SMOOTH))
    run = train(tokenizer_task(tmp_path / "run", replace(TRAIN, max_steps=5), SMOOTH))
    train(tokenizer_task(tmp_path / "run", replace(TRAIN, accumulation=2), SMOOTH))
    note = "note: train.accumulation changed, so that last digits may differ from an unbroken run"
    assert (run / "log.txt").read_text().count(note) == 1
    assert len(records(run)) == len(records(whole)) == 4
    for record, expected in zip(records(run), records(whole), strict=True):
        assert record == pytest.approx(expected, rel=1e-3)


# ---- other data ----


def write_images(root: Path, count: int = 8) -> None:
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 20 * i + (9 if label == "a" else 0)).save(root / label / f"{i}.png")


def test_changed_images_raise_and_moved_ones_do_not(tmp_path: Path) -> None:
    images, config = tmp_path / "images", replace(TRAIN, steps=3, batch_size=8)
    write_images(images)
    task = replace(tokenizer_task(tmp_path / "run", config), data=DataConfig(str(images)))
    run = train(shortened(task, 2))
    moved = images.rename(tmp_path / "moved")
    Image.new("L", (8, 8), 255).save(moved / "a" / "new.png")
    there = replace(task, data=DataConfig(str(moved)))
    with unchanged(run), pytest.raises(UsageError, match="another data fingerprint"):
        train(there)
    (moved / "a" / "new.png").unlink()
    train(there)
    assert steps_of(run)[0] == 3


def test_latents_of_another_tokenizer_raise(pipeline: Pipeline, tmp_path: Path) -> None:
    """One at the same path, of the same kind and size."""
    tokenizer = Path(shutil.copytree(pipeline.tokenizer, tmp_path / "tokenizer"))
    task = replace(latent_task(tmp_path / "run", pipeline), tokenizer=tokenizer)
    run = train(shortened(task, 2))
    file = newest(tokenizer) / "tokenizer" / "diffusion_pytorch_model.safetensors"
    other = {
        name: value * 1.01 if value.is_floating_point() else value.clone() for name, value in load_file(file).items()
    }
    save_file(other, file, {"format": "pt"})
    seal(file.parents[1])
    with unchanged(run), pytest.raises(UsageError, match="another data fingerprint"):
        train(task)


# ---- one trainer at a time ----


def test_of_two_processes_one_overwrites_and_the_other_waits(whole: Path, stopped: Path) -> None:
    (stopped / "samples" / "old").touch()
    train_together(replace(tokenizer_task(stopped), resume="no", overwrite=True))
    assert newest(stopped).name == "step-11" and not (stopped / "samples" / "old").exists()
    assert len(records(stopped)) == len(records(whole))


def test_a_run_is_locked_to_the_end_of_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the finished tokenizer is written, too."""
    task, publish = tokenizer_task(tmp_path / "run"), train_tokenizer.publish

    def published(*arguments: object) -> None:
        with unchanged(task.out), pytest.raises(UsageError, match="being trained by another process"):
            train(replace(task, resume="no", overwrite=True))
        publish(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(train_tokenizer, "publish", published)
    assert (train(task) / "tokenizer").exists()


def test_a_start_that_failed_is_no_obstacle_to_the_same_command(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first checkpoint there is nothing to lose; afterwards there is."""
    task = replace(tokenizer_task(tmp_path / "run"), resume="no")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TokenizerObjective, "loss", fail)
        train(task)
    assert (task.out / "log.txt").exists()
    assert_same_run(train(task), whole)
    with unchanged(task.out), pytest.raises(UsageError, match="already holds a run"):
        train(task)


def test_a_run_that_is_being_trained_is_not_overwritten(stopped: Path) -> None:
    with lock(stopped), unchanged(stopped), pytest.raises(MidwayError, match="being trained by another process"):
        train(replace(tokenizer_task(stopped), resume="no", overwrite=True))
