"""Sharded training (FSDP 2) is plain training: the same losses and checkpoints, which go on in either way.

Accelerate offers FSDP for accelerators only;
its code for FSDP 2 works on gloo processes as well.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from multiprocess import together
from regression import assert_same_bits, records, saved
from safetensors.torch import load_file
from small_models import CLASSES, LATENT_SHAPE, SIZE, images, latent_config, latents, tokenizer
from torch import Tensor
from torch.distributed.tensor import DTensor

from midway.gen.core.runs import Run
from midway.gen.diffusion.model import LatentModel
from midway.gen.networks.presets import MODERN
from midway.gen.objectives.jump_config import JumpConfig
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.gen.training.interface import Hooks, Items

pytestmark = pytest.mark.usefixtures("on_the_cpu")

CONFIG = TrainConfig(steps=6, batch_size=8, lr=1e-2, warmup=2, clip=0.3, ema=0.8, posthoc=(0.1,), posthoc_every=3)
CONFIG = replace(CONFIG, weight_decay=0.1, log_every=2, keep=9)


JUMPS: dict[str, Any] = {"objective": "alphaflow", "jump": JumpConfig(alpha_steps=6)}
"""First with jumps of its own in its targets, at the end with derivatives."""
KINDS: dict[str, Any] = {**MODERN, "norm": "dyt", "conditioning": "tokens"}
"""Blocks whose parameters others have not: one number per norm, and tokens of the network's own."""


class Watched(LatentModel):
    """A small latent model that notes the kinds of its parameters, and how large a share of them this process holds after
    each step; one sample of the steps `bad` has no finite loss."""

    def __init__(self, bad: tuple[int, ...] = (), jumps: bool = False, kinds: bool = False) -> None:
        torch.manual_seed(0)
        config = replace(latent_config(), **(JUMPS if jumps else {}))
        config = replace(config, dit=replace(config.dit, **(KINDS if kinds else {})))
        super().__init__(config, LATENT_SHAPE, CLASSES)
        self.bad = torch.tensor([(step + 1) * CONFIG.batch_size - 1 for step in bad])
        self.kinds: set[str] = set()
        self.share = 0.0

    def loss(self, batch: LatentBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = super().loss(batch, context)
        return torch.where(torch.isin(context.sample_ids, self.bad).any(), torch.nan, loss), logs

    def after_step(self, step_ok: Tensor) -> None:
        parameters = list(self.parameters())
        self.kinds |= {"sharded" if isinstance(p, DTensor) else "whole" for p in parameters}
        local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
        self.share = local / sum(p.numel() for p in parameters)


def shard(accelerator: Accelerator, policy: str) -> None:
    """Have Accelerate shard what it prepares."""
    accelerator.state.distributed_type = DistributedType.FSDP
    options: dict[str, Any] = {
        "block": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_cls_names_to_wrap": ["Block"]},
        "size": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 10_000},
        "root": {"auto_wrap_policy": "NO_WRAP"},
    }[policy]
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT", **options
    )


@dataclass(frozen=True)
class Case:
    """One training: how it is sharded ("" for not at all), and after which other run it goes on."""

    policy: str = ""
    config: TrainConfig = CONFIG
    bad: tuple[int, ...] = ()
    resume: str = ""
    jumps: bool = False
    kinds: bool = False


STOPPING = replace(CONFIG, max_steps=3)
CASES = {
    "plain": Case(),
    "block": Case("block"),
    "size": Case("size"),
    "root": Case("root"),
    "accumulation": Case("block", replace(CONFIG, accumulation=2)),
    "skipping": Case("block", bad=(1, 4)),
    "stopped": Case("block", STOPPING),
    "again": Case("block", resume="stopped"),
    "plain stopped": Case("", STOPPING),
    "sharded later": Case("block", resume="plain stopped"),
    **{f"jumps {policy}": Case(policy, jumps=True) for policy in ("", "size")},
    **{f"kinds {policy}": Case(policy, jumps=policy != "block", kinds=True) for policy in ("block", "root")},
}


def train(folder: Path, case: Case) -> dict[str, Any]:
    """Train a case in this process; what it saw."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder.mkdir(parents=True, exist_ok=True)
    model, accelerator, previews = Watched(case.bad, case.jumps, case.kinds), make_accelerator(case.config), list[int]()
    if case.policy:
        shard(accelerator, case.policy)
    run, items = Run(folder, "test"), Items(latents, SIZE)
    result = fit(model, items, case.config, run, accelerator, Hooks(previews.append), bool(case.resume))
    return {
        "kinds": sorted(model.kinds),
        "share": model.share,
        "previews": previews,
        "steps": result.steps,
        "loss": result.last["loss"],
    }


def one_of_two(rank: int, folder: Path) -> None:
    """Train every case; one that goes on does so in a copy of the run it goes on from."""
    for name, case in CASES.items():
        if case.resume and rank == 0:
            (folder / case.resume).rename(folder / name)
        if case.resume:
            torch.distributed.barrier()
        seen = train(folder / name, case)
        (folder / f"{name}-{rank}.json").write_text(json.dumps(seen))
    (folder / f"tokenizer-{rank}.json").write_text(json.dumps(tokenize(folder / "tokenizer")))
    for policy in ("root", "size"):
        tokenize(folder / f"started by {policy}", policy, shortcut="principal", steps=0)


def tokenize(folder: Path, policy: str = "root", shortcut: str = "orthogonal", steps: int = 6) -> dict[str, Any]:
    """Train a VQ tokenizer in this process; its loss, or why there is none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = replace(CONFIG, steps=steps)
    accelerator = make_accelerator(config)
    if policy:
        shard(accelerator, policy)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = fit(tokenizer(shortcut=shortcut), Items(images, SIZE), config, Run(folder, "test"), accelerator)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"loss": result.last.get("loss")}


@dataclass(frozen=True)
class Sharded:
    """All cases, trained by two processes."""

    folder: Path

    def saved(self, name: str, step: int = 6) -> dict[str, Tensor]:
        return tensors(self.folder / name, step)

    def seen(self, name: str) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def tensors(run: Path, step: int = 6) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, as file/name, but the recent losses and sums, which are logs."""
    return {name: value for name, value in saved(run, step).items() if not name.startswith("progress")}


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    folder = tmp_path_factory.mktemp("sharded")
    together(one_of_two, 2, folder)
    return Sharded(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, ...]], Path]:
    """`one(bad)`: the same training in this process alone."""
    folders: dict[tuple[int, ...], Path] = {}

    def trained(bad: tuple[int, ...] = ()) -> Path:
        if bad not in folders:
            folders[bad] = tmp_path_factory.mktemp("one")
            train(folders[bad], Case(bad=bad))
        return folders[bad]

    return trained


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


One = Callable[[tuple[int, ...]], Path]


@pytest.mark.parametrize("policy", ["block", "size", "root"])
def test_each_process_holds_its_half_of_every_parameter(policy: str, two: Sharded) -> None:
    for seen in two.seen(policy):
        assert seen["kinds"] == ["sharded"]
        assert seen["share"] == pytest.approx(0.5, abs=0.05)
    assert two.seen("plain")[0]["kinds"] == ["whole"]


@pytest.mark.parametrize("name", ["block", "size", "root", "accumulation", "plain"])
def test_sharded_training_is_that_of_one_process(name: str, two: Sharded, one: One) -> None:
    """Losses, weights, moments and all averages, with whole tensors in the checkpoint."""
    alone = one(())
    assert losses(two.folder / name) == pytest.approx(losses(alone), rel=1e-5)
    assert_close(two.saved(name), tensors(alone))
    assert {file.partition("/")[0] for file in two.saved(name)} == {"model", "ema", "optimizer", "posthoc-0.100"}
    assert two.saved(name)["model/network.embed.weight"].shape == (16, 3)


def test_jumps_are_those_of_one_process(tmp_path: Path, two: Sharded) -> None:
    """Whose targets are computed without what wraps the network, but for what gathers its shards."""
    train(tmp_path, Case(jumps=True))
    for policy in ("", "size"):
        assert losses(two.folder / f"jumps {policy}") == pytest.approx(losses(tmp_path), rel=1e-5)
        assert_close(two.saved(f"jumps {policy}"), tensors(tmp_path))


@pytest.mark.parametrize("policy", ["block", "root"])
def test_other_blocks_are_those_of_one_process(policy: str, tmp_path: Path, two: Sharded) -> None:
    """Also in jumps, which differentiate them."""
    train(tmp_path, replace(CASES[f"kinds {policy}"], policy=""))
    assert losses(two.folder / f"kinds {policy}") == pytest.approx(losses(tmp_path), rel=1e-5)
    assert_close(two.saved(f"kinds {policy}"), tensors(tmp_path))


def test_the_average_is_not_the_newest_weights(two: Sharded) -> None:
    """Else the comparison above would say nothing about it."""
    found = two.saved("block")
    for average in ("ema", "posthoc-0.100"):
        assert (found[f"{average}/network.head.weight"] - found["model/network.head.weight"]).abs().max() > 1e-3


def test_snapshots_of_averages_are_whole(two: Sharded, one: One) -> None:
    alone = one(())
    names = ["step-3-std-0.100.safetensors", "step-6-std-0.100.safetensors"]
    assert sorted(path.name for path in (two.folder / "block" / "posthoc").iterdir()) == names
    for name in names:
        found, expected = (load_file(run / "posthoc" / name) for run in (two.folder / "block", alone))
        assert_close(found, expected)


def test_a_bad_step_of_one_process_is_skipped_under_sharding(two: Sharded, one: One) -> None:
    alone = one((1, 4))
    assert_close(two.saved("skipping"), tensors(alone))
    assert all(math.isfinite(loss) for loss in losses(two.folder / "skipping"))
    assert losses(two.folder / "skipping") == pytest.approx(losses(alone), rel=1e-5)
    assert "2 of 6 steps were skipped" in (two.folder / "skipping" / "log.txt").read_text()


def test_a_stopped_sharded_run_resumes_bit_for_bit(two: Sharded) -> None:
    assert two.seen("stopped")[0]["steps"] == 3
    assert_same_bits(two.folder / "again", two.folder / "block")


def test_a_sharded_run_resumes_in_one_process(tmp_path: Path, two: Sharded, one: One) -> None:
    """And a plain run goes on sharded: the files do not know how they were written."""
    begun = two.folder / "again" / "checkpoints" / "step-3"
    (tmp_path / "checkpoints").mkdir()
    begun.rename(tmp_path / "checkpoints" / "step-3")
    assert train(tmp_path, Case(resume="again"))["steps"] == 6
    assert_close(tensors(tmp_path), tensors(one(())))
    assert_close(two.saved("sharded later"), tensors(one(())))
    assert "processes changed" in (tmp_path / "log.txt").read_text()


def test_a_sharded_model_is_not_previewed(two: Sharded, one: One) -> None:
    """Only the main process would call the preview, and sharded layers need all."""
    assert [seen["previews"] for seen in two.seen("block")] == [[], []]
    assert [seen["previews"] for seen in two.seen("plain")] == [[6], []]


def test_a_tokenizer_can_be_sharded_too(tmp_path: Path, two: Sharded) -> None:
    """It starts from data, before the first step, and its codebook is a buffer, the same on every process."""
    expected = tokenize(tmp_path, policy="")
    for seen in two.seen("tokenizer"):
        assert "error" not in seen, seen
        assert seen["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    learned = [
        {k: v for k, v in found.items() if "bottleneck" in k} for found in (two.saved("tokenizer"), tensors(tmp_path))
    ]
    assert learned[0]
    assert_close(*learned)  # biases before a normalisation have no gradient, and AdamW moves them by rounding alone


@pytest.mark.parametrize("policy", ["root", "size"])
def test_parameters_that_start_from_data_do_so_in_their_shards(policy: str, tmp_path: Path, two: Sharded) -> None:
    """Shards of the whole model, which are gathered while the start runs, and of single layers, which are not."""
    tokenize(tmp_path, policy="", shortcut="principal", steps=0)
    expected, found = tensors(tmp_path, step=0), two.saved(f"started by {policy}", step=0)
    assert bool(expected["model/tokenizer.shortcut_started"])
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
