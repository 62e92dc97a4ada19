"""Product quantization: groups of channels, each with a quantizer of its own (Jégou et al. 2011, IEEE TPAMI 33(1), section II.B).

    z = (z_1, ..., z_G)        code = (q_1(z_1), ..., q_G(z_G))        K^G codes from G codebooks of K

The squared distance is the sum over groups, so the nearest of all K^G codes is found by G searches among K. Losses are means over
groups: with the mean over elements in each group, that is the mean over all channels, as of one quantizer.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from midway.tokenizers.base import Composite, Quantized, Quantizer, float32_island
from midway.tokenizers.checks import check_channels


def added(terms: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sums by name."""
    names = dict.fromkeys(name for each in terms for name in each)
    return {name: torch.stack([each[name] for each in terms if name in each]).sum(0) for name in names}


def rows_of_counts(parts: Sequence[Quantized]) -> Tensor | None:
    """The histograms of all parts below one another, (G, K); None if one of them has none."""
    counts = [part.counts for part in parts if part.counts is not None]
    if len(counts) < len(parts):
        return None
    return torch.cat([each if each.ndim == 2 else each.unsqueeze(0) for each in counts])


class Grouped(Composite):
    """`parts`: equal discrete quantizers side by side; in_dim and dim are their sums.

    Parts with several codes per position give that many for each group, of one group after the other. All groups take the same
    noise. Codebooks travel in the checkpoint as `parts.i`.
    """

    def __init__(self, parts: Sequence[Quantizer]) -> None:
        super().__init__()
        groups = len(parts)
        self.parts = nn.ModuleList(parts)
        first = parts[0]
        self.dim = groups * first.dim
        self.codebook_size = first.codebook_size
        self.groups = groups * first.groups
        self.noise_channels = first.noise_channels
        self._in_dim = groups * first.in_dim

    @property
    def in_dim(self) -> int:
        return self._in_dim

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """z (B, in_dim, *S) -> codes; losses of the base, averaged over groups. Gradient: that of each group's own."""
        check_channels(z, self.in_dim)
        with float32_island(z):
            outs = [part(share, noise) for part, share in self._shares(z.float())]
            return Quantized(
                codes=torch.cat([out.codes for out in outs], 1),
                indices=self._joined([out.indices for out in outs]),
                losses={name: total / len(outs) for name, total in added([out.losses for out in outs]).items()},
                loss=torch.stack([out.loss for out in outs]).mean(),
                counts=rows_of_counts(outs),
                parts=tuple(outs),
            )

    def latents(self, z: Tensor) -> Tensor:
        check_channels(z, self.in_dim)
        return torch.cat([part.latents(share) for part, share in self._shares(z)], 1)

    def nearest(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        check_channels(latents, self.dim, "latents")
        codes, indices = zip(*(part.nearest(share) for part, share in self._shares(latents)), strict=True)
        return torch.cat(codes, 1), self._joined(indices)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, *S, G) int64 -> (B, D, *S) float32. ValueError if an index is outside {0, ..., K - 1}."""
        if indices.ndim < 2 or indices.shape[-1] != self.groups:
            raise ValueError(f"indices have shape {tuple(indices.shape)}; this quantizer takes (B, *S, {self.groups})")
        each = indices.unbind(-1) if self.members[0].groups == 1 else indices.chunk(len(self.members), -1)
        return torch.cat([part.indices_to_codes(own) for part, own in zip(self.members, each, strict=True)], 1)

    def start(self, z: Tensor) -> None:
        check_channels(z, self.in_dim)
        for part, share in self._shares(z):
            part.start(share)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"

    @property
    def members(self) -> list[Quantizer]:
        return cast(list[Quantizer], list(self.parts))

    def _shares(self, x: Tensor) -> list[tuple[Quantizer, Tensor]]:
        """Each part with its channels of x (B, C, *S)."""
        return list(zip(self.members, x.chunk(len(self.members), 1), strict=True))

    def _search(self, codes: Tensor) -> Tensor:
        check_channels(codes, self.dim, "codes")
        return self._joined([part._search(share) for part, share in self._shares(codes)])

    def _joined(self, indices: Sequence[Tensor]) -> Tensor:
        """Indices of the parts, (B, *S) or (B, *S, g) -> (B, *S, G)."""
        return (torch.stack if self.members[0].groups == 1 else torch.cat)(tuple(indices), -1)
