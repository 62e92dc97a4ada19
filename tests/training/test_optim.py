"""The rate that optimizers really use, Muon's share of a model, steps that are skipped, compiled and checkpointed networks."""

import copy
import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate.state import AcceleratorState
from multiprocess import together
from regression import SIZE, Regression, assert_same_bits, records, samples, saved
from small_models import images, latent_model, latents, tokenizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from midway.gen.core.errors import UsageError
from midway.gen.core.runs import Run
from midway.gen.distillation.amed import DistillConfig, SolverObjective, SolverTarget
from midway.gen.features.classifier import FeatureConfig, FeatureNetwork
from midway.gen.networks.dit import Block
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.config import Decay, TrainConfig, learning_rate
from midway.gen.training.fit import fit
from midway.gen.training.interface import FitResult, Items
from midway.gen.training.optim import make_optimizers, step_if, step_where
from midway.tokenizers.networks import ResidualBlock

pytestmark = pytest.mark.usefixtures("on_the_cpu")

CONFIG = TrainConfig(steps=6, batch_size=8, lr=1e-2, warmup=2, clip=0.5, ema=0.5, log_every=1)
CPU = torch.device("cpu")
FSQ = {"type": "fsq", "levels": [5, 5]}
DECAYS: tuple[Decay, ...] = ("constant", "cosine", "inverse_sqrt")
RATES = replace(CONFIG, steps=9, warmup=3, plateau=4, lr=2.0, log_every=50)


def feature_network() -> FeatureNetwork:
    torch.manual_seed(0)
    return FeatureNetwork(FeatureConfig(in_channels=1, image_size=8, classes=4, width=8, dim=4))


def solver(constants: bool = False) -> SolverObjective:
    return SolverObjective(latent_model(), SolverTarget(4, "uniform", 1.0, constants), DistillConfig(teacher_steps=4))


def train(
    folder: Path, model: nn.Module, fetch: Callable[[Tensor], Any], config: TrainConfig = CONFIG, resume: bool = False
) -> FitResult:
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision differs between runs
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, "test")
    return fit(model, Items(fetch, SIZE), config, run, make_accelerator(config), None, resume)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder)]


# ---- the learning rate ----


def test_the_inverse_square_root_begins_at_its_plateau() -> None:
    """lr up to the plateau, where it leaves continuously; half of it after four plateaus, a quarter after sixteen."""
    config = TrainConfig(lr=3.0, warmup=10, decay="inverse_sqrt", plateau=100)
    assert learning_rate(config, 4) == pytest.approx(1.5)
    assert [learning_rate(config, s) for s in (9, 10, 50, 99, 100)] == [3.0] * 5
    assert learning_rate(config, 101) == pytest.approx(3.0 * math.sqrt(100 / 101), rel=1e-12)
    assert learning_rate(config, 400) == pytest.approx(1.5, rel=1e-12)
    assert learning_rate(config, 1600) == pytest.approx(0.75, rel=1e-12)
    assert learning_rate(replace(config, steps=7), 400) == pytest.approx(1.5), "it does not know how long the run is"


def test_a_warm_up_longer_than_the_plateau_comes_first() -> None:
    config = TrainConfig(lr=2.0, warmup=200, decay="inverse_sqrt", plateau=50)
    assert learning_rate(config, 199) == 2.0
    assert learning_rate(config, 200) == pytest.approx(1.0)


def record_rates(
    folder: Path, model: nn.Module, fetch: Callable[[Tensor], Any], config: TrainConfig
) -> list[set[float]]:
    """The rates in all parameter groups, per call of any optimizer's step."""
    rates: list[set[float]] = []

    def note(optimizer: Optimizer, *_: object) -> None:
        rates.append({group["lr"] for group in optimizer.param_groups})

    handle = register_optimizer_step_pre_hook(note)
    train(folder, model, fetch, config)
    handle.remove()
    return rates


def expected_rates(decay: Decay) -> list[set[float]]:
    """lr 2, three steps of warm-up; cosine to 0 at step 9; plateau 4."""
    after = {
        "constant": [2.0] * 6,
        "cosine": [1 + math.cos(math.pi * k / 6) for k in range(6)],
        "inverse_sqrt": [2.0, 2.0, *(2 * math.sqrt(4 / s) for s in range(5, 9))],
    }
    return [{rate} for rate in (2 / 3, 4 / 3, 2.0, *after[decay])]


def assert_rates(found: list[set[float]], decay: Decay) -> None:
    assert found == [{learning_rate(replace(RATES, decay=decay), s)} for s in range(RATES.steps)]
    for rates, expected in zip(found, expected_rates(decay), strict=True):
        assert rates.pop() == pytest.approx(expected.pop(), abs=1e-12)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("decay", DECAYS)
def test_each_optimizer_step_uses_the_rate_of_its_number(tmp_path: Path, decay: Decay, accumulation: int) -> None:
    """One step of the optimizer and of the schedule per global batch, however many micro-batches it is cut into."""
    config = replace(RATES, decay=decay, accumulation=accumulation)
    assert_rates(record_rates(tmp_path, Regression(), samples, config), decay)


def test_both_optimizers_use_the_same_rate(tmp_path: Path) -> None:
    rates = record_rates(tmp_path, latent_model(), latents, replace(RATES, optimizer="muon", steps=3, lr=1e-3))
    assert rates == [{learning_rate(replace(RATES, lr=1e-3), s)} for s in (0, 0, 1, 1, 2, 2)]


def one_of_two(rank: int, folder: Path) -> None:
    """Record the rates of every decay and accumulation in this process."""
    rates = {
        f"{decay} {accumulation}": record_rates(
            folder / f"{decay}{accumulation}",
            Regression(),
            samples,
            replace(RATES, decay=decay, accumulation=accumulation),
        )
        for decay, accumulation in itertools.product(DECAYS, (1, 2, 4))
    }
    plain = {name: [list(step) for step in steps] for name, steps in rates.items()}
    (folder / f"{rank}.json").write_text(json.dumps(plain))


def test_two_processes_step_as_often_and_at_the_same_rates_as_one(tmp_path: Path) -> None:
    """Accelerate's own scheduler would be stepped once per process."""
    together(one_of_two, 2, tmp_path)
    for rank, decay, accumulation in itertools.product((0, 1), DECAYS, (1, 2, 4)):
        rates = json.loads((tmp_path / f"{rank}.json").read_text())[f"{decay} {accumulation}"]
        assert_rates([set(step) for step in rates], decay)


# ---- Muon ----


def test_every_parameter_is_in_exactly_one_optimizer() -> None:
    """Muon has the matrices of attention and MLP; embeddings, time, modulation, head, norms and biases are AdamW's."""
    model = latent_model()
    model.network.get_submodule("blocks.1").requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    adamw, muon = make_optimizers(model, replace(CONFIG, optimizer="muon"), CPU)
    owned = [[names[p] for group in o.param_groups for p in group["params"]] for o in (adamw, muon)]
    assert Counter(itertools.chain(*owned)) == Counter(n for p, n in names.items() if p.requires_grad)
    inner = ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
    assert set(owned[1]) == {f"network.blocks.0.{name}.weight" for name in inner}
    left = {
        f"network.{name}.weight" for name in ("embed", "time.0", "label", "modulation", "blocks.0.modulation", "head")
    }
    assert left <= set(owned[0])
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, torch.optim.Muon)


@pytest.mark.parametrize("make", [latent_model, feature_network, lambda: tokenizer(FSQ)])
def test_adamw_alone_has_every_parameter_once(make: Callable[[], nn.Module]) -> None:
    model = make()
    (adamw,) = make_optimizers(model, CONFIG, CPU)
    assert [p for group in adamw.param_groups for p in group["params"]] == list(model.parameters())
    assert adamw.defaults["fused"]


@pytest.mark.parametrize("make", [feature_network, solver, lambda: tokenizer(FSQ)])
def test_muon_without_hidden_matrices_raises(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    with pytest.raises(UsageError, match="no hidden matrices") as caught:
        train(tmp_path, make(), images, replace(CONFIG, optimizer="muon"))
    assert caught.value.exit_code == 2


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def test_muons_updates_are_a_fifth_of_the_rate_whatever_the_shape() -> None:
    """An orthogonal (A, B) matrix has root mean square 1 / sqrt(max(A, B)), and is scaled by 0.2 sqrt(max(A, B)); AdamW's
    first update is the rate itself. (torch's five Newton-Schulz steps leave singular values between 0.7 and 1.2.)"""
    model = latent_model()
    before = copy.deepcopy(dict(model.named_parameters()))
    adamw, muon = make_optimizers(model, replace(CONFIG, optimizer="muon", lr=0.01), CPU)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    shapes = {tuple(p.shape) for group in muon.param_groups for p in group["params"]}
    assert shapes == {(48, 16), (16, 16), (64, 16), (16, 64)}
    adamw.step()
    muon.step()
    for name, parameter in model.named_parameters():
        change = rms(parameter.detach() - before[name].detach())
        if parameter in muon.state:
            assert change == pytest.approx(0.2 * 0.01, rel=0.2), name
        else:
            assert change == pytest.approx(0.01, rel=1e-3), name


def test_both_optimizers_share_one_format_of_checkpoints(tmp_path: Path) -> None:
    """`<parameter>/<state>` for every parameter; a run that was stopped goes on bit for bit."""
    config = replace(CONFIG, optimizer="muon", weight_decay=0.1)
    train(tmp_path / "whole", latent_model(), latents, config)
    states: dict[str, set[str]] = {}
    for key in saved(tmp_path / "whole"):
        file, _, rest = key.partition("/")
        if file == "optimizer":
            name, _, state = rest.rpartition("/")
            states.setdefault(name, set()).add(state)
    adam, muon = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
    assert states == {
        name: muon if p.dim() == 2 and "blocks" in name and "modulation" not in name else adam
        for name, p in latent_model().named_parameters()
    }
    train(tmp_path / "parts", latent_model(), latents, replace(config, max_steps=3))
    train(tmp_path / "parts", latent_model(), latents, replace(config, keep=1), resume=True)
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")


# ---- steps that are skipped ----


def gradients(model: nn.Module, seed: int, spoil: float = 0.0) -> None:
    """Random gradients; `spoil` is added to one number of each."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad.view(-1)[0] += spoil


def everything(model: nn.Module, optimizers: list[Optimizer]) -> list[Tensor]:
    """Copies of all parameters and of all that the optimizers know."""
    moments = [v for o in optimizers for p in model.parameters() for v in o.state.get(p, {}).values()]
    return [value.detach().clone() for value in (*model.parameters(), *moments)]


def where_fused(step_ok: Tensor, optimizers: list[Optimizer]) -> None:
    """As off the CPU, where a fused optimizer decides by itself."""
    for optimizer in optimizers:
        step_where(step_ok, optimizer) if optimizer.defaults.get("fused") else step_if(step_ok, [optimizer])


WAYS = pytest.mark.parametrize("step", [step_if, where_fused])


@WAYS
@pytest.mark.parametrize("spoil", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("steps", [1, 0])
def test_a_skipped_step_changes_no_bit(steps: int, spoil: float, step: Callable[..., None]) -> None:
    """Neither AdamW's nor Muon's, whatever the gradient was; the next step is that of a model that never had it. Also when it
    is the first step: the bias correction of AdamW counts kept steps only."""
    config = replace(CONFIG, optimizer="muon", weight_decay=0.1)
    models = [latent_model(), latent_model()]
    both = [make_optimizers(model, config, CPU) for model in models]

    def step_of_both(seed: int) -> None:
        for model, optimizers in zip(models, both, strict=True):
            gradients(model, seed)
            step(torch.tensor(True), optimizers)

    for seed in range(steps):
        step_of_both(seed)
    before = everything(models[0], both[0])
    gradients(models[0], 2, spoil)
    step(torch.tensor(False), both[0])
    skipped = everything(models[0], both[0])
    assert all(map(torch.equal, before, skipped)) and (len(skipped) == len(before) or not steps)
    step_of_both(3)
    now, expected = (everything(model, optimizers) for model, optimizers in zip(models, both, strict=True))
    assert len(now) == len(expected) > 3 * len(list(models[0].parameters())) - 20
    assert all(map(torch.equal, now, expected))
    assert not any(map(torch.equal, before[:5], now[:5]))


# ---- compiling, checkpointing, bfloat16 ----


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer", "latent"])
def test_a_compiled_network_trains_the_same_model_under_the_same_names(tmp_path: Path, name: str) -> None:
    def make() -> tuple[nn.Module, Callable[[Tensor], Any]]:
        return (latent_model(), latents) if name == "latent" else (tokenizer(FSQ), images)

    config = replace(CONFIG, steps=3, lr=1e-3)
    train(tmp_path / "eager", *make(), config)
    torch._dynamo.utils.counters.clear()
    train(tmp_path / "compiled", *make(), replace(config, compile=True))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs in ((1,) if name == "latent" else (2, 3)), (
        "one per network, and one to start from data; none per step"
    )
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    compiled = saved(tmp_path / "compiled")
    assert saved(tmp_path / "eager").keys() == compiled.keys() and not any("_orig_mod" in key for key in compiled)


def test_nothing_to_compile_raises(tmp_path: Path) -> None:
    """A solver objective trains a few numbers; the networks in it are frozen and no part of it."""
    for model in (solver(), solver(constants=True)):
        with pytest.raises(UsageError, match="--compile has nothing to do") as caught:
            train(tmp_path, model, latents, replace(CONFIG, compile=True))
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("make", [feature_network, solver])
def test_nothing_to_recompute_raises(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    with pytest.raises(UsageError, match="--gradient-checkpointing has nothing to do") as caught:
        train(tmp_path, make(), images, replace(CONFIG, gradient_checkpointing=True))
    assert caught.value.exit_code == 2


CHECKPOINTED: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Any], type[nn.Module]]] = {
    "vq": (tokenizer, images, ResidualBlock),
    "latent": (lambda: latent_model(dropout=0.3), latents, Block),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_computing_activations_again_changes_no_bit(tmp_path: Path, name: str, accumulation: int) -> None:
    """Codebook statistics count once and dropout masks come back, although blocks run twice per step, which is counted."""
    make, fetch, block = CHECKPOINTED[name]
    config = replace(CONFIG, accumulation=accumulation)
    runs: Counter[bool] = Counter()
    blocks = 0
    for again in (False, True):
        model = make()
        parts = [m for m in model.modules() if isinstance(m, block)]
        inner = [m.branch if isinstance(m, ResidualBlock) else cast(Block, m).attention for m in parts]
        for module in inner:
            module.register_forward_pre_hook(lambda *_, again=again: runs.update([again]))
        train(tmp_path / str(again), model, fetch, replace(config, gradient_checkpointing=again))
        blocks = len(inner)
    assert runs[True] - runs[False] == blocks * config.steps * accumulation > 0
    assert_same_bits(tmp_path / "True", tmp_path / "False")


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_bfloat16_acts_in_the_networks_and_nowhere_else(tmp_path: Path, name: str) -> None:
    """Layers compute in bfloat16; parameters, moments, averages and codebook stay float32, and the losses nearly so."""
    make, fetch, block = CHECKPOINTED[name]
    model, seen = make(), set()
    layers = (nn.Conv2d, nn.Linear)
    for module in itertools.chain(*(m.modules() for m in model.modules() if isinstance(m, block))):
        if isinstance(module, layers):
            module.register_forward_hook(lambda _, __, out: seen.add(out.dtype) if torch.is_grad_enabled() else None)
    train(tmp_path / "bf16", model, fetch, replace(CONFIG, precision="bf16"))
    assert seen == {torch.bfloat16}
    for key, value in saved(tmp_path / "bf16").items():
        assert not value.is_floating_point() or value.dtype == torch.float32 or key.startswith("progress"), key
    train(tmp_path / "float", make(), fetch, CONFIG)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "float"), rel=0.05)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "float")
