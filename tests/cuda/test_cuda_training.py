"""Training on a GPU: a resumed run is the uninterrupted one, bit for bit. No fixture of conftest.py is used."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from devices import every_device, on_cuda
from torch import Tensor

pytest.importorskip("accelerate", reason="fit() needs it")
from accelerate.state import AcceleratorState

from midway.gen.core import randomness
from midway.gen.core.config import to_dict
from midway.gen.core.runs import Run
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.gen.training.interface import Items
from midway.gen.training.loading import Loader

SIZE = 40
TRAIN = TrainConfig(steps=6, batch_size=16, warmup=2, ema=0.9, log_every=2, deterministic=True, save_seconds=0)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of the process that a training changes."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)


def untrained() -> LatentModel:
    """The same at every call."""
    torch.manual_seed(0)
    dit = DiTConfig(width=32, depth=2, heads=2, dropout=0.1)
    return LatentModel(LatentModelConfig(schedule="cosine", dit=dit), (4, 4, 4), 10)


def trained(folder: Path, device: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Parameters and averages after a training in this folder, gone on with where it has stopped."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(device == "cpu").lower())
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(config)
    assert accelerator.device.type == device
    model = untrained()
    latents = torch.randn(SIZE, 4, 4, 4, generator=torch.Generator().manual_seed(0)).to(accelerator.device)

    def fetch(items: Tensor) -> LatentBatch:
        items = items.to(accelerator.device)
        return LatentBatch(latents[items], items % 10)

    run = Run(folder, "latent_model", {"train": to_dict(config)}, quiet=True)
    folder.mkdir(exist_ok=True)
    result = fit(model, Items(fetch, SIZE), config, run, accelerator, resume=True)
    assert result.ema is not None
    averaged = {f"average of {name}": value.cpu() for name, value in result.ema.shadow.items()}
    return {**averaged, **{name: value.detach().cpu().clone() for name, value in model.state_dict().items()}}


@every_device
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(
    precision: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TRAIN, precision=precision)  # pyright: ignore[reportArgumentType]
    whole = trained(tmp_path / "whole", device, config, monkeypatch)
    trained(tmp_path / "parts", device, replace(config, max_steps=3), monkeypatch)
    parts = trained(tmp_path / "parts", device, config, monkeypatch)
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    name = "network.embed.weight"
    assert not torch.equal(whole[name], untrained().state_dict()[name]), "the training changes nothing"


@on_cuda
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", ["", ":0"])
def test_copies_to_a_gpu_are_from_pinned_memory(number: str, workers: int, device: str) -> None:
    """Also on the device of a single process, which has no number."""
    config = TrainConfig(steps=6, batch_size=4, workers=workers)
    place: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device(device + number))
    with Loader(Items(lambda wanted: wanted * 3, SIZE), config, place) as source:
        assert source._read(torch.arange(4)).is_pinned()
        found = torch.cat([source(step, 0, Context(0, step, torch.arange(4))) for step in range(6)])
    assert found.device.type == device
    assert torch.equal(found.cpu(), 3 * randomness.permutation(0, "order", 0, SIZE)[:24])


@every_device
def test_compiled_networks_learn_what_eager_ones_learn(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding; on a CPU the networks are only marked, for a C++ compiler takes minutes."""
    eager = trained(tmp_path / "eager", device, replace(TRAIN, steps=2), monkeypatch)
    with torch.compiler.set_stance("force_eager" if device == "cpu" else "default"):
        compiled = trained(tmp_path / "compiled", device, replace(TRAIN, steps=2, compile=True), monkeypatch)
    start = untrained().state_dict()
    moved, apart = (
        sum((eager[name] - other[name]).square().sum().item() for name in start) ** 0.5 for other in (start, compiled)
    )
    assert moved > 0
    assert apart < 0.02 * moved
