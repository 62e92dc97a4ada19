"""Training that runs out of memory ends with three lines that name the --accumulation that fits."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from small_models import images, latent_config, latents, tokenizer
from torch import Tensor, nn

from midway.gen.core.errors import MidwayError
from midway.gen.core.runs import Run
from midway.gen.diffusion.model import LatentModel
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.presets import MODERN
from midway.gen.training.accelerator import explaining_memory, loss_need, make_accelerator, memory_error
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.gen.training.interface import Items
from midway.gen.training.loading import batches_like
from midway.gen.training.optim import state_bytes
from midway.tokenizers.memory import Need, peak_bytes

CPU, GB = torch.device("cpu"), 2**30
OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
FAILURES = [
    OUT,
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    MemoryError(),
]


# ---- what a micro-batch needs ----


def test_a_need_is_linear_in_the_samples() -> None:
    need = Need(base=100, each=7)
    assert [need.of(n) for n in (0, 1, 10)] == [100, 107, 170]
    assert [need.fits(memory) for memory in (99, 106, 107, 170, 176, 177)] == [0, 0, 1, 10, 10, 11]
    assert all(need.fits(need.of(n)) == n for n in range(50))


DIT = DiTConfig(width=64, depth=3, heads=4)
NETWORKS = {
    "latents": replace(latent_config(), dit=DIT),
    "modern latents": replace(latent_config(), dit=replace(DIT, **MODERN)),
    "latents by tokens": replace(latent_config(), dit=replace(DIT, conditioning="tokens", mixer="linear", norm="dyt")),
    "U-Net": replace(latent_config(), network="unet", dit=DiTConfig()),
}


@pytest.mark.parametrize("kind", [*NETWORKS, "images"])
def test_the_need_is_that_of_real_steps(kind: str) -> None:
    """Counted without numbers, for micro-batches of 16 and 40 samples: real bytes to within 0.1 %, of a U-Net to within 2 %."""
    of_latents = kind in NETWORKS
    model = LatentModel(NETWORKS[kind], (3, 4, 4), 4) if of_latents else tokenizer({"type": "kl", "dim": 4})
    items = Items(latents if of_latents else images, 20)
    need = loss_need(model, batches_like(items, CPU))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for count in (16, 40):
        batch, context = items.read(torch.arange(count) % 20), Context(0, 0, torch.arange(count))
        real = peak_bytes(lambda batch=batch, context=context: model.loss(batch, context)[0].backward())
        assert need.of(count) == pytest.approx(real, rel=0.02 if kind == "U-Net" else 0.001)


def test_autocast_is_counted_as_the_cpu_does_it() -> None:
    config = replace(latent_config(), dit=DiTConfig(width=64, depth=3, heads=4))
    model, items = LatentModel(config, (3, 4, 4), 4), Items(latents, 20)
    need = loss_need(model, batches_like(items, CPU), half=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch, context = items.read(torch.arange(40) % 20), Context(0, 0, torch.arange(40))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model.loss(batch, context)
        loss.backward()

    assert need.of(40) == pytest.approx(peak_bytes(step), rel=0.02)


def test_half_precision_takes_less_and_recomputed_blocks_much_less() -> None:
    config = replace(latent_config(), dit=DiTConfig(width=64, depth=4, heads=4))
    model, items = LatentModel(config, (3, 4, 4), 4), Items(latents, 20)
    whole = loss_need(model, batches_like(items, CPU)).each
    assert 0.5 * whole < loss_need(model, batches_like(items, CPU), half=True).each < 0.8 * whole
    for block in model.network.get_submodule("blocks").children():
        block.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]
    assert loss_need(model, batches_like(items, CPU)).each < 0.5 * whole


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "lfq"])
def test_every_kind_of_quantizer_can_be_counted(quantizer: str) -> None:
    options = {
        "vq": {"codebook_size": 8, "dim": 4},
        "fsq": {"levels": [8, 5, 5, 5]},
        "lfq": {"bits": 4},
    }
    model = tokenizer({"type": quantizer, **options[quantizer]})
    assert loss_need(model, batches_like(Items(images, 20), CPU)).each > 8 * 8 * 4


def test_what_training_keeps_is_weights_gradients_moments_and_averages() -> None:
    layer = nn.Linear(10, 5)  # 55 parameters
    plain = TrainConfig(ema=0)
    assert state_bytes(layer, plain) == 55 * 4 * 4
    assert state_bytes(layer, replace(plain, ema=0.9, posthoc=(0.05, 0.1))) == 55 * 4 * 7
    model = LatentModel(latent_config(), (3, 4, 4), 4)
    total, matrices = (sum(p.numel() for p in some) for some in (model.parameters(), hidden(model)))
    positions = model.network.get_buffer("positions").nbytes
    assert state_bytes(model, replace(plain, optimizer="muon")) == 4 * (4 * total - matrices) + positions


def hidden(model: LatentModel) -> list[Tensor]:
    named = model.network.get_submodule("blocks").named_parameters()
    return [p for name, p in named if p.dim() == 2 and "modulation" not in name]


# ---- the error ----


@pytest.mark.parametrize(
    ("batch", "processes", "accumulation", "fits", "expected"),
    [
        (128, 1, 1, 40, (4, 32)),
        (128, 1, 1, 64, (2, 64)),
        (128, 2, 2, 5, (16, 4)),
        (96, 1, 1, 40, (3, 32)),
        (128, 1, 4, 1000, (8, 16)),  # those of 32 did not fit, whatever was counted
        (7, 1, 1, 3, (7, 1)),
        (8, 1, 1, 0, (8, 1)),
    ],
)
def test_the_smallest_accumulation_whose_micro_batch_fits_is_named(
    batch: int, processes: int, accumulation: int, fits: int, expected: tuple[int, int]
) -> None:
    config = TrainConfig(batch_size=batch, accumulation=accumulation)
    error = memory_error(config, processes, fits, 3 * GB, 16 * GB, "CUDA out of memory")
    assert f"--accumulation {expected[0]}, micro-batches of {expected[1]}," in error.fix
    assert "3 GiB of 16 GiB" in error.why and "CUDA out of memory" in error.why
    TrainConfig(batch_size=batch, accumulation=expected[0])
    assert batch == processes * expected[0] * expected[1]


def test_where_one_sample_does_not_fit_other_ways_are_named() -> None:
    error = memory_error(TrainConfig(batch_size=8, accumulation=8), 1, 0, 3 * GB, 16 * GB, "")
    assert "--accumulation" not in error.fix
    assert "--gradient-checkpointing" in error.fix and "docs/scaling.md" in error.fix
    assert "a micro-batch of 1 sample a process" in error.what


class Failing(LatentModel):
    """A latent model that has no memory for more than 2 samples at a time."""

    def __init__(self, error: Exception) -> None:
        super().__init__(latent_config(), (3, 4, 4), 4)
        self.error = error

    def loss(self, batch: LatentBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        if len(batch.labels) > 2 and not batch.labels.is_meta:
            raise self.error
        return super().loss(batch, context)


def attempt(tmp_path: Path, error: Exception, accumulation: int = 1) -> None:
    config = TrainConfig(steps=1, batch_size=8, ema=0, accumulation=accumulation)
    accelerator = make_accelerator(config)
    fit(Failing(error), Items(latents, 20), config, Run(tmp_path / str(accumulation), "test"), accelerator)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("failure", FAILURES, ids=lambda e: type(e).__name__)
def test_a_training_names_the_accumulation_that_it_then_succeeds_with(failure: Exception, tmp_path: Path) -> None:
    with pytest.raises(MidwayError) as caught:
        attempt(tmp_path, failure)
    lines = str(caught.value).splitlines()
    assert [line[:7] for line in lines[1:]] == ["  why: ", "  fix: "]
    assert "--accumulation 2, micro-batches of 4" in lines[2]  # a lot of memory here: half of what failed
    with pytest.raises(MidwayError, match="--accumulation 4, micro-batches of 2"):
        attempt(tmp_path, failure, 2)
    attempt(tmp_path, failure, 4)


@pytest.mark.usefixtures("on_the_cpu")
def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        attempt(tmp_path, RuntimeError("shapes do not fit"))


@pytest.mark.usefixtures("on_the_cpu")
def test_a_model_that_cannot_be_counted_is_halved() -> None:
    def nothing() -> None:
        raise ValueError("no batch")

    config = TrainConfig(batch_size=8)
    with (
        pytest.raises(MidwayError, match="--accumulation 2,"),
        explaining_memory(config, Accelerator(cpu=True), nn.Linear(1, 1), nothing),  # pyright: ignore[reportArgumentType]
    ):
        raise OUT


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux does")
def test_a_real_shortage_of_memory_is_explained(tmp_path: Path) -> None:
    """A command whose address space is limited to what it has when training begins, and 200 MB."""
    import subprocess

    root = Path(__file__).parents[2]
    code = (
        "import resource, sys; sys.argv = ['train_tokenizer.py', *sys.argv[1:]]\n"
        "from midway.gen.trainings import train_tokenizer as script\n"
        "import midway.gen.training.fit as fit\n"
        "start = fit.Training._step\n"
        "def step(self, *args):\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)\n"
        "    return start(self, *args)\n"
        "fit.Training._step = step\n"
        "from midway.gen.flags.cli import main\n"
        "main(script.command)\n"
    )
    flags = f"digits-fsq --out {tmp_path}/run --model.width 64 --model.downsample 1 --train.batch-size 1024"
    flags = flags.replace("--train.", "--")
    done = subprocess.run(
        [sys.executable, "-c", code, *flags.split()], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    error = done.stderr[done.stderr.index("error: ") :].strip().splitlines()
    assert len(error) == 3 and "memory ran out in a micro-batch of 1024" in error[0]
    assert "--accumulation" in error[2] and "Traceback" not in done.stderr
