"""Training scripts whose parameters are sharded over two processes (FSDP 2): whole runs, as those of one process.

Accelerate offers FSDP for accelerators only; its code for FSDP 2 works on gloo processes as well.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from multiprocess import together

from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.load import load_model, load_tokenizer
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.flags.tasks import LatentTask, TokenizerConfig, TokenizerTask
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.training import accelerator as accelerators
from midway.gen.training.config import TrainConfig
from midway.gen.trainings import train_latent, train_tokenizer

TRAIN = TrainConfig(steps=4, batch_size=8, ema=0.5, log_every=2)


def tasks(folder: Path) -> tuple[TokenizerTask, LatentTask]:
    model = TokenizerConfig(width=16, downsample=4, blocks=1)
    tokenizer = TokenizerTask(folder / "tokenizer", data=DataConfig("digits"), model=model, train=TRAIN)
    dit = LatentModelConfig(dit=DiTConfig(width=16, depth=2, heads=2))
    return tokenizer, LatentTask(out=folder / "model", tokenizer=folder / "tokenizer", model=dit, train=TRAIN)


def sharding(config: TrainConfig, out: Path | None = None, idle: bool = False) -> Accelerator:
    """`make_accelerator`, and FSDP 2 of what it prepares."""
    AcceleratorState._reset_state(reset_partial_state=True)
    made = accelerators.make_accelerator(config, out, idle)
    made.state.distributed_type = DistributedType.FSDP
    made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
        auto_wrap_policy="no_wrap",
    )
    return made


def train_both(rank: int, folder: Path) -> None:
    """A tokenizer, a latent model on it, and a dry run, each sharded."""
    train_tokenizer.make_accelerator = train_latent.make_accelerator = sharding  # pyright: ignore
    tokenizer, latent = tasks(folder)
    train_tokenizer.train(tokenizer)
    torch.distributed.barrier()
    train_latent.train(latent)
    train_latent.train(replace(latent, out=folder / "dry", dry_run=True, dry_run_classes=10))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    together(train_both, 2, folder)
    return folder


def final(run: Path) -> dict[str, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(record for record in records if record.get("final"))


@pytest.mark.usefixtures("on_the_cpu")
def test_sharded_scripts_end_as_those_of_one_process(sharded: Path, tmp_path: Path) -> None:
    """The tokenizer is evaluated and published from its whole weights, and the latent model loads."""
    tokenizer, latent = tasks(tmp_path)
    train_tokenizer.train(tokenizer)
    train_latent.train(latent)
    for name in ("held_out_mse", "held_out_psnr"):
        assert final(sharded / "tokenizer")[name] == pytest.approx(final(tmp_path / "tokenizer")[name], rel=1e-3)
    assert (sharded / "tokenizer" / "tokenizer" / "README.md").exists()
    for folder in (sharded, tmp_path):
        assert "2 process(es)" in (sharded / "model" / "log.txt").read_text()
        assert load_tokenizer(folder / "tokenizer")[0].latent_shape == (4, 2, 2)
    found, expected = (load_model(folder / "model", torch.device("cpu")).model for folder in (sharded, tmp_path))
    for (name, value), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-3, msg=name)


def test_a_sharded_dry_run_leaves_nothing(sharded: Path) -> None:
    assert not (sharded / "dry").exists()
    assert re.search(r"processes", str((sharded / "model" / "env.json").read_text()))
