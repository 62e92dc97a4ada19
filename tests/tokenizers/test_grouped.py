"""Product quantization: each group is its base on its own channels; exact inverses, one update for all."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from midway.tokenizers.base import perplexity
from midway.tokenizers.fsq import FSQ
from midway.tokenizers.grouped import Grouped

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vq(groups: int = 2, size: int = 16, dim: int = 3, **options: Any) -> Grouped:
    """Grouped VQ whose codebooks begin at Gaussian data."""
    quantizer = Grouped({"type": "vq", "codebook_size": size, "dim": dim, **options}, groups)
    quantizer.start(normal(20 * size, groups * dim, seed=77))
    return quantizer


def fsq(groups: int = 2, levels: tuple[int, ...] = (5, 4, 3)) -> Grouped:
    return Grouped({"type": "fsq", "levels": levels}, groups)


def of_residuals() -> Grouped:
    """Two groups of three stages each."""
    vq = {"type": "vq", "codebook_size": 8, "dim": 3, "decay": 0.5}
    quantizer = Grouped({"type": "residual", "base": vq, "depth": 3, "dropout": 0.5}, 2)
    quantizer.start(normal(400, 6, seed=77))
    return quantizer


MAKERS: list[Callable[[], Grouped]] = [vq, fsq, of_residuals]


@pytest.mark.parametrize(("make", "groups"), [(lambda: vq(3, 5), 3), (lambda: fsq(2, (3, 4)), 2)])
def test_indices_and_codes_are_a_bijection_over_all_tuples(make: Callable[[], Grouped], groups: int) -> None:
    quantizer = make()
    assert quantizer.codebook_size is not None
    indices = torch.tensor(list(itertools.product(range(quantizer.codebook_size), repeat=groups))).unsqueeze(0)
    codes = quantizer.indices_to_codes(indices)
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    assert torch.equal(quantizer.snap(codes), codes)
    assert len(codes[0].T.unique(dim=0)) == indices.shape[1]


@pytest.mark.parametrize(
    "base", [{"type": "vq", "codebook_size": 1000, "dim": 3}, {"type": "fsq", "levels": [64] * 10}]
)
def test_large_codebooks_are_inverted(base: dict[str, Any]) -> None:
    quantizer = Grouped(base, 4)
    size = quantizer.codebook_size or 0
    indices = torch.randint(0, size, (2, 500, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.codes_to_indices(quantizer.indices_to_codes(indices)), indices)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", MAKERS)
def test_forward_value_is_bit_equal_to_the_decoded_indices(
    make: Callable[[], Grouped], autocast: bool, training: bool
) -> None:
    quantizer = make().train(training)
    z, noise = normal(4, 6, 5, 5).requires_grad_(), normal(4, 2, 5, 5)
    noise[:, 1] = 9  # never drops a stage
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = quantizer(z, noise)
        assert torch.equal(out.codes, quantizer.indices_to_codes(out.indices))
        assert torch.equal(out.codes, quantizer.snap(quantizer.latents(z)))
        assert torch.equal(quantizer.codes_to_indices(out.codes), out.indices)
    assert out.codes.dtype == out.loss.dtype == torch.float32
    assert out.indices.shape == (4, 5, 5, quantizer.groups)
    assert quantizer.bits_per_token == quantizer.groups * math.log2(quantizer.codebook_size or 0)
    assert out.counts is not None
    for row, indices in zip(out.counts, out.indices.unbind(-1), strict=True):
        assert torch.equal(row, torch.bincount(indices.flatten(), minlength=len(row)))
    assert perplexity(out.counts) > 1


def test_the_nearest_of_all_tuples_is_found() -> None:
    quantizer = vq(2, 6).eval()
    tuples = torch.tensor(list(itertools.product(range(6), repeat=2))).unsqueeze(0)
    codes = quantizer.indices_to_codes(tuples)[0].T.double()
    z = normal(200, 6)
    nearest = torch.cdist(z.double(), codes).argmin(1)
    assert torch.equal(quantizer(z).indices, tuples[0, nearest])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", MAKERS)
def test_indices_depend_on_the_value_only(make: Callable[[], Grouped], dtype: torch.dtype, autocast: bool) -> None:
    quantizer, z = make().eval(), normal(2, 6, 8, 8).to(dtype)
    expected, before = quantizer(z.float()).indices, torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert torch.equal(quantizer(z).indices, expected)
    finally:
        torch.set_default_dtype(before)


def test_gradient_is_straight_through_plus_the_commitment_over_all_channels() -> None:
    quantizer = vq(3)
    z, weight = normal(6, 9, 5).requires_grad_(), normal(6, 9, 5, seed=1)
    out = quantizer(z)
    ((out.codes * weight).sum() + out.loss).backward()
    error = z.detach().double() - out.codes.detach().double()
    assert z.grad is not None
    torch.testing.assert_close(z.grad.double(), weight + 2 * 0.25 * error / z.numel(), atol=1e-6, rtol=1e-5)
    assert out.losses["commitment"].item() == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(0.25 * error.square().mean().item(), rel=1e-5)


def test_fsq_gradient_is_that_of_the_bound() -> None:
    z, weight = normal(2, 6, 9).requires_grad_(), normal(2, 6, 9, seed=1)
    (fsq()(z).codes * weight).sum().backward()
    (expected,) = torch.autograd.grad((FSQ([5, 4, 3] * 2).latents(z) * weight).sum(), z)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, expected, atol=0, rtol=0)


def step_of(quantizer: Grouped, step: int, cuts: int = 1, step_ok: bool = True) -> None:
    z, noise = normal(64, 6, 3, seed=10 + step), normal(64, 2, 3, seed=100 + step)
    for mine, draws in zip(z.chunk(cuts), noise.chunk(cuts), strict=True):
        quantizer(mine.requires_grad_(), draws)
    quantizer.update(torch.tensor(step_ok))


@pytest.mark.parametrize("make", [lambda: vq(2, 32, decay=0.5), of_residuals])
def test_micro_batches_equal_one_batch_and_skipped_steps_none(make: Callable[[], Grouped]) -> None:
    whole, parts = make(), make()
    start = copy.deepcopy(whole.state_dict())
    for step in range(3):
        step_of(whole, step)
        step_of(parts, step, cuts=4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, atol=1e-5, rtol=1e-5, msg=name)
        assert not torch.equal(value, start[name])
    before = copy.deepcopy(whole.state_dict())
    step_of(whole, 3, step_ok=False)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, before[name]) or name.endswith("step")


def test_activation_checkpointing_changes_neither_codebooks_nor_gradient() -> None:
    def objective(quantizer: Grouped, z: Tensor) -> Tensor:
        out = quantizer(z, normal(64, 1, seed=5))
        return out.codes.square().sum() + out.loss

    def run(checkpointed: bool) -> tuple[dict[str, Tensor], Tensor]:
        quantizer, weight = vq(2, 32, decay=0.5), normal(6, 6).requires_grad_()
        for step in range(2):
            z = normal(64, 6, seed=step) @ weight
            loss = checkpoint(objective, quantizer, z, use_reentrant=False) if checkpointed else objective(quantizer, z)
            assert isinstance(loss, Tensor)
            loss.backward()
            quantizer.update()
        assert weight.grad is not None
        return quantizer.state_dict(), weight.grad

    (plain, gradient), (saved, also) = run(False), run(True)
    assert all(torch.equal(saved[name], plain[name]) for name in plain)
    assert torch.equal(gradient, also)


def test_state_travels_and_codebooks_are_drawn_apart() -> None:
    source, target = of_residuals(), of_residuals()
    step_of(source, 0)
    target.load_state_dict(source.state_dict())
    z = normal(5, 6, 2)
    assert torch.equal(target.eval()(z).codes, source.eval()(z).codes)
    drawn = Grouped({"type": "vq", "codebook_size": 4, "dim": 2}, 2).state_dict()
    assert not torch.equal(drawn["parts.0.codebook"], drawn["parts.1.codebook"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [vq, fsq])
def test_forward_is_one_graph(make: Callable[[], Grouped], training: bool) -> None:
    quantizer = make().train(training)
    z, noise = normal(6, 6, 3), normal(6, 1, 3, seed=1)
    torch._dynamo.reset()
    found = torch.compile(quantizer, backend="eager", fullgraph=True)(z, noise)
    assert torch.equal(found.indices, quantizer(z, noise).indices)


def test_kl_is_refused_and_so_are_one_group_and_foreign_shapes() -> None:
    with pytest.raises(ValueError, match="'kl', which is continuous"):
        Grouped({"type": "kl", "dim": 2}, 2)
    with pytest.raises(ValueError, match=r"groups is 1.*the base itself"):
        Grouped({"type": "fsq", "levels": [5]}, 1)
    quantizer = vq(2)
    for call in (quantizer, quantizer.snap, quantizer.latents, quantizer.codes_to_indices, quantizer.start):
        with pytest.raises(ValueError, match=r"\(B, 6, \*S\)"):
            call(torch.zeros(2, 7, 5))
    for indices in (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"\(B, \*S, 2\)"):
            quantizer.indices_to_codes(indices)
    with pytest.raises(ValueError, match=r"0\.\.15"):
        quantizer.indices_to_codes(torch.full((1, 2, 2), 16))
