"""Residual VQ and FSQ: exact inverses, the finer grids, gradients, dropout, and independence of how a batch is cut up."""

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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from midway.tokenizers.base import perplexity, usage
from midway.tokenizers.fsq import FSQ
from midway.tokenizers.residual import Residual

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS: list[dict[str, Any]] = [
    {"levels": [8, 5, 6]},
    {"levels": [8, 5, 6], "symmetric": True},
    {"levels": [4, 3, 2], "form": "sigmoid"},
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fsq(depth: int, dropout: float = 0.0, **options: Any) -> Residual:
    return Residual({"type": "fsq", **options}, depth, dropout)


def vq(depth: int = 3, size: int = 16, dim: int = 4, dropout: float = 0.0, **options: Any) -> Residual:
    """Residual VQ whose codebooks begin at Gaussian data."""
    quantizer = Residual({"type": "vq", "codebook_size": size, "dim": dim, **options}, depth, dropout)
    quantizer.start(normal(40 * size, dim, seed=77))
    return quantizer


def books(quantizer: Residual) -> list[Tensor]:
    """The codebook (K, D) of each stage of residual VQ, as its state has them."""
    state = quantizer.state_dict()
    return [state[f"stages.{i}.codebook"] for i in range(quantizer.groups)]


def every_tuple(size: int, depth: int) -> Tensor:
    """(1, size^depth, depth)."""
    return torch.tensor(list(itertools.product(range(size), repeat=depth))).unsqueeze(0)


# Inverses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "depth"), [({"levels": [3, 4]}, 3), *((grid, 2) for grid in GRIDS)])
def test_fsq_indices_and_codes_are_a_bijection_over_all_tuples(options: dict[str, Any], depth: int) -> None:
    quantizer = fsq(depth, **options)
    assert quantizer.codebook_size is not None
    indices = every_tuple(quantizer.codebook_size, depth)
    codes = quantizer.indices_to_codes(indices)
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    assert torch.equal(quantizer.snap(codes), codes)
    assert len(codes[0].T.unique(dim=0)) == indices.shape[1]


@pytest.mark.parametrize(("size", "depth"), [(5, 3), (12, 2), (3, 5)])
def test_vq_indices_are_found_for_every_tuple_of_codes(size: int, depth: int) -> None:
    """The codebooks as they were drawn are equally long in all stages: the nearest codes are mostly wrong."""
    quantizer = Residual({"type": "vq", "codebook_size": size, "dim": 3}, depth)
    indices = every_tuple(size, depth)
    codes = quantizer.indices_to_codes(indices)
    nearest = torch.cdist(codes[0].T.double(), books(quantizer)[0].double()).argmin(1)
    assert (nearest != indices[0, :, 0]).double().mean() > 0.2
    assert torch.equal(quantizer.codes_to_indices(codes), indices)


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        ({"levels": [8, 8, 5]}, 6),
        ({"levels": [512, 511]}, 2),
        ({"levels": [2, 2], "symmetric": True}, 18),
        ({"levels": [64, 63], "form": "sigmoid"}, 3),
    ],
)
def test_the_finest_grids_are_exact(options: dict[str, Any], depth: int) -> None:
    quantizer = fsq(depth, **options)
    size = math.prod(options["levels"])
    ends = torch.tensor([[0] * depth, [size - 1] * depth])
    drawn = torch.randint(0, size, (20000, depth), generator=torch.Generator().manual_seed(0))
    indices = torch.cat([ends, drawn]).unsqueeze(0)
    codes = quantizer.indices_to_codes(indices)
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    assert torch.equal(quantizer.snap(codes), codes)


def test_a_large_codebook_is_inverted_for_tuples_of_any_kind() -> None:
    quantizer = Residual({"type": "vq", "codebook_size": 4096, "dim": 6}, 2)
    indices = torch.randint(0, 4096, (1, 50, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.codes_to_indices(quantizer.indices_to_codes(indices)), indices)


def test_what_forward_says_is_found_again_where_no_search_can_be_complete() -> None:
    quantizer = vq(4, 128, 4).eval()
    out = quantizer(normal(3000, 4))
    assert 128**3 > 4096
    assert torch.equal(quantizer.codes_to_indices(out.codes), out.indices)


def test_a_sum_of_no_codes_gets_the_indices_of_a_near_one() -> None:
    quantizer = vq(3).eval()
    out = quantizer(normal(200, 4))
    moved = out.codes + 1e-5
    found = quantizer.indices_to_codes(quantizer.codes_to_indices(moved))
    torch.testing.assert_close(found, out.codes, atol=1e-4, rtol=0)


def test_indices_of_the_first_stages_are_their_partial_sum() -> None:
    for quantizer, z in ((vq(), normal(5, 4, 3)), (fsq(3, levels=[5, 4]), normal(5, 2, 3))):
        indices = quantizer(z).indices
        total = torch.zeros(())
        for i in range(3):
            before = total
            total = quantizer.indices_to_codes(indices[..., : i + 1])
            assert not torch.equal(total, before)
        assert torch.equal(total, quantizer.indices_to_codes(indices))
        for wrong in (indices[..., :0], torch.cat([indices, indices], -1), torch.zeros(3, dtype=torch.int64)):
            with pytest.raises(ValueError, match=r"\(B, \*S, k\) with k from 1 to 3"):
                quantizer.indices_to_codes(wrong)


# Forward --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [vq, lambda: fsq(3, levels=[8, 5, 7, 4])])
def test_forward_value_is_bit_equal_to_the_decoded_indices(
    make: Callable[[], Residual], autocast: bool, training: bool
) -> None:
    quantizer = make().train(training)
    z = normal(4, 4, 6, 6).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = quantizer(z)
        assert torch.equal(out.codes, quantizer.indices_to_codes(out.indices))
        assert torch.equal(out.codes, quantizer.snap(quantizer.latents(z)))
        assert torch.equal(quantizer.codes_to_indices(out.codes), out.indices)
    assert out.codes.dtype == out.loss.dtype == torch.float32
    assert out.indices.shape == (4, 6, 6, 3)
    assert not quantizer.snap(quantizer.latents(z)).requires_grad


def test_each_stage_takes_the_code_nearest_to_what_is_left() -> None:
    quantizer = vq(3, 32).eval()
    z = normal(300, 4)
    out = quantizer(z)
    left = z.double()
    for book, indices in zip(books(quantizer), out.indices.unbind(-1), strict=True):
        distances = (left[:, None] - book.double()).square().sum(2)
        assert (distances.argmin(1) != indices).double().mean() < 0.01
        left = left - book.double()[indices]
    torch.testing.assert_close(z.double() - out.codes.double(), left, atol=1e-5, rtol=0)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("options", GRIDS)
def test_fsq_stages_are_one_uniform_quantizer(options: dict[str, Any], depth: int) -> None:
    """In units of a step each cell of the first grid is cut into L^(n-1) equal ones, with codes in their middles."""
    quantizer, one = fsq(depth, **options), FSQ(**options)
    z = 1.5 * normal(3, 3, 1000)
    latents, codes = one.latents(z).double(), quantizer(z).codes.double()
    for channel, level in enumerate(options["levels"]):
        line = one.indices_to_codes(torch.arange(one.codebook_size or 0).unsqueeze(0))[0, channel].unique().double()
        step = (line[-1] - line[0]) / (level - 1)
        fine, lowest = step / level ** (depth - 1), line[0] - step / 2
        inside = (latents[:, channel] > lowest) & (latents[:, channel] < line[-1] + step / 2)
        expected = lowest + fine * (((latents[:, channel] - lowest) / fine).floor() + 0.5)
        wrong = ((codes[:, channel] - expected).abs() > 1e-6) & inside
        assert inside.double().mean() > 0.95
        assert wrong.double().mean() < 1e-3  # a latent on the border of two cells


@pytest.mark.parametrize("options", GRIDS)
def test_another_fsq_stage_divides_the_error_by_the_number_of_levels(options: dict[str, Any]) -> None:
    """The same grid again, without a scale, would divide it by 1: every later stage would say zero."""
    z = normal(64, 3, 32, 32)
    latents = FSQ(**options).latents(z)
    error = (FSQ(**options)(z).codes - latents).double().square().mean((0, 2, 3)).sqrt()
    for depth in (2, 3):
        finer = (fsq(depth, **options)(z).codes - latents).double().square().mean((0, 2, 3)).sqrt()
        promised = torch.tensor(options["levels"]).double() ** (depth - 1)
        assert bool((error / finer > 0.97 * promised).all())
        indices = fsq(depth, **options)(z).indices
        assert len(indices[..., -1].unique()) == math.prod(options["levels"])


def test_error_falls_with_depth_on_gaussian_data() -> None:
    z = normal(4000, 4, seed=3)
    quantizer = vq(4, 16).eval()
    indices = quantizer(z).indices
    errors = [(quantizer.indices_to_codes(indices[..., :k]) - z).square().mean().item() for k in range(1, 5)]
    assert errors[0] < 0.45  # of 1 without codes; the bound for 4 bits in 4 channels is 2^-2
    assert all(later < 0.5 * sooner for sooner, later in itertools.pairwise(errors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_indices_depend_on_the_value_only(dtype: torch.dtype, default: torch.dtype, autocast: bool) -> None:
    z = normal(2, 4, 8, 8).to(dtype)
    quantizers = vq().eval(), fsq(3, levels=[8, 5, 6, 7]).eval()
    expected = [quantizer(z.float()).indices for quantizer in quantizers]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        others = quantizers[0], fsq(3, levels=[8, 5, 6, 7]).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for quantizer, indices in zip(others, expected, strict=True):
                out = quantizer(z)
                assert torch.equal(out.indices, indices)
                assert torch.equal(quantizer.codes_to_indices(out.codes), indices)
    finally:
        torch.set_default_dtype(before)


def test_counts_are_one_histogram_a_stage() -> None:
    for quantizer in (vq(), fsq(3, levels=[4, 2, 2, 2], form="sigmoid")):
        out = quantizer(normal(3, 4, 5, 5))
        assert out.counts is not None
        assert out.counts.shape == (3, quantizer.codebook_size)
        for row, indices in zip(out.counts, out.indices.unbind(-1), strict=True):
            assert torch.equal(row, torch.bincount(indices.flatten(), minlength=len(row)))
        assert 0 < usage(out.counts) <= 1
        assert perplexity(out.counts) > 1
        assert quantizer.bits_per_token == 3 * math.log2(quantizer.codebook_size or 0)
    assert fsq(2, levels=[128, 128, 128])(normal(1, 3, 2)).counts is None


# Gradients ------------------------------------------------------------------------------------------------------------


def test_gradient_is_straight_through_once_plus_the_commitment_of_every_stage() -> None:
    quantizer = vq(3, commitment=0.5)
    z, weight = normal(6, 4, 5).requires_grad_(), normal(6, 4, 5, seed=1)
    out = quantizer(z)
    ((out.codes * weight).sum() + out.loss).backward()
    left, commitment, expected = z.detach().double(), 0.0, weight.double()
    for book, indices in zip(books(quantizer), out.indices.unbind(-1), strict=True):
        left = left - book.double()[indices].movedim(-1, 1)
        commitment += left.square().mean().item()
        expected = expected + 2 * 0.5 * left / z.numel()
    assert z.grad is not None
    torch.testing.assert_close(z.grad.double(), expected, atol=1e-6, rtol=1e-5)
    assert out.losses["commitment"].item() == pytest.approx(commitment, rel=1e-5)
    assert out.loss.item() == pytest.approx(0.5 * commitment, rel=1e-5)


@pytest.mark.parametrize("options", GRIDS)
def test_fsq_gradient_is_that_of_the_bound(options: dict[str, Any]) -> None:
    z, weight = normal(2, 3, 50).requires_grad_(), normal(2, 3, 50, seed=1)
    (fsq(3, **options)(z).codes * weight).sum().backward()
    (expected,) = torch.autograd.grad((FSQ(**options).latents(z) * weight).sum(), z)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, expected, atol=0, rtol=0)


def test_a_base_with_the_rotation_trick_rotates_from_the_latent_to_the_sum() -> None:
    quantizer = vq(2, dim=3, gradient="rotation")
    z, weight = normal(20, 3).requires_grad_(), normal(20, 3, seed=1)
    out = quantizer(z)
    (out.codes * weight).sum().backward()
    assert z.grad is not None
    assert torch.equal(out.codes, quantizer.indices_to_codes(out.indices))
    for e, q, g, found in zip(z.detach().double(), out.codes.detach().double(), weight.double(), z.grad, strict=True):
        u, v = e / e.norm(), q / q.norm()
        w = (u + v) / (u + v).norm()
        turn = torch.eye(3, dtype=torch.float64) - 2 * torch.outer(w, w) + 2 * torch.outer(v, u)
        torch.testing.assert_close(turn @ u, v)
        torch.testing.assert_close(found.double(), q.norm() / e.norm() * turn.T @ g, atol=1e-4, rtol=1e-4)


# Dropout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [1.0, 0.4])
def test_depths_are_uniform_among_the_samples_that_are_cut(dropout: float) -> None:
    count, depth = 40000, 5
    quantizer = fsq(depth, dropout, levels=[5, 5])
    depths = quantizer.depths(normal(count, 1, 2), torch.zeros(count, 2, 2)).flatten()
    found = torch.bincount(depths, minlength=depth + 1).double() / count
    expected = torch.tensor([0.0] + [dropout / depth] * depth, dtype=torch.float64)
    expected[-1] += 1 - dropout
    assert found[0] == 0
    assert bool(((found - expected).abs() < 5 * (expected / count).sqrt() + 1e-12).all())


@pytest.mark.parametrize("make", [lambda p: vq(dropout=p), lambda p: fsq(3, p, levels=[8, 5, 7, 4])])
def test_dropout_takes_codes_out_of_the_sum_and_nothing_else(make: Callable[[float], Residual]) -> None:
    dropping, plain = make(1.0), make(0.0)
    assert dropping.noise_channels == plain.noise_channels + 1
    z, noise = normal(30, 4, 3), normal(30, dropping.noise_channels, 3, seed=1)
    out, again, whole = dropping(z, noise), dropping(z, noise), plain(z, noise[:, : plain.noise_channels])
    depths = dropping.depths(noise, z).flatten().tolist()
    assert set(depths) == {1, 2, 3}
    for sample, depth in enumerate(depths):
        indices = out.indices[sample : sample + 1, ..., :depth]
        assert torch.equal(out.codes[sample : sample + 1], dropping.indices_to_codes(indices))
    assert torch.equal(out.codes, again.codes)
    assert torch.equal(out.indices, whole.indices)
    assert torch.equal(out.loss, whole.loss)
    assert torch.equal(dropping.eval()(z, noise).codes, whole.codes)
    for missing in (None, noise[:, :-1], noise[:5]):
        with pytest.raises(ValueError, match="dropout in training takes noise"):
            dropping.train()(z, missing)


def test_a_stage_that_is_dropped_sends_no_gradient_and_still_learns() -> None:
    dropping, plain = vq(dropout=1.0), vq()
    z, noise = normal(30, 4, 3).requires_grad_(), normal(30, 2, 3, seed=1)
    out = dropping(z, noise)
    (gradient,) = torch.autograd.grad(out.loss, z)
    depths = dropping.depths(noise, z)
    left, expected = z.detach(), torch.zeros_like(z)
    for i, (book, indices) in enumerate(zip(books(dropping), out.indices.unbind(-1), strict=True)):
        left = left - book[indices].movedim(-1, 1)
        expected += torch.where(depths > i, 2 * 0.25 * left / z.numel(), 0)
    torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-4)
    plain(z, noise[:, :1])
    for quantizer in (dropping, plain):
        quantizer.update()
    for mine, other in zip(books(dropping), books(plain), strict=True):
        assert torch.equal(mine, other)


def test_the_depth_of_a_sample_does_not_depend_on_its_batch() -> None:
    quantizer = vq(dropout=0.7)
    z, noise = normal(16, 4, 3, 2), normal(16, 2, 3, 2, seed=1)
    whole = quantizer(z, noise).codes
    parts = [quantizer(z[i : i + 1], noise[i : i + 1]).codes for i in range(16)]
    assert torch.equal(torch.cat(parts), whole)


# Statistics -----------------------------------------------------------------------------------------------------------


def assert_same_state(one: Residual, other: Residual, tolerance: float = 0.0) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, atol=tolerance, rtol=tolerance, msg=name)


def step_of(quantizer: Residual, step: int, cuts: int = 1, step_ok: bool = True, rank: int = 0, ranks: int = 1) -> None:
    """One optimizer step on 64 samples, of which this process has every `ranks`-th, in `cuts` micro-batches."""
    z, noise = normal(64, 4, 3, seed=10 + step), normal(64, 2, 3, seed=100 + step)
    for mine, draws in zip(z[rank::ranks].chunk(cuts), noise[rank::ranks].chunk(cuts), strict=True):
        quantizer(mine.requires_grad_(), draws)
    quantizer.update(torch.tensor(step_ok))


def learner() -> Residual:
    """Forgets fast, so codes restart; a sample may use few stages."""
    return vq(3, 32, decay=0.5, dropout=0.5)


@pytest.mark.parametrize("cuts", [2, 4])
def test_micro_batches_equal_one_batch(cuts: int) -> None:
    whole, parts = learner(), learner()
    start = copy.deepcopy(books(whole))
    for step in range(4):
        step_of(whole, step)
        step_of(parts, step, cuts)
    assert_same_state(whole, parts, 1e-5)
    assert all((book - first).abs().max() > 0.1 for book, first in zip(books(whole), start, strict=True))


def test_a_step_that_is_skipped_is_forgotten_by_all_stages() -> None:
    quantizer = learner()
    before = copy.deepcopy(books(quantizer))
    step_of(quantizer, 0, step_ok=False)
    assert all(torch.equal(book, old) for book, old in zip(books(quantizer), before, strict=True))


def test_evaluation_changes_nothing() -> None:
    quantizer = learner().eval()
    before = copy.deepcopy(quantizer.state_dict())
    step_of(quantizer, 0)
    quantizer.codes_to_indices(quantizer.snap(normal(8, 4)))
    quantizer.start(normal(50, 4))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_neither_codebooks_nor_gradient(reentrant: bool) -> None:
    calls: list[int] = []

    def objective(quantizer: Residual, z: Tensor, noise: Tensor) -> Tensor:
        calls.append(1)
        out = quantizer(z, noise)
        return out.codes.square().sum() + out.loss

    def run(checkpointed: bool) -> tuple[Residual, Tensor]:
        quantizer, weight = learner(), normal(4, 4).requires_grad_()
        for step in range(3):
            z, noise = normal(64, 4, seed=step) @ weight, normal(64, 2, seed=9 + step)
            if checkpointed:
                loss = checkpoint(objective, quantizer, z, noise, use_reentrant=reentrant)
                assert isinstance(loss, Tensor)
            else:
                loss = objective(quantizer, z, noise)
            loss.backward()
            quantizer.update()
        assert weight.grad is not None
        return quantizer, weight.grad

    (plain, gradient), (saved, also) = run(False), run(True)
    assert len(calls) == 3 + 2 * 3
    assert_same_state(plain, saved)
    assert torch.equal(gradient, also)


def test_start_gives_each_stage_what_is_left_and_does_so_once() -> None:
    quantizer = Residual({"type": "vq", "codebook_size": 8, "dim": 4}, 2)
    z = normal(8, 4).repeat(20, 1)
    quantizer.start(z)
    first, second = (book.square().sum(1).sqrt() for book in books(quantizer))
    assert torch.cdist(books(quantizer)[0], normal(8, 4)).amin(0).max() < 1e-5
    assert first.min() > 0.5
    assert second.max() < 1e-5
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.start(-z)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_codebooks_are_drawn_apart() -> None:
    quantizer = Residual({"type": "vq", "codebook_size": 8, "dim": 4, "seed": 5}, 3)
    for one, other in itertools.combinations(books(quantizer), 2):
        assert not torch.equal(one, other)
    single = Residual({"type": "vq", "codebook_size": 8, "dim": 4, "seed": 5}, 2)
    assert torch.equal(books(single)[0], books(quantizer)[0])


def test_a_resumed_run_is_bit_equal() -> None:
    straight, early, late = learner(), learner(), learner()
    for step in range(4):
        step_of(straight, step)
    for step in range(2):
        step_of(early, step)
    late.load_state_dict(early.state_dict())
    for step in range(2, 4):
        step_of(late, step)
    assert_same_state(straight, late)
    assert not fsq(2, levels=[5, 5]).state_dict()


class NoWaiting(TorchDispatchMode):
    """Refuses whatever needs the values of a tensor on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"):
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_forward_and_update_never_wait_for_the_device() -> None:
    quantizers = learner(), fsq(3, 0.5, levels=[8, 5, 6, 7])
    step_of(quantizers[0], 0)
    with NoWaiting():
        for quantizer in quantizers:
            noise = normal(8, quantizer.noise_channels, 3)
            quantizer(torch.ones(8, 4, 3, requires_grad=True), noise)
            quantizer.update(torch.ones((), dtype=torch.bool))
        values = normal(3)
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            values.sum().item()
        with pytest.raises(RuntimeError, match="index"):
            values[values > 0].sum()


# Compilation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [lambda: vq(dropout=0.5), lambda: fsq(3, 0.5, levels=[8, 5, 7, 4])])
def test_forward_is_one_graph(make: Callable[[], Residual], training: bool) -> None:
    quantizer, compiled = make().train(training), make().train(training)
    z, noise = normal(6, 4, 3), normal(6, quantizer.noise_channels, 3, seed=1)
    expected = quantizer(z.requires_grad_(), noise)
    torch._dynamo.reset()
    found = torch.compile(compiled, backend="eager", fullgraph=True)(z, noise)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.codes, expected.codes)
    for each in (quantizer, compiled):
        each.update()
    assert_same_state(quantizer, compiled)


# Settings -------------------------------------------------------------------------------------------------------------

VQ = {"type": "vq", "codebook_size": 8, "dim": 2}


@pytest.mark.parametrize(
    ("base", "depth", "dropout", "message"),
    [
        (VQ, 1, 0.0, "depth is 1.*the base itself"),
        (VQ, 2.5, 0.0, "depth is 2.5"),
        (VQ, 2, 1.5, "dropout is 1.5"),
        ({"type": "kl", "dim": 2}, 2, 0.0, "'kl', which is continuous"),
        ({"type": "identity", "dim": 2}, 2, 0.0, "'identity', which is continuous"),
        ({"type": "fsq", "levels": [9, 8]}, 6, 0.0, "531441 levels of one channel"),
        ({"type": "fsq", "levels": [9, 8], "noise_dropout": 0.5}, 2, 0.0, "noise_dropout in the base"),
        ({**VQ, "normalize": True}, 2, 0.0, "neither normalise"),
        ({**VQ, "codebok": 2}, 2, 0.0, "did you mean"),
        ("vq", 2, 0.0, "give the config of a quantizer"),
    ],
)
def test_unusable_settings_are_refused(base: Any, depth: Any, dropout: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Residual(base, depth, dropout)


def test_foreign_shapes_are_refused() -> None:
    quantizer = vq()
    for call in (quantizer, quantizer.snap, quantizer.codes_to_indices, quantizer.start):
        with pytest.raises(ValueError, match=r"\(B, 4, \*S\)"):
            call(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"0\.\.15"):
        quantizer.indices_to_codes(torch.full((1, 2, 3), 16))
    assert quantizer(torch.zeros(0, 4, 3)).codes.shape == (0, 4, 3)


# Several processes ----------------------------------------------------------------------------------------------------


def run_rank(rank: int, folder: str) -> None:
    quantizer = learner()
    dist.init_process_group("gloo")
    fresh = Residual({"type": "vq", "codebook_size": 8, "dim": 4}, 2)
    fresh.start(normal(50, 4))
    for step in range(4):
        step_of(quantizer, step, cuts=2, rank=rank, ranks=2)
    torch.save([quantizer.state_dict(), fresh.state_dict()], f"{folder}/rank{rank}.pt")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    together(run_rank, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    single = learner()
    for step in range(4):
        step_of(single, step)
    for name, value in single.state_dict().items():
        torch.testing.assert_close(first[0][name], value, atol=1e-5, rtol=1e-5, msg=name)
