"""The entropy loss of a codebook (MaskGIT: Chang et al. 2022, arXiv 2202.04200, in its tokenizer's published code).

    p_k(z) = softmax_k(-|z - e_k|^2 / temperature)          loss = E[H(p | z)] - H(E[p]),   in nats
    "entropy_sample" = E[H(p | z)], small if assignments are confident     "entropy_batch" = H(E[p]), large if all codes are used

There are N K probabilities. They are made a chunk at a time (4 MiB of float32, and a few temporaries of that size), forward and
again in backward, so that autograd keeps nothing but z and e. With s = -|z - e|^2 / temperature and gradients a of the sum of
entropies and b_k of the sum of probabilities, a chunk gives

    d / d s_k = p_k ((b_k - sum_j p_j b_j) - a (ln p_k + H))     d s_k / d z = -d s_k / d e_k = 2 (e_k - z) / temperature

in which the terms of z itself cancel, because the derivatives by s sum to 0.

Over processes (`shared`) every sample counts alike, as in entropy.py. Every process must run forward equally often.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from midway.tokenizers.base import float32_island
from midway.tokenizers.clustering import full_precision, rows_per_chunk
from midway.tokenizers.entropy import entropy_of, mean_over_samples


def code_entropy(rows: Tensor, codebook: Tensor, temperature: float, shared: bool = False) -> tuple[Tensor, Tensor]:
    """(E[H(p | z)], H(E[p])) of rows (N, D) over codebook (K, D), differentiable in both; `shared`: E over all processes."""
    mean = mean_over_samples(soft_assignment(rows, codebook, temperature), len(rows), shared)
    return mean[0], entropy_of(mean[1:])


def soft_assignment(rows: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Sums over the rows (N, D) of the entropy of p(z), then of the K probabilities: (1 + K,); codebook (K, D)."""
    return _SoftAssignment.apply(rows, codebook, temperature)  # type: ignore[no-any-return]


class _SoftAssignment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, codebook: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(rows, codebook)
        ctx.temperature = temperature  # pyright: ignore[reportAttributeAccessIssue]
        entropy, total = rows.new_zeros(1), rows.new_zeros(len(codebook))
        for _, _, log_p in _chunks(rows, codebook, temperature):
            p = log_p.exp()
            entropy = entropy - (p * log_p).sum()
            total = total + p.sum(0)
        return torch.cat([entropy, total])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, codebook = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        temperature: float = ctx.temperature  # pyright: ignore[reportAttributeAccessIssue]
        by_entropy, by_total = gradients[0][0], gradients[0][1:]
        by_rows, by_codes = [], torch.zeros_like(codebook)
        with float32_island(rows), full_precision():
            for shifted, codes, log_p in _chunks(rows, codebook, temperature):
                p = log_p.exp()
                sure = log_p - (p * log_p).sum(1, keepdim=True)  # ln p + H
                by_score = p * (by_total - (p * by_total).sum(1, keepdim=True) - by_entropy * sure)
                by_rows.append(by_score @ codes)
                by_codes = by_codes + by_score.T @ shifted - by_score.sum(0).unsqueeze(1) * codes
        scale = 2 / temperature
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
