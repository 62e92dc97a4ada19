"""The entropy loss of a codebook (MaskGIT: Chang et al. 2022, arXiv 2202.04200, in its tokenizer's published code).

    p_k(z) = softmax_k(-|z - e_k|^2 / temperature)          loss = E[H(p | z)] - H(E[p]),   in nats
    "entropy_sample" = E[H(p | z)], small if every vector is sure of its code     "entropy_batch" = H(E[p]), large if all are used

There are N K probabilities. They are made a chunk at a time (4 MiB of float32, and a few temporaries of that size), forward and
again in backward, so that autograd keeps nothing but z and e. With s = -|z - e|^2 / temperature and gradients a of the mean
entropy and b_k of the mean probability, a chunk gives

    d / d s_k = p_k ((b_k - sum_j p_j b_j) - a (ln p_k + H)) / N     d s_k / d z = -d s_k / d e_k = 2 (e_k - z) / temperature

in which the terms of z itself cancel, because the derivatives by s sum to 0.

Under torch.distributed training E[p] is that of all processes, whose shares count alike. The gradient flows through each
process's own share, so that DistributedDataParallel's mean is the gradient of the whole. Every process must run forward as often.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from midway.tokenizers.base import float32_island, straight_through
from midway.tokenizers.clustering import full_precision, rows_per_chunk
from midway.tokenizers.pending import distributed


def code_entropy(rows: Tensor, codebook: Tensor, temperature: float, shared: bool = False) -> tuple[Tensor, Tensor]:
    """(E[H(p | z)], H(E[p])) of rows (N, D) over codebook (K, D), differentiable in both; `shared`: E over all processes."""
    entropy, mean = soft_assignment(rows, codebook, temperature)
    if shared and distributed():
        everywhere = mean.detach().clone()
        dist.all_reduce(everywhere)
        mean = straight_through(everywhere / dist.get_world_size(), mean)
    # An unused code has probability exactly 0, where the entropy's slope is infinite.
    return entropy, -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


def soft_assignment(rows: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(mean entropy (), mean probability (K,)) of p(z): rows (N, D), codebook (K, D); zeros if there are no rows."""
    return _SoftAssignment.apply(rows, codebook, temperature)  # type: ignore[no-any-return]


class _SoftAssignment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, rows: Tensor, codebook: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, codebook)
        ctx.temperature = temperature  # pyright: ignore[reportAttributeAccessIssue]
        entropy, mean = rows.new_zeros(()), rows.new_zeros(len(codebook))
        for _, _, log_p in _chunks(rows, codebook, temperature):
            p = log_p.exp()
            entropy = entropy - (p * log_p).sum()
            mean = mean + p.sum(0)
        return entropy / max(len(rows), 1), mean / max(len(rows), 1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, codebook = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        temperature: float = ctx.temperature  # pyright: ignore[reportAttributeAccessIssue]
        by_entropy, by_mean = gradients
        by_rows, by_codes = [], torch.zeros_like(codebook)
        with float32_island(rows), full_precision():
            for shifted, codes, log_p in _chunks(rows, codebook, temperature):
                p = log_p.exp()
                sure = log_p - (p * log_p).sum(1, keepdim=True)  # ln p + H
                by_score = p * (by_mean - (p * by_mean).sum(1, keepdim=True) - by_entropy * sure)
                by_rows.append(by_score @ codes)
                by_codes = by_codes + by_score.T @ shifted - by_score.sum(0).unsqueeze(1) * codes
        scale = 2 / (temperature * max(len(rows), 1))
        return (torch.cat(by_rows) if by_rows else torch.zeros_like(rows)) * scale, by_codes * scale, None


def _chunks(rows: Tensor, codebook: Tensor, temperature: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of rows and the codes, both relative to the mean code, and ln p of that chunk."""
    centre = codebook.mean(0)
    codes = codebook - centre
    bias = codes.square().sum(1) / -2
    for chunk in rows.split(rows_per_chunk(len(codebook))):
        shifted = chunk - centre
        with full_precision():
            scores = torch.addmm(bias, shifted, codes.T)
        yield shifted, codes, torch.log_softmax(scores * (2 / temperature), 1)
