"""Two levels of codes, as in VQ-VAE-2 (Razavi et al. 2019, arXiv 1906.00446, section 3.1, Algorithm 1), behind the one interface.

    z = (z_top, z_bottom), channels           t = q_top(mean of z_top over 2x2)             at half the resolution
    b = q_bottom(z_bottom + A t)              code = (t repeated 2x2, b)

A is learned: a 3x3 convolution at the top's resolution with four outputs a position, one for each of its pixels (sub-pixel
convolution, Shi et al. 2016, arXiv 1609.05158). So the bottom is conditioned on the decoded top as in the paper, which joins the
two and maps them linearly; a linear map of z_bottom alone would add nothing to the encoder, which ends in one. A starts at zero.

Indices are a sequence, the top level first, each level row by row: length L = H W / 4 + H W. Grids are square, so that L
determines H. Losses are added over levels. Both levels have the same K, so that every token is one of K.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.tokenizers.base import Composite, Quantized, Quantizer, float32_island, straight_through
from midway.tokenizers.checks import check_channels
from midway.tokenizers.grouped import added
from midway.tokenizers.shuffle import pixel_shuffle


class TwoLevel(Composite):
    """Discrete quantizers `top` and `bottom` over z (B, top.in_dim + bottom.in_dim, H, H), H even.

    Codes have top.dim + bottom.dim channels, indices the shape (B, 5 H^2 / 4), and (B, 5 H^2 / 4, G) with G codes per position.
    `counts` are those of both levels together. Both levels take the same noise, the top every second row and column of it.
    `condition`, the map A, is trained by the gradient; the levels as each of them is.
    """

    def __init__(self, top: Quantizer, bottom: Quantizer) -> None:
        super().__init__()
        _check(top, bottom)
        self.top, self.bottom = top, bottom
        self.dim = self.top.dim + self.bottom.dim
        self.codebook_size = self.top.codebook_size
        self.groups = self.top.groups
        self.noise_channels = max(self.top.noise_channels, self.bottom.noise_channels)
        self.condition = nn.Conv2d(self.top.dim, 4 * self.bottom.in_dim, 3, padding=1)
        nn.init.zeros_(self.condition.weight)
        if self.condition.bias is not None:
            nn.init.zeros_(self.condition.bias)

    @property
    def in_dim(self) -> int:
        return self.top.in_dim + self.bottom.in_dim

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """z (B, in_dim, H, H) -> codes. Gradient: straight-through; to z_top also through A."""
        with float32_island(z):
            above, beside = self._inputs(z)
            top = self.top(above, None if noise is None else noise[:, : self.top.noise_channels, ::2, ::2])
            conditioned = beside + self._map(top.codes)
            bottom = self.bottom(conditioned, None if noise is None else noise[:, : self.bottom.noise_channels])
            return Quantized(
                codes=torch.cat([_repeated(top.codes), bottom.codes], 1),
                indices=self._sequence(top.indices, bottom.indices),
                losses=added([top.losses, bottom.losses]),
                loss=top.loss + bottom.loss,
                counts=None if top.counts is None or bottom.counts is None else top.counts + bottom.counts,
                parts=(top, bottom),
            )

    def latents(self, z: Tensor) -> Tensor:
        """z (B, in_dim, H, H) -> (B, D, H, H): the top's, each value four times, and the bottom's, given the top's code."""
        with float32_island(z):
            above, beside = self._inputs(z)
            top = self.top.latents(above)
            conditioned = beside + self._map(straight_through(self.top.snap(top), top))
            return torch.cat([_repeated(top), self.bottom.latents(conditioned)], 1)

    def nearest(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, H, H): the top's channels are averaged over 2x2 first. The bottom's are not conditioned again."""
        with float32_island(latents):
            top, bottom = _levels(latents, self.top.dim, self.bottom.dim, "latents")
            return self._joined(self.top.nearest(top), self.bottom.nearest(bottom))

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with float32_island(z):
            above, beside = self._inputs(z)
            top = self.top.encode(above)
            return self._joined(top, self.bottom.encode(beside + self._map(top[0])))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, L) int64 -> (B, D, H, H) float32. ValueError if L is not 5 H^2 / 4 or an index is outside {0, ..., K - 1}."""
        side = _side(indices, self.groups)
        top, bottom = indices.split([side**2, 4 * side**2], 1)
        above = self.top.indices_to_codes(top.unflatten(1, (side, side)))
        return torch.cat([_repeated(above), self.bottom.indices_to_codes(bottom.unflatten(1, (2 * side, 2 * side)))], 1)

    def tokens(self, height: int, width: int) -> int:
        return height * width * 5 // 4

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """The top from z, then the bottom from its input given the top, already started."""
        with float32_island(z):
            above, beside = self._inputs(z)
            self.top.start(above)
            self.bottom.start(beside + self._map(self.top.encode(above)[0]))

    @property
    def members(self) -> list[Quantizer]:
        return [self.top, self.bottom]

    def _inputs(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, in_dim, H, H) -> the top's input at half the resolution, and z_bottom; float32."""
        return _levels(z, self.top.in_dim, self.bottom.in_dim, "z")

    def _map(self, top: Tensor) -> Tensor:
        """A t: codes (B, top.dim, h, h) -> (B, bottom.in_dim, 2 h, 2 h) float32, whatever the dtype of the weights."""
        bias = None if self.condition.bias is None else self.condition.bias.float()
        return pixel_shuffle(F.conv2d(top, self.condition.weight.float(), bias, padding=1), 2)

    def _search(self, codes: Tensor) -> Tensor:
        with float32_island(codes):
            top, bottom = _levels(codes, self.top.dim, self.bottom.dim, "codes")
            return self._sequence(self.top._search(top), self.bottom._search(bottom))

    def _joined(self, top: tuple[Tensor, Tensor], bottom: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Codes and indices of both levels together."""
        return torch.cat([_repeated(top[0]), bottom[0]], 1), self._sequence(top[1], bottom[1])

    def _sequence(self, top: Tensor, bottom: Tensor) -> Tensor:
        """Indices (B, h, h[, G]) and (B, 2 h, 2 h[, G]) -> (B, L[, G])."""
        return torch.cat([top.flatten(1, 2), bottom.flatten(1, 2)], 1)


def _pooled(x: Tensor) -> Tensor:
    """Means over 2x2. In pairs, so that the mean of four equal numbers is that number, bit for bit."""
    rows = (x[..., ::2, :] + x[..., 1::2, :]) / 2
    return (rows[..., ::2] + rows[..., 1::2]) / 2


def _repeated(x: Tensor) -> Tensor:
    """(B, C, h, h) -> (B, C, 2 h, 2 h)."""
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def _side(indices: Tensor, groups: int) -> int:
    """H / 2 of indices (B, L) or (B, L, groups)."""
    side = math.isqrt(indices.shape[1] // 5) if indices.ndim == (2 if groups == 1 else 3) else 0
    if side < 1 or 5 * side**2 != indices.shape[1] or (groups > 1 and indices.shape[2] != groups):
        wanted = "(B, L)" if groups == 1 else f"(B, L, {groups})"
        raise ValueError(f"indices have shape {tuple(indices.shape)}; give {wanted} with L = 5 H^2 / 4 for an even H")
    return side


def _levels(x: Tensor, top: int, bottom: int, name: str) -> tuple[Tensor, Tensor]:
    """x (B, top + bottom, H, H) -> means over 2x2 of the first `top` channels, and the others; float32."""
    channels = top + bottom
    check_channels(x, channels, name)
    if x.ndim != 4 or x.shape[2] != x.shape[3] or x.shape[2] % 2 or not x.shape[2]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; two levels need a square grid of even side, (B, {channels}, H, H): "
            "change the image size or the downsampling"
        )
    above, beside = x.float().split([top, bottom], 1)
    return _pooled(above), beside


def _check(top: Quantizer, bottom: Quantizer) -> None:
    if isinstance(top, TwoLevel) or isinstance(bottom, TwoLevel):
        raise ValueError(
            "a level of type 'two_level' has no square grid of tokens: choose another type for top and bottom"
        )
    for name in ("codebook_size", "groups"):
        values = getattr(top, name), getattr(bottom, name)
        if values[0] != values[1]:
            raise ValueError(
                f"{name} is {values[0]} of top and {values[1]} of bottom: both levels make one sequence of tokens, each one of "
                "codebook_size in each of the groups, so make them equal"
            )
