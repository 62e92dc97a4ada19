"""The entropies of independent bits: against the table of all codes in float64, and on several processes against one."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from multiprocess import together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from midway.tokenizers import entropy as entropy_module
from midway.tokenizers.entropy import batch_entropy, sample_entropy
from midway.tokenizers.lfq import BSQ, LFQ


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def all_codes(bits: int) -> Tensor:
    """(2^d, d): row k has the signs of k, the lowest bit first."""
    rows = [[1.0 if k >> i & 1 else -1.0 for i in range(bits)] for k in range(2**bits)]
    return torch.tensor(rows, dtype=torch.float64)


def table(logits: Tensor) -> Tensor:
    """p(c | n) for all codes, (N, 2^d): the softmax of half the logits against the signs."""
    return (logits @ all_codes(logits.shape[1]).T / 2).softmax(1)


def naive(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(E[H(p | n)], H(E p)) from the table."""
    p = table(logits)
    return torch.special.entr(p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()


def both(logits: Tensor) -> tuple[Tensor, Tensor]:
    return sample_entropy(logits), batch_entropy(logits)


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value, of, retain_graph=True)[0]


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 11, 12])
def test_both_are_those_of_the_table_of_all_codes(bits: int) -> None:
    logits = (3 * normal(37, bits)).requires_grad_()
    for ours, reference in zip(both(logits), naive(logits), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient(ours, logits), gradient(reference, logits), rtol=0, atol=1e-10)


def test_nothing_to_average_is_zero_with_a_zero_gradient() -> None:
    logits = normal(0, 4).requires_grad_()
    for value in both(logits):
        assert value.item() == 0
        assert gradient(value, logits).abs().sum() == 0


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_bounds(scale: float) -> None:
    """0 <= E[H(p | z)] <= H(E p) <= d ln 2, the joint entropy at most that of groups."""
    logits = scale * normal(300, 10)
    sample, batch = both(logits)
    by_groups = [batch_entropy(logits, group) for group in (9, 5, 3, 2, 1)]
    ordered = [torch.zeros_like(sample), sample, batch, *by_groups[:2]]
    assert all(one < other for one, other in itertools.pairwise(ordered))
    assert by_groups[1] < by_groups[-1]
    assert max(by_groups) < 10 * math.log(2) + 1e-12


def test_extremes() -> None:
    """Undecided bits have d ln 2 both; sure ones that differ evenly 0 and d ln 2."""
    for value in both(torch.zeros(5, 7, dtype=torch.float64)):
        assert value.item() == pytest.approx(7 * math.log(2))
    sample, batch = both(1e4 * all_codes(7))
    assert sample.item() == 0
    assert batch.item() == pytest.approx(7 * math.log(2))
    assert batch_entropy(1e4 * all_codes(7)[:1]).item() == 0


@pytest.mark.parametrize("group", [1, 3, 4, 10])
def test_groups_add_up_the_entropies_of_their_bits(group: int) -> None:
    logits = (2 * normal(30, 10)).requires_grad_()
    reference = torch.stack([naive(part)[1] for part in logits.split(group, 1)]).sum()
    ours = batch_entropy(logits, group)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient(ours, logits), gradient(reference, logits), rtol=0, atol=1e-10)


def test_groups_that_are_independent_over_the_batch_lose_nothing() -> None:
    independent = torch.cat([all_codes(4).repeat_interleave(16, 0), all_codes(4).repeat(16, 1)], 1)
    torch.testing.assert_close(batch_entropy(independent, 4), batch_entropy(independent), rtol=0, atol=1e-12)
    same = all_codes(4).repeat(1, 2)
    assert batch_entropy(9 * same, 4) > batch_entropy(9 * same) + 2.5


@pytest.mark.parametrize("rows", [1, 7, 36])
def test_chunks_of_any_size_agree(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    logits = normal(37, 9).requires_grad_()
    whole = batch_entropy(logits)
    monkeypatch.setattr(entropy_module, "rows_per_chunk", lambda size: rows)
    chunked = batch_entropy(logits)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(chunked, logits), gradient(whole, logits), rtol=0, atol=1e-12)


def test_sample_entropy_of_any_number_of_bits() -> None:
    logits = normal(50, 200)
    p = torch.sigmoid(logits)
    expected = (torch.special.entr(p) + torch.special.entr(1 - p)).sum(1).mean()
    torch.testing.assert_close(sample_entropy(logits), expected, rtol=1e-12, atol=0)


def test_float32_gradients_of_sure_bits_are_as_precise_as_those_of_others() -> None:
    """sigmoid(-18) is 1.5e-8, less than the rounding of 1: as a difference of sums their gradient would be noise."""
    logits = 18 * normal(64, 8).sign() + normal(64, 8, seed=1)
    logits[::4] /= 18
    for function in (sample_entropy, batch_entropy):
        exact, rounded = logits.clone().requires_grad_(), logits.float().requires_grad_()
        reference = gradient(function(exact), exact)
        ours = gradient(function(rounded), rounded).double()
        torch.testing.assert_close(ours, reference, rtol=2e-3, atol=1e-14)


@pytest.mark.parametrize("scale", [1e2, 1e5, 1e30])
def test_huge_logits_stay_finite(scale: float) -> None:
    logits = (scale * normal(20, 6, dtype=torch.float32)).requires_grad_()
    for value in both(logits):
        assert value.isfinite()
        assert gradient(value, logits).isfinite().all()


def test_twenty_bits_at_once() -> None:
    """Sure bits that make four codes with shares 1/2, 1/4, 1/8, 1/8."""
    logits = 100 * normal(4, 20, dtype=torch.float32).sign()[[0, 0, 0, 0, 1, 1, 2, 3]]
    assert batch_entropy(logits).item() == pytest.approx(1.75 * math.log(2), rel=1e-5)


class Largest(TorchDispatchMode):
    """Remembers the most numbers in one tensor."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        out = func(*args, **(kwargs if isinstance(kwargs, dict) else {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            self.numbers = max(self.numbers, each.numel() if isinstance(each, Tensor) else 0)
        return out


def test_no_tensor_of_samples_by_codes_is_made() -> None:
    with Largest() as largest:
        logits = normal(512, 16, dtype=torch.float32).requires_grad_()
        batch_entropy(logits).backward()
    assert largest.numbers == 512 * 2**8  # one of the two half tables; 512 * 2**16 would be the whole


def test_unusable_arguments_raise() -> None:
    with pytest.raises(ValueError, match="set entropy_group"):
        batch_entropy(normal(2, 21))
    for group in (0, 21, 31):
        with pytest.raises(ValueError, match=f"entropy_group is {group}; give from 1 to 20 of the 30"):
            batch_entropy(normal(2, 30), group)
    assert batch_entropy(normal(2, 30), 20).isfinite()
    with pytest.raises(ValueError, match="float32 or float64"):
        sample_entropy(normal(2, 3).bfloat16())
    with pytest.raises(ValueError, match=r"\(N, d\)"):
        batch_entropy(normal(2, 3, 4))


# Several processes ----------------------------------------------------------------------------------------------------

SHARES = {2: [(0, 11), (11, 16)], 3: [(0, 9), (9, 9), (9, 16)]}  # unequal; with three, one process has no samples


class Model(nn.Module):
    """A linear encoder of 3 channels before a quantizer."""

    def __init__(self, quantizer: LFQ | BSQ) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(quantizer.dim, 3, dtype=torch.float32))
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.quantizer(torch.einsum("dc,bcs->bds", self.weight, x))
        return out.loss, out.losses


def models() -> list[Model]:
    """Entropies only, as the commitment is every process's own mean."""
    exact = LFQ(7, commitment=0, inverse_temperature=0.3)
    return [Model(exact), Model(BSQ(9, entropy_group=4, diversity_gamma=0.5, inverse_temperature=2))]


def results(model: Model, x: Tensor, through: nn.Module | None = None) -> dict[str, Tensor]:
    """The loss, its terms and the gradient of the weight."""
    model.weight.grad = None
    loss, losses = (through or model)(x)
    loss.backward()
    assert model.weight.grad is not None
    return {"loss": loss.detach(), "gradient": model.weight.grad} | {k: v.detach() for k, v in losses.items()}


def images() -> Tensor:
    return normal(16, 3, 2, dtype=torch.float32)


def run_rank(rank: int, processes: int, folder: str) -> None:
    before = models()
    alone = [results(model, images()) for model in before]  # nothing may be remembered of there being no group
    dist.init_process_group("gloo")
    share = images()[slice(*SHARES[processes][rank])]
    together = [results(model, share, DistributedDataParallel(model)) for model in (*before, *models())]
    # Evaluation is each process's own affair: here none but the first one evaluates.
    evaluated = [results(model.eval(), images()) for model in before] if rank == 0 else alone
    dist.destroy_process_group()
    again = [results(model.train(), images()) for model in before]
    torch.save({"together": together, "alone": [*alone, *evaluated, *again]}, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_give_the_entropies_and_gradients_of_one_on_all_samples(processes: int, tmp_path: Path) -> None:
    together(run_rank, processes, processes, str(tmp_path))
    expected = [results(model, images()) for model in models()]
    for rank in range(processes):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for case, runs in saved.items():
            assert len(runs) == len(expected) * (2 if case == "together" else 3)
            for run, reference in zip(runs, expected * 3, strict=False):
                assert run.keys() == {"loss", "gradient", "entropy_sample", "entropy_batch"}
                for name in run:
                    torch.testing.assert_close(run[name], reference[name], rtol=1e-5, atol=1e-6)
