"""Priors trained by two processes, each with all weights (DDP) or a shard of them (FSDP 2), are those of one process."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from multiprocess import together
from regression import records, saved
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.core.runs import Run
from midway.gen.priors.causal import CausalPrior
from midway.gen.priors.config import Kind, PriorConfig
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.masked import MaskedPrior
from midway.gen.priors.prior import CodePrior
from midway.gen.training.accelerator import check_sharding, make_accelerator
from midway.gen.training.batches import CodeBatch
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.gen.training.interface import Items

pytestmark = [pytest.mark.usefixtures("on_the_cpu"), pytest.mark.slow]

CONFIG = TrainConfig(steps=4, batch_size=8, lr=1e-2, warmup=2, ema=0.8, log_every=1)
LAYOUT = CodeLayout(((4, 4),), ((30, 20),))
KINDS: tuple[Kind, ...] = ("causal", "masked")
POLICIES: dict[str, dict[str, Any]] = {
    "": {},
    "block": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_cls_names_to_wrap": ["Block"]},
    "root": {"auto_wrap_policy": "NO_WRAP"},
}


def _items(wanted: Tensor) -> CodeBatch:
    drawn = torch.rand(20, 16, 2, generator=torch.Generator().manual_seed(0))
    return CodeBatch((drawn * torch.tensor(LAYOUT.sizes)).long()[wanted], wanted % 3)


def _prior(kind: Kind) -> CodePrior:
    torch.manual_seed(0)
    config = PriorConfig(kind, width=32, depth=2, heads=2, shuffle_steps=3 if kind == "causal" else 0)
    return (CausalPrior if kind == "causal" else MaskedPrior)(config, LAYOUT, 3)


def _train(folder: Path, kind: Kind, policy: str, config: TrainConfig = CONFIG) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(config)
    if policy:
        _shard(accelerator, policy)
    fit(_prior(kind), Items(_items, 20), config, Run(folder, "test"), accelerator)


def _shard(accelerator: Accelerator, policy: str) -> None:
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT", **POLICIES[policy]
    )


def _one_of_two(rank: int, folder: Path) -> None:
    for kind in KINDS:
        for policy in POLICIES:
            _train(folder / f"{kind} {policy}", kind, policy)


def _losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder)]


def _check_weights(found: Path, expected: Path) -> None:
    """Within a hundredth of a step of the optimizer; losses of step s see those of step s - 1 alone."""
    theirs = saved(expected)
    assert any(name == "model/trunk.blocks.0.qkv.weight" for name in theirs)
    for name, value in saved(found).items():
        if name.startswith(("model/", "ema/")):
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-4, msg=f"{found.name}: {name}")


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """In losses and in weights."""
    together(_one_of_two, 2, tmp_path)
    for kind in KINDS:
        _train(tmp_path / kind, kind, "")
        expected = _losses(tmp_path / kind)
        assert len(set(expected)) == CONFIG.steps
        _train(tmp_path / f"{kind} accumulated", kind, "", replace(CONFIG, accumulation=4))
        for name in (f"{kind} accumulated", *(f"{kind} {policy}" for policy in POLICIES)):
            assert _losses(tmp_path / name) == pytest.approx(expected, rel=1e-5)
            _check_weights(tmp_path / name, tmp_path / kind)


def test_priors_are_not_sharded_by_size() -> None:
    """FSDP gathers weights of modules that are called: no list of blocks is, and of heads digits."""
    wide = CausalPrior(PriorConfig("causal", width=32, depth=1, heads=2), CodeLayout(((4, 4),), ((300, 200),)), 3)
    for model, size, part in ((_prior("masked"), 1000, "trunk.blocks"), (wide, 20_000, "head")):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=size)
        accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
        with pytest.raises(UsageError, match=f"by size cannot shard {part} of"):
            check_sharding(model, accelerator)  # pyright: ignore[reportArgumentType]
        plugin.min_num_params = 10**6
        check_sharding(model, accelerator)  # pyright: ignore[reportArgumentType]
