"""The entropies of codes whose d bits are independent given z, exactly, without the N 2^d probabilities.

With logits l (N, d) the bits of sample n are Bernoulli(sigmoid(l_ni)), so for code c = (b_1, ..., b_d), in nats,

    p(c | n) = prod_i sigmoid(+-l_ni)          H(p | n) = sum_i h(l_ni),   h(l) = softplus(-|l|) + |l| sigmoid(-|l|)
    E p = B^T A / N                            A = (p(low half of the bits | n)),  B = (p(high half | n)),  each N x 2^(d/2)

and "entropy_sample" = E[H(p | n)], "entropy_batch" = H(E p). The tables are made a chunk of samples at a time (4 MiB of float32
each), forward and again in backward, so that autograd keeps nothing but l. If g (2^d) is the gradient of the sum of
probabilities,

    d / d l_ni = p_ni (1 - p_ni) (E[g | n, b_i = 1] - E[g | n, b_i = 0])

in this form because a difference of sums would lose the gradients of saturated bits to rounding. Products of probabilities need
no logarithm: values that underflow to 0 do not contribute to the mean.

By groups of bits H(E p) becomes the sum of the groups' entropies, an upper bound, and exact if the groups are independent over
the batch (the approximation of BSQ: Zhao et al. 2024, arXiv 2406.07548).

Over processes (`shared`): sums and counts of samples are added up, so every sample counts alike however the batch is divided.
The value is the same on every process; the gradient flows through each process's own samples, times the number of processes, so
that DistributedDataParallel's mean is the gradient of the whole. Every process must call it equally often.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from midway.tokenizers.base import distributed, float32_island, straight_through
from midway.tokenizers.clustering import full_precision, rows_per_chunk

MAX_BITS = 20  # bits in one group: beyond, E p itself is large, and the tables 2^(d/2) a sample


def sample_entropy(logits: Tensor, shared: bool = False) -> Tensor:
    """E[H(p | z)] in nats, (), in [0, d ln 2]: logits (N, d) float32 or float64, any d; 0 if there are no samples.

    `shared`: the mean over all processes.
    """
    _check(logits)
    size = logits.abs()
    entropy = F.softplus(-size) + size * torch.sigmoid(-size)
    # a factor for its gradient's layout, on which the rounding of torch's kernels depends
    ones = logits.new_ones(len(logits))
    return mean_over_samples((entropy.sum(1) * ones).sum().view(1), len(logits), shared).sum()


def batch_entropy(logits: Tensor, group: int | None = None, shared: bool = False) -> Tensor:
    """H(E p) in nats, (), in [0, d ln 2], or the sum over groups of `group` bits each, the last one of what is left.

    `logits` and `shared` as in `sample_entropy`. ValueError if a group has more than 20 bits.
    """
    _check(logits)
    group = check_group(logits.shape[1], group)
    sums = [_ProbabilitySum.apply(part) for part in logits.split(group, 1)]
    return entropy_of(mean_over_samples(torch.cat(sums), len(logits), shared))


def entropy_of(probabilities: Tensor) -> Tensor:
    """-sum p ln p in nats, (); where p is exactly 0, the gradient is finite."""
    return -(probabilities * probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()).sum()


def mean_over_samples(sums: Tensor, count: int, shared: bool) -> Tensor:
    """Sums (M,) over `count` samples divided by that number, (M,); `shared`: both over all processes.

    The gradient reaches this process's own sums, times the number of processes, as DistributedDataParallel averages it. Without
    samples the mean is 0.
    """
    packed = torch.cat([sums, sums.new_full((1,), count)])
    if shared and distributed():
        everywhere = packed.detach().clone()
        dist.all_reduce(everywhere)
        packed = straight_through(everywhere, packed * dist.get_world_size())
    return packed[:-1] / packed[-1].detach().clamp(min=1)


def check_group(bits: int, group: int | None) -> int:
    """Bits in a group: `group`, or all `bits` if None. ValueError unless it is from 1 to 20, and at most `bits`."""
    if group is None and bits > MAX_BITS:
        raise ValueError(
            f"the exact batch entropy of {bits} bits has 2**{bits} terms, and 2**{MAX_BITS} are the limit: "
            "set entropy_group, 9 for instance, to add up the entropies of groups of bits"
        )
    if group is not None and not (isinstance(group, int) and 1 <= group <= min(bits, MAX_BITS)):
        raise ValueError(f"entropy_group is {group!r}; give from 1 to {min(bits, MAX_BITS)} of the {bits} bits")
    return bits if group is None else group


def _check(logits: Tensor) -> None:
    if logits.ndim != 2 or not logits.shape[1] or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype}; give (N, d) float32 or float64, d >= 1")


class _ProbabilitySum(torch.autograd.Function):
    """sum_n p(c | n) for all codes c, index sum_i b_i 2^i: logits (N, d) -> (2^d,)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        half = logits.shape[1] // 2
        total = logits.new_zeros(2 ** (logits.shape[1] - half), 2**half)
        with float32_island(logits), full_precision():
            for low, high in _chunks(logits):
                total = torch.addmm(total, _prefixes(high)[-1].T, _prefixes(low)[-1])
        return total.flatten()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        by_sum = gradients[0].view(-1, 2 ** (logits.shape[1] // 2))
        by_logits = []
        with float32_island(logits), full_precision():
            for low, high in _chunks(logits):
                lows, highs = _prefixes(low), _prefixes(high)
                by_low = _by_logits(low, lows, highs[-1] @ by_sum)
                by_high = _by_logits(high, highs, lows[-1] @ by_sum.T)
                by_logits.append(torch.cat([by_low, by_high], 1))
        return torch.cat(by_logits)


def _chunks(logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of samples: the logits of the low and of the high half of the bits."""
    half = logits.shape[1] // 2
    step = rows_per_chunk(2 ** (logits.shape[1] - half))
    for chunk in logits.split(step):
        yield chunk[:, :half], chunk[:, half:]


def _prefixes(logits: Tensor) -> list[Tensor]:
    """The probabilities of the first 0, 1, ..., h bits together: h + 1 tables (n, 2^i) of logits (n, h)."""
    ones, zeros = torch.sigmoid(logits), torch.sigmoid(-logits)
    tables = [logits.new_ones(len(logits), 1)]
    for i in range(logits.shape[1]):
        tables.append(torch.cat([tables[-1] * zeros[:, i : i + 1], tables[-1] * ones[:, i : i + 1]], 1))
    return tables


def _by_logits(logits: Tensor, prefixes: list[Tensor], by_table: Tensor) -> Tensor:
    """The gradient (n, h) by the logits of a half, from that by its table (n, 2^h): the last bit first, then without it."""
    ones, zeros = torch.sigmoid(logits), torch.sigmoid(-logits)
    columns: list[Tensor] = []
    for i in reversed(range(logits.shape[1])):
        if_zero, if_one = by_table.chunk(2, 1)
        columns.append(((if_one - if_zero) * prefixes[i]).sum(1))
        by_table = if_zero * zeros[:, i : i + 1] + if_one * ones[:, i : i + 1]
    return ones * zeros * torch.stack(columns[::-1], 1) if columns else torch.zeros_like(logits)
