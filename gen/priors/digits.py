"""Tokens of several digits as vectors, and vectors as laws of tokens.

    p(token | h) = prod_d p(digit_d | h, digit_1 .. digit_{d-1})

exactly, in one evaluation of the trunk a token: the digits go through a small network of their own (the bit head of arXiv
2602.09024 is one). A token of one digit has one softmax.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.networks.layers import normed
from midway.tokenizers.precision import widened


class TokenEmbedding(nn.Module):
    """Tokens int64 (B, N, D) -> (B, N, W), the sum over digits."""

    def __init__(self, width: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.digits = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for table in self.digits:
            nn.init.normal_(cast(nn.Embedding, table).weight, std=0.02)

    def start_from(self, vectors: list[Tensor]) -> None:
        """See `CodePrior.start_from`."""
        for table, own in zip(self.digits, vectors, strict=True):
            _set(table, own, 0.2 / len(vectors) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        vectors = [table(digit) for table, digit in zip(self.digits, tokens.unbind(-1), strict=True)]
        return torch.stack(vectors).sum(0) if len(vectors) > 1 else vectors[0]


class DigitHead(nn.Module):
    """Hidden (B, N, W) -> the law of each token's digits, each given those before it."""

    def __init__(self, width: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes
        self.outputs = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        several = sizes[:-1]
        self.before = nn.ModuleList(nn.Embedding(size, width) for size in several)
        self.layers = nn.ModuleList(_Layer(width) for _ in several)  # the first digit has the trunk's own
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in self.before:  # beside a hidden vector of root mean square 1
            nn.init.normal_(cast(nn.Embedding, table).weight, std=0.3)

    def start_from(self, vectors: list[Tensor]) -> None:
        """See `CodePrior.start_from`."""
        for output, own in zip(self.outputs, vectors, strict=True):
            _set(output, own, 0.02)
        for table, own in zip(self.before, vectors[:-1], strict=True):
            _set(table, own, 0.3)

    def logits(self, hidden: Tensor, tokens: Tensor, digit: int) -> Tensor:
        """(B, N, sizes[digit]) in float32 or float64, given the digits of tokens (B, N, D) before this one."""
        h = hidden
        if digit:
            earlier = [table(tokens[..., i]) for i, table in enumerate(self.before) if i < digit]
            h = cast(_Layer, self.layers[digit - 1])(torch.stack([hidden, *earlier]).sum(0))
        return widened(self.outputs[digit](h))

    def log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """log p (B, N, D) of each digit of tokens (B, N, D), in nats, float32 or float64."""
        found = []
        for digit, value in enumerate(tokens.unbind(-1)):
            law = self.logits(hidden, tokens, digit).log_softmax(-1)
            found.append(law.gather(-1, value.unsqueeze(-1)).squeeze(-1))
        return torch.stack(found, dim=-1)


@torch.no_grad()
def _set(table: nn.Module, vectors: Tensor, std: float) -> None:
    """Set its weight (K, W) to a random linear image of vectors (K, C), of root mean square about `std`."""
    centred = vectors - vectors.mean(0)
    unit = centred / centred.square().sum(1).mean().sqrt().clamp_min(1e-12)
    weight = cast(nn.Embedding, table).weight
    weight.copy_(unit.to(weight) @ (torch.randn(vectors.shape[1], weight.shape[1]) * std).to(weight))


class _Layer(nn.Module):
    """x (*, W) -> x plus a SwiGLU of its norm, normed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(normed(x, self.norm_1)).chunk(2, dim=-1)
        return normed(x + self.down(F.silu(gate) * up), self.norm_2)
