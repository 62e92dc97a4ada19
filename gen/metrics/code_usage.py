"""How a codebook is used: which codes occur, and how often, counted batch by batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from midway.tokenizers.base import Quantized, perplexity


@dataclass(frozen=True)
class CodeUse:
    """`counts[g]`: how often those of the `size` codes of group g that occur do, the most frequent first, int64."""

    size: int
    counts: tuple[Tensor, ...]

    @staticmethod
    def of(tokens: Tensor, size: int) -> "CodeUse":
        """Of indices (N, G) on the CPU, a column per group."""
        counts = (column.unique(return_counts=True)[1] for column in tokens.T)
        return CodeUse(size, tuple(found.sort(descending=True).values for found in counts))

    @property
    def used(self) -> int:
        """Codes of all groups that occur."""
        return sum(len(counts) for counts in self.counts)

    @property
    def dead(self) -> int:
        """Codes of all groups that do not."""
        return len(self.counts) * self.size - self.used

    @property
    def counted(self) -> int:
        """Tokens of a group."""
        return int(self.counts[0].sum())

    @property
    def perplexities(self) -> list[float]:
        """Of each group: the number of equally used codes that would say as much."""
        return [perplexity(counts) for counts in self.counts]

    @property
    def frequencies(self) -> Tensor:
        """float64 (R,): the share of tokens of the code of each rank, the mean over groups."""
        ranked = torch.nn.utils.rnn.pad_sequence(list(self.counts), batch_first=True)
        return ranked.double().mean(0) / self.counted


class CodeCounter:
    """Adds up histograms; of codebooks too large for one it keeps the tokens and counts those that occur."""

    def __init__(self, size: int, groups: int) -> None:
        self.size, self.groups = size, groups
        self.histogram: Tensor | None = None
        self.tokens: list[Tensor] = []

    def add(self, quantized: Quantized) -> None:
        """Count one batch."""
        if quantized.counts is None:
            self.tokens.append(quantized.indices.reshape(-1, self.groups).cpu())
        else:
            self.histogram = quantized.counts + (0 if self.histogram is None else self.histogram)

    def use(self) -> CodeUse:
        """All batches."""
        if self.histogram is None:
            return CodeUse.of(torch.cat(self.tokens), self.size)
        rows = [counts[counts > 0] for counts in self.histogram.cpu().view(-1, self.size)]
        return CodeUse(self.size, tuple(counts.sort(descending=True).values for counts in rows))
