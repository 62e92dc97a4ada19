"""Contracts of all quantizers: exact inverses, dtypes, and statistics that do not depend on how a batch is divided."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import together
from quantizer_cases import CASES, CONTINUOUS, DISCRETE, LEARNING, SUMS, every_index, inputs, started
from tensors import grad, normal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from midway.tokenizers.base import Quantized, Quantizer
from midway.tokenizers.quantizers import QUANTIZERS, make_quantizer
from midway.tokenizers.tokenizer import ImageTokenizer
from midway.tokenizers.two_level import TwoLevel

pytestmark = pytest.mark.usefixtures("one_thread")

of_all = pytest.mark.parametrize("name", CASES)
of_discrete = pytest.mark.parametrize("name", DISCRETE)
of_learning = pytest.mark.parametrize("name", LEARNING)

STEPS, SKIPPED, BROKEN = 6, 2, 3  # the step that the loop skips, and that with a NaN in one sample


def test_every_registered_quantizer_has_a_case() -> None:
    assert {config["type"] for config in CASES.values()} == set(QUANTIZERS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "fsk", "levels": [8]}, "did you mean 'fsq'"),
        ({"levels": [8]}, "type is None"),
        ({"type": "fsq", "level": [8]}, "no option 'level'; did you mean 'levels'"),
        ({"type": "vq", "dim": 3}, "needs 'codebook_size'"),
        ({"type": "residual", "base": {"type": "vq", "codebok": 2}, "depth": 2}, "did you mean"),
        ({"type": "residual", "base": "vq", "depth": 2}, "give the config of a quantizer"),
        ({"type": "residual", "base": CASES["vq"], "depth": 1}, "depth is 1.*the base itself"),
        ({"type": "residual", "base": CASES["vq"], "depth": 2.5}, "depth is 2.5"),
        ({"type": "residual", "base": CASES["identity"], "depth": 2}, "'identity', which is continuous"),
        ({"type": "grouped", "base": CASES["fsq"], "groups": 1}, "groups is 1.*the base itself"),
        ({"type": "grouped", "base": CASES["kl"], "groups": 2}, "'kl', which is continuous"),
        ({"type": "two_level", "top": CASES["kl"], "bottom": CASES["vq"]}, "top is of type 'kl', which is continuous"),
        ({"type": "residual", "base": CASES["vq"], "depth": 2, "dropout": 1.5}, "dropout is 1.5"),
        ({"type": "residual", "base": {"type": "fsq", "levels": [9, 8]}, "depth": 6}, "531441 levels of one channel"),
        ({"type": "residual", "base": CASES["fsq, noise dropout"], "depth": 2}, "noise_dropout in the base"),
        ({"type": "residual", "base": CASES["vq, unit, rotation"], "depth": 2}, "neither normalise"),
        ({"type": "two_level", "top": CASES["vq"], "bottom": CASES["identity"]}, "bottom is of type 'identity', which"),
        (
            {"type": "two_level", "top": CASES["vq"], "bottom": {"type": "fsq", "levels": [3, 5]}},
            "codebook_size is 12 of top and 15 of bottom.*equal",
        ),
        ({"type": "two_level", "top": CASES["vq"], "bottom": CASES["grouped"]}, "groups is 1 of top and 2 of bottom"),
        ({"type": "two_level", "top": CASES["two_level"], "bottom": CASES["vq"]}, "no square grid"),
    ],
)
def test_invalid_configs_name_the_remedy(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_quantizer(config)


# Codes and indices ----------------------------------------------------------------------------------------------------


@of_discrete
def test_every_code_round_trips(name: str) -> None:
    quantizer = started(name)
    indices = every_index(quantizer)
    codes = quantizer.indices_to_codes(indices)
    assert codes.shape == (len(indices), quantizer.dim, 4, 4)
    assert codes.dtype == torch.float32
    if name != "residual, deep":  # of 2^24 tuples at random, more sums are near a sum than a search tries
        assert torch.equal(quantizer.codes_to_indices(codes), indices)
    assert name in SUMS or torch.equal(quantizer.snap(codes), codes)
    assert len(codes[:-7].flatten(1).unique(dim=0)) == quantizer.codebook_size


GRIDS: list[dict[str, Any]] = [
    {"type": "fsq", "levels": [8, 5, 6]},
    {"type": "fsq", "levels": [8, 5, 6], "symmetric": True},
    {"type": "fsq", "levels": [4, 3, 2], "form": "sigmoid"},
]


@pytest.mark.parametrize(
    "config",
    [
        *({"type": "residual", "base": grid, "depth": 2} for grid in GRIDS),
        {"type": "residual", "base": {"type": "fsq", "levels": [3, 4]}, "depth": 3},
        {"type": "grouped", "base": {**CASES["vq"], "codebook_size": 5}, "groups": 3},
        {"type": "grouped", "base": {"type": "fsq", "levels": [3, 4]}, "groups": 2},
        {"type": "two_level", "top": {"type": "fsq", "levels": [3]}, "bottom": {"type": "fsq", "levels": [3]}},
    ],
)
def test_indices_and_codes_are_a_bijection_over_all_tuples(config: dict[str, Any]) -> None:
    quantizer = make_quantizer(config)
    quantizer.start(normal(30, quantizer.in_dim, 4, 4))
    sequence = isinstance(quantizer, TwoLevel)  # of one code of the top and four of the bottom
    tuples = itertools.product(range(quantizer.codebook_size or 0), repeat=5 if sequence else quantizer.groups)
    indices = torch.tensor(list(tuples)).unsqueeze(1 if not sequence else -1).squeeze(-1)
    codes = quantizer.indices_to_codes(indices)
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    assert torch.equal(quantizer.snap(codes), codes)
    assert len(codes.flatten(1).unique(dim=0)) == len(indices)


@of_discrete
def test_invalid_indices_and_shapes_raise(name: str) -> None:
    quantizer = started(name)
    indices = every_index(quantizer)
    for bad in (indices + (quantizer.codebook_size or 0), indices - 1, indices.float()):
        with pytest.raises(ValueError, match="indices"):
            quantizer.indices_to_codes(bad)
    for call in (quantizer, quantizer.latents, quantizer.nearest, quantizer.encode, quantizer.codes_to_indices):
        with pytest.raises(ValueError, match=r"takes \(B, \d+, \*S\)"):
            call(torch.zeros(2, max(quantizer.dim, quantizer.in_dim) + 1, 4, 4))


@of_discrete
@pytest.mark.parametrize("autocast", [False, True])
def test_forward_is_bit_equal_to_the_decoded_indices(name: str, autocast: bool) -> None:
    quantizer = started(name)
    z, noise = inputs(quantizer, 4, 6)
    noise[:, -1] = 9  # of dropout: no stage is left out
    for training in (True, False):
        quantizer.train(training)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = quantizer(z.requires_grad_(), noise)
            assert torch.equal(out.codes, quantizer.indices_to_codes(out.indices))
            for codes, indices in (quantizer.encode(z), quantizer.nearest(quantizer.latents(z))):
                assert torch.equal(out.codes, codes)
                assert torch.equal(out.indices, indices)
            assert torch.equal(out.indices, quantizer.codes_to_indices(out.codes))
        assert not quantizer.snap(quantizer.latents(z)).requires_grad
        assert out.indices.dtype == torch.int64
        assert all(v.dtype == torch.float32 and v.shape == () for v in (out.loss, *out.losses.values()))
        assert out.counts is not None
        tokens = out.indices.reshape(-1, quantizer.groups).T
        for row, own in zip(out.counts.view(quantizer.groups, -1), tokens, strict=True):
            assert torch.equal(row, torch.bincount(own, minlength=quantizer.codebook_size or 0))


FINE: list[dict[str, Any]] = [
    {"type": "fsq", "levels": [1001, 17, 5, 5], "form": "ifsq", "noise_dropout": 0.5},
    *({"type": "fsq", "levels": [1000, 1001, 8, 5], "symmetric": s, "noise_dropout": 0.5} for s in (False, True)),
    {"type": "fsq", "levels": [1000, 1001, 8, 5], "form": "sigmoid", "noise_dropout": 0.5},
]
"""The centre of 1001 levels, 500 +- 1/2, is no bfloat16."""


@pytest.mark.parametrize("case", [*CASES, *FINE], ids=str)
def test_nothing_depends_on_the_callers_dtypes(case: str | dict[str, Any]) -> None:
    """The float32 island: bfloat16 makes neighbouring codes collide."""
    for default in (torch.float32, torch.bfloat16):
        plain = started(case)
        torch.set_default_dtype(default)
        try:
            quantizer = started(case)
            if isinstance(plain, TwoLevel):  # whose conditioning may be in any dtype
                plain.condition.to(torch.bfloat16)
                quantizer = copy.deepcopy(plain)
            for dtype in (torch.float64, torch.bfloat16, torch.float16):
                z, noise = (x.to(dtype) for x in inputs(plain))
                expected = plain(z.float(), noise.float())
                for autocast in (False, True):
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                        out = quantizer(z, noise)
                        decoded = out.codes if case in CONTINUOUS else quantizer.indices_to_codes(out.indices)
                    assert torch.equal(out.codes, expected.codes)
                    assert torch.equal(out.indices, expected.indices)
                    assert case in CONTINUOUS or torch.equal(decoded, plain.indices_to_codes(out.indices))
                    assert {decoded.dtype, out.codes.dtype, out.loss.dtype} == {torch.float32}
                    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-7)
                    quantizer.observe(out)
                    plain.observe(expected)
            quantizer.update()
            plain.update()
            assert_equal(quantizer.state_dict(), plain.state_dict())
        finally:
            torch.set_default_dtype(torch.float32)


@of_all
def test_a_sample_does_not_depend_on_its_batch_or_on_the_global_generator(name: str) -> None:
    quantizer = started(name)
    z, noise = inputs(quantizer)
    state = torch.get_rng_state()
    whole = quantizer(z, noise)
    parts = [quantizer(*(x[i : i + 1] for x in (z, noise))) for i in range(len(z))]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
    torch.testing.assert_close(torch.cat([part.codes for part in parts]), whole.codes, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("two_level")])
@pytest.mark.parametrize("spatial", [(), (5,), (1, 2, 3), (0,)])
def test_any_number_of_spatial_axes_and_of_samples(name: str, spatial: tuple[int, ...]) -> None:
    quantizer = started(name)
    for batch in (0, 3):
        noise = normal(batch, max(quantizer.noise_channels, 1), *spatial)
        out = quantizer(normal(batch, quantizer.in_dim, *spatial), noise)
        assert out.codes.shape == (batch, quantizer.dim, *spatial)
        groups = (quantizer.groups,) * (quantizer.groups > 1)
        assert out.indices.shape == ((batch, 0) if name in CONTINUOUS else (batch, *spatial, *groups))


@pytest.mark.parametrize("name", [name for name in CASES if "rotation" not in name and "mixed" not in name])
def test_the_gradient_of_codes_is_that_of_latents(name: str) -> None:
    quantizer = started(name).eval()
    z = inputs(quantizer)[0].requires_grad_()
    weight = normal(6, quantizer.dim, 4, 4, seed=3)
    (found,) = torch.autograd.grad((quantizer(z).codes * weight).sum(), z)
    (expected,) = torch.autograd.grad((quantizer.latents(z) * weight).sum(), z)
    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


# Statistics -----------------------------------------------------------------------------------------------------------


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def assert_close(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(state[name], expected[name], atol=3e-4, rtol=1e-4, msg=name)


def without_steps(quantizer: Quantizer) -> dict[str, Tensor]:
    """The state but for the counts of updates, which skipped steps raise too."""
    return {name: value.clone() for name, value in quantizer.state_dict().items() if not name.endswith("step")}


def step_of(quantizer: Quantizer, step: int, cuts: tuple[int, ...] = (24,), rank: int = 0, ranks: int = 1) -> None:
    """One step on 24 samples, of which this process has every `ranks`-th, in micro-batches of `cuts` samples."""
    z, noise = inputs(quantizer, 24, seed=step)
    z = 0.3 * z + (1 if step < BROKEN else -1)  # so that codes fall out of use
    if step == BROKEN:
        z[3, :, 2] = math.nan
    for mine, draws in zip(z[rank::ranks].split(cuts), noise[rank::ranks].split(cuts), strict=True):
        quantizer.observe(quantizer(mine, draws))
    quantizer.update(torch.tensor(step != SKIPPED))


def history(name: str, cuts: tuple[int, ...] = (24,), steps: int = STEPS, **share: int) -> dict[str, Tensor]:
    """The state after all steps."""
    quantizer = started(name)
    for step in range(steps):
        step_of(quantizer, step, cuts, **share)
    return quantizer.state_dict()


@of_learning
def test_micro_batches_and_one_update_equal_one_batch(name: str) -> None:
    whole = history(name)
    learned = [key for key, value in started(name).state_dict().items() if not torch.equal(value, whole[key])]
    assert any(key.endswith("codebook") for key in learned)
    for cuts in ((6, 6, 6, 6), (1, 23), (24, 0)):
        assert_close(history(name, cuts), whole)


@of_learning
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_change_nothing(name: str, reentrant: bool) -> None:
    calls: list[int] = []

    def objective(quantizer: Quantizer, z: Tensor, noise: Tensor) -> tuple[Tensor, Quantized]:
        calls.append(1)
        out = quantizer(z, noise)
        return out.codes.square().sum() + out.loss, out

    def run(through: Callable[..., Any]) -> tuple[dict[str, Tensor], Tensor]:
        quantizer = started(name)
        weight = torch.eye(quantizer.in_dim).requires_grad_()
        for step in range(3):
            for micro in range(2):
                z, noise = inputs(quantizer, seed=2 * step + micro)
                loss, out = through(objective, quantizer, torch.einsum("oc,bchw->bohw", weight, z), noise)
                quantizer.observe(out)
                loss.backward()
            quantizer.update()
        return quantizer.state_dict(), grad(weight)

    plain, gradient = run(lambda call, *arguments: call(*arguments))
    saved, also = run(lambda *arguments: checkpoint(*arguments, use_reentrant=reentrant))
    assert len(calls) == 6 + 2 * 6
    assert_equal(saved, plain)
    torch.testing.assert_close(also, gradient, atol=0, rtol=1e-4 if reentrant else 0)  # which adds in another order


@of_learning
def test_a_step_that_is_skipped_or_broken_leaves_everything_as_it_was(name: str) -> None:
    with_it, without_it = started(name), started(name)
    for quantizer in (with_it, without_it):
        step_of(quantizer, 0)
    for bad in (SKIPPED, BROKEN):
        before = without_steps(with_it)
        step_of(with_it, bad)
        assert_equal(without_steps(with_it), before)
    for quantizer in (with_it, without_it):
        step_of(quantizer, 4)
    assert_equal(without_steps(with_it), without_steps(without_it))


@of_all
def test_forward_learns_nothing(name: str) -> None:
    quantizer = started(name)
    before = copy.deepcopy(quantizer.state_dict())
    for training in (True, False):
        quantizer.train(training)(*inputs(quantizer))
        quantizer.update()
    quantizer.start(-inputs(quantizer)[0])  # the second time
    quantizer.observe(quantizer(*inputs(quantizer)))  # without an update
    assert_equal(quantizer.state_dict(), before)


@pytest.mark.parametrize("name", ["vq", "gradient", "residual"])
def test_a_codebook_that_was_not_started_raises(name: str) -> None:
    quantizer = make_quantizer(CASES[name])
    with pytest.raises(ValueError, match=r"call start\(z\)"):
        quantizer.observe(quantizer(*inputs(quantizer)))


@of_learning
def test_a_resumed_run_is_bit_equal(name: str) -> None:
    early, late = started(name), started(name)
    for step in range(3):
        step_of(early, step)
    step_of(late, 9)  # so that a stale copy of the step would show
    late.load_state_dict(copy.deepcopy(early.state_dict()))
    for step in range(3, STEPS):
        step_of(late, step)
    assert_equal(late.state_dict(), history(name))


def histories(rank: int, processes: int, folder: Path) -> None:
    early = started("vq")  # before the group exists
    dist.init_process_group("gloo")
    found = {name: history(name, (24 // processes,), rank=rank, ranks=processes) for name in LEARNING}
    for step in range(STEPS):
        step_of(early, step, (24 // processes,), rank, processes)
    alone = make_quantizer({**CASES["vq"], "seed": rank})
    alone.start(normal(30, 3, seed=rank))  # rank 0's vectors
    hopeless = make_quantizer({**CASES["vq"], "seed": rank})
    hopeless.start(torch.full((9, 3), torch.nan if rank == 0 else 1.0))
    uneven = started("vq")
    for step in range(3):
        z = normal(24, 3, seed=step)
        own = (slice(24) if step == 1 else slice(15), slice(24, 24) if step == 1 else slice(15, 24), slice(0))[rank]
        uneven.observe(uneven(z[own], normal(24, 1, seed=9 + step)[own]))
        uneven.update()
    others = {"early": early, "alone": alone, "hopeless": hopeless, "uneven": uneven}
    torch.save(found | {name: quantizer.state_dict() for name, quantizer in others.items()}, folder / f"{rank}.pt")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_agree_with_one(processes: int, tmp_path: Path) -> None:
    together(histories, processes, processes, tmp_path)
    first, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes))
    for states in others:
        for name in first:
            assert_equal(states[name], first[name])
    for name in LEARNING:
        assert_close(first[name], history(name))
    assert_equal(first["early"], first["vq"])
    single, uneven = make_quantizer(CASES["vq"]), started("vq")
    assert torch.equal(first["hopeless"]["codebook"], single.state_dict()["codebook"])  # nothing finite on rank 0
    single.start(normal(30, 3, seed=0))
    assert_equal(first["alone"], single.state_dict())
    for step in range(3):
        uneven.observe(uneven(normal(24, 3, seed=step), normal(24, 1, seed=9 + step)))
        uneven.update()
    assert_close(first["uneven"], uneven.state_dict())


# Devices, graphs, files -----------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Raises for whatever needs the values of a tensor on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"):
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@of_all
def test_training_never_waits_for_the_device(name: str) -> None:
    quantizer = started(name)
    z, noise = inputs(quantizer)
    out = quantizer(z.requires_grad_(), noise)
    with NoWaiting():
        for _ in range(2):
            out = quantizer(z, noise)
            quantizer.observe(out)
            (out.codes.sum() + out.loss).backward()
            quantizer.update(torch.ones((), dtype=torch.bool))
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            out.loss.item()
        with pytest.raises(RuntimeError, match="index"):
            z[z > 0].sum()


FLAT = ["fsq", "fsq, symmetric", "fsq, ifsq", "vq, unit, rotation", "gradient, entropy", "simvq", "lfq"]


@pytest.mark.parametrize("name", [*FLAT, "residual", "residual, fsq", "grouped", "two_level, parts"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_compiles_into_one_graph(name: str, training: bool) -> None:
    torch._dynamo.reset()
    eager = started(name).train(training)
    compiled = copy.deepcopy(eager)
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager" if training else "eager")
    results = []
    for quantizer, call in ((eager, eager), (compiled, graph)):
        z, noise = inputs(quantizer)
        out = call(z.requires_grad_(), noise)
        (out.codes.square().sum() + out.loss).backward()
        quantizer.observe(out)
        quantizer.update()
        results.append((out.codes.detach(), out.indices, out.loss.detach(), z.grad))
    torch.testing.assert_close(results[1], results[0])
    assert_close(compiled.state_dict(), eager.state_dict())


@of_all
def test_an_artefact_is_saved_and_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = ImageTokenizer(width=8, blocks=1, quantizer=CASES[name], latent_space="post")
    model.start(normal(64, 1, 8, 8))
    model.set_latent_statistics(torch.full((model.quantizer.dim,), 0.25), torch.full((model.quantizer.dim,), 2.0))
    model.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, ImageTokenizer)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}
    settings = {key: value for key, value in model.config.items() if not key.startswith("_")}
    assert settings.items() <= dict(loaded.config).items()
    assert_equal(loaded.state_dict(), model.state_dict())
    images = normal(6, 1, 8, 8, seed=1)
    assert torch.equal(loaded.eval()(images).reconstruction, model.eval()(images).reconstruction)
    assert torch.equal(loaded.encode_latents(images), model.encode_latents(images))
    if name in LEARNING:  # a loaded codebook goes on where it stopped
        for each in (model.train(), loaded.train()):
            each.observe(each(images, normal(6, *each.noise_shape)).quantized)
            each.update()
        assert_equal(loaded.state_dict(), model.state_dict())
    assert isinstance(model, nn.Module)
