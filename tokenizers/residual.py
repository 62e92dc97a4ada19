"""Residual quantization: each stage quantizes what the stages before it left over.

    r_1 = latents(z)      c_i = q_i(r_i)      r_{i+1} = r_i - c_i      code = c_1 + ... + c_n, added from the left

SoundStream (Zeghidour et al. 2021, arXiv 2107.03312, section III.C), each stage with a codebook of its own; RQ-VAE (Lee et al.
2022, arXiv 2203.01941, section 3.1), where the stages share one. As there, losses are added over stages: the commitment is
sum_i mean((r_i - sg[c_i])^2), whose r_i = r_1 - sg[c_1 + ... + c_{i-1}] hands every term to z. The gradient of the code is that
of latents(z), once, whatever the depth; or, if the base asks for it, rotated from r_1 to the sum (rotation.py).

VQ: stage i has its own codebook of residuals.

FSQ: z is bounded once, and stage i > 1 has the same grid, made finer until it fills one cell of the stage before, exactly:

    c_i = (q(r_i L^(i-1) + m) - m) / L^(i-1)        m = midpoint of the lowest and the highest code, per channel

so that n stages are one uniform quantizer of L^n levels a channel, with an error L^(n-1) times smaller. With (L - 1)^(i-1), which
maps the cell onto the outermost codes, neighbouring cells would share their border: two tuples of indices for one code. With the
grid as it is, applied to a residual of less than half a step, all stages but the first would say zero.

Dropout (section III.C of SoundStream) in training: with probability p a sample uses k stages only, k uniform in {1, ..., n}:

    code = c_1 + ... + c_k        the losses of the other stages send no gradient to z

and that is all: every stage quantizes every sample, returns its index and learns from it, since k says nothing about the
residuals. So the codes of a sample are indices_to_codes(indices[..., :k]), bit for bit.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from midway.tokenizers.base import (
    Quantized,
    Quantizer,
    check_channels,
    discrete,
    float32_island,
    straight_through,
)
from midway.tokenizers.clustering import full_precision, nearest_code
from midway.tokenizers.fsq import FSQ
from midway.tokenizers.grouped import added, discrete_quantizers, rows_of_counts
from midway.tokenizers.rotation import rotated

_FINEST = 2**18  # levels of a channel, all stages together, that sums in float32 tell apart
_WIDTHS = (16, 256)  # of the search for the indices of a sum of codes
_WIDEST = 4096  # a search that is complete may be as wide as this
_SCORES_PER_CHUNK = 2**22


class Residual(Quantizer):
    """`depth` stages of the config `base`: indices (B, *S, depth), K that of the base, codes of its `dim` channels.

    `dropout` is p in [0, 1], 1 as in SoundStream; above 0, `forward` takes one more channel of noise in training. The base is a
    discrete quantizer whose codes can follow the residuals, or FSQ of L^depth <= 2**18 levels in every channel. The stages share
    the noise of the base; codebooks travel in the checkpoint as `stages.i`.
    """

    def __init__(self, base: Mapping[str, Any], depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        _check(depth, dropout)
        self.stages = nn.ModuleList(_stages(base, depth))
        first = self._stages[0]
        self.dim = first.dim
        self.codebook_size = self._size = first.codebook_size
        self.groups = depth
        self.dropout = dropout
        self.noise_channels = first.noise_channels + (dropout > 0)
        self._through = rotated if getattr(first, "gradient", None) == "rotation" else straight_through

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """z (B, D, *S) -> codes; losses of the base, added over stages. Gradient: see above.

        `noise` (B, noise_channels, *S), standard normal: what the base draws by, then, used in training only, the channel whose
        first position decides how many stages a sample uses.
        """
        latents = self.latents(z)
        depths = self.depths(noise, latents) if self.training and self.dropout else None
        shared = None if noise is None else noise[:, : self._stages[0].noise_channels]
        with float32_island(z):
            residual, total, outs = latents, torch.zeros_like(latents), []
            for i, stage in enumerate(self._stages):
                used = None if depths is None else depths > i
                seen = residual if used is None else torch.where(used, residual, residual.detach())
                outs.append(stage(seen if i else z, shared))
                code = outs[-1].codes.detach()
                residual = residual - code
                longer = total + code if i else code
                total = longer if used is None else torch.where(used, longer, total)
            return Quantized(
                codes=self._through(total, latents),
                indices=torch.stack([out.indices for out in outs], -1),
                losses=added([out.losses for out in outs]),
                loss=torch.stack([out.loss for out in outs]).sum(),
                counts=rows_of_counts(outs),
            )

    def depths(self, noise: Tensor | None, latents: Tensor) -> Tensor:
        """How many stages each sample uses in training, (B, 1, ..., 1) int64 in {1, ..., depth}: a function of its noise."""
        expected = (len(latents), self.noise_channels, *latents.shape[2:])
        if noise is None or noise.shape != expected:
            given = "none was given" if noise is None else f"it has shape {tuple(noise.shape)}"
            raise ValueError(f"dropout in training takes noise {expected}, but {given}; or set dropout to 0")
        first_position = [slice(1)] * (noise.ndim - 2)
        draw = torch.special.ndtr(noise[(slice(None), slice(-1, None), *first_position)].float())
        cut = 1 + (draw * (self.groups / self.dropout)).to(torch.int64).clamp(max=self.groups - 1)
        return torch.where(draw < self.dropout, cut, self.groups)

    def latents(self, z: Tensor) -> Tensor:
        return self._stages[0].latents(z)

    def snap(self, latents: Tensor) -> Tensor:
        """The code that is reached by taking the nearest in each stage. What it makes of a code may be another code."""
        check_channels(latents, self.dim, "latents")
        with float32_island(latents):
            residual, total = latents.detach().float(), None
            for stage in self._stages:
                code = stage.snap(residual).detach()
                residual = residual - code
                total = code if total is None else total + code
            return cast(Tensor, total)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, *S, k) int64 -> (B, D, *S) float32: the sum of the first k stages, k from 1 to depth."""
        if indices.ndim < 2 or not 1 <= indices.shape[-1] <= self.groups:
            shape = tuple(indices.shape)
            raise ValueError(
                f"indices have shape {shape}; this quantizer takes (B, *S, k) with k from 1 to {self.groups}"
            )
        with float32_island(indices):
            codes = [stage.indices_to_codes(own) for stage, own in zip(self._stages, indices.unbind(-1), strict=False)]
            return _added_in_order(codes)

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """(B, D, *S) -> (B, *S, depth) int64, the inverse of `indices_to_codes`.

        FSQ: exact. VQ: the nearest codes of a sum are not always those it was added from; where they do not give the sum bit for
        bit, indices are searched for, which waits for the device. The search is complete if K^(depth - 1) <= 4096; otherwise,
        and where the input is no sum of codes, the result is that of the closest sum found.
        """
        check_channels(codes, self.dim, "codes")
        with torch.no_grad(), float32_island(codes):
            residual, found = codes.float(), []
            for stage in self._stages:
                found.append(stage.codes_to_indices(residual))
                residual = residual - stage.snap(residual)
            indices = torch.stack(found, -1)
            if isinstance(self._stages[0], FSQ):
                return indices
            rows = codes.float().movedim(1, -1).reshape(-1, self.dim)
            return self._searched(rows, indices.view(-1, self.groups)).view(indices.shape)

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Each stage from what those before it, already started, leave of z (B, D, *S)."""
        residual = self.latents(z)
        for i, stage in enumerate(self._stages):
            stage.start(residual if i else z)
            residual = residual - stage.snap(residual)

    def update(self, step_ok: Tensor | None = None) -> None:
        for stage in self._stages:  # in this order on every process: they exchange statistics
            stage.update(step_ok)

    def extra_repr(self) -> str:
        return f"depth={self.groups}, dropout={self.dropout}"

    @property
    def _stages(self) -> list[Quantizer]:
        return cast(list[Quantizer], list(self.stages))

    def _searched(self, rows: Tensor, indices: Tensor) -> Tensor:
        """`indices` (N, depth), replaced where they do not give rows (N, D) bit for bit, by ever wider searches."""
        numbers = torch.arange(cast(int, self._size), device=rows.device).unsqueeze(0)
        tables = [stage.indices_to_codes(numbers)[0].T for stage in self._stages]
        paths = numbers.numel() ** (self.groups - 1)
        widths = [width for width in _WIDTHS if width < paths] + [paths] * (paths <= _WIDEST)
        for width in widths:
            wrong = (_sums(tables, indices) != rows).any(1).nonzero().squeeze(1)
            step = max(1, _SCORES_PER_CHUNK // (width * numbers.numel()))
            for part in wrong.split(step) if len(wrong) else ():
                indices[part] = _beam(rows[part], tables, width)
        return indices


class Finer(Quantizer):
    """The grid of an FSQ, L^power times finer in each channel, for residuals of stage `power`: latents are the input itself."""

    origin: Tensor

    def __init__(self, base: FSQ, power: int) -> None:
        super().__init__()
        self.base = base
        self.power = power
        self.dim = base.dim
        self.codebook_size = self._size = cast(int, base.codebook_size)
        ends = base.indices_to_codes(torch.tensor([[0, self._size - 1]]))
        # Integers, because `module.to(torch.bfloat16)` leaves them alone: m = origin / L, and origin is 0 or -1.
        origin = (ends.double().mean((0, 2)) * base.levels).round().to(torch.int64)
        self.register_buffer("origin", origin, persistent=False)

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        latents = self.latents(z)
        codes = straight_through(self.snap(latents), latents)
        return discrete(codes, self.codes_to_indices(latents), {}, codes.new_zeros(()), self._size)

    def latents(self, z: Tensor) -> Tensor:
        check_channels(z, self.dim)
        return z.float()

    def snap(self, latents: Tensor) -> Tensor:
        return self._shrunk(self.base.snap(self._magnified(latents.detach())))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return self._shrunk(self.base.indices_to_codes(indices))

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        return self.base.codes_to_indices(self._magnified(codes))

    def extra_repr(self) -> str:
        return f"power={self.power}"

    def _magnified(self, x: Tensor) -> Tensor:
        scale, middle = self._map(x)
        return x.float() * scale + middle

    def _shrunk(self, x: Tensor) -> Tensor:
        scale, middle = self._map(x)
        return (x - middle) / scale

    def _map(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """L^power and m, float32, to broadcast over (B, D, *S)."""
        levels, origin = (v.view(-1, *[1] * (like.ndim - 2)) for v in (self.base.levels, self.origin))
        return (levels**self.power).float(), origin.float() / levels.float()


def _added_in_order(codes: list[Tensor]) -> Tensor:
    total = codes[0]
    for code in codes[1:]:
        total = total + code
    return total


def _sums(tables: list[Tensor], indices: Tensor) -> Tensor:
    """Codes (N, D) of indices (N, depth) in tables of (K, D)."""
    return _added_in_order([table[own] for table, own in zip(tables, indices.unbind(1), strict=True)])


def _beam(rows: Tensor, tables: list[Tensor], width: int) -> Tensor:
    """Indices (N, depth) whose codes give rows (N, D) bit for bit, or else those that come closest.

    After each stage but the last the `width` paths with the shortest residuals are kept; the last takes the nearest code.
    """
    left, paths = rows.unsqueeze(1), rows.new_zeros(len(rows), 1, 0, dtype=torch.int64)
    for table in tables[:-1]:
        with full_precision():
            scores = left.square().sum(2, keepdim=True) - 2 * left @ table.T + table.square().sum(1)
        best = scores.flatten(1).topk(min(width, scores[0].numel()), largest=False).indices
        parent, code = best // len(table), best % len(table)
        paths = torch.cat([_taken(paths, parent), code.unsqueeze(2)], 2)
        left = _taken(left, parent) - table[code]
    last = nearest_code(left.reshape(-1, rows.shape[1]), tables[-1]).view(left.shape[:2])
    paths = torch.cat([paths, last.unsqueeze(2)], 2)
    sums = _sums(tables, paths.flatten(0, 1)).view(left.shape)
    error = (sums - rows.unsqueeze(1)).square().sum(2)  # zero only where they are equal
    return _taken(paths, error.argmin(1, keepdim=True)).squeeze(1)


def _taken(x: Tensor, which: Tensor) -> Tensor:
    """x (N, M, C), which (N, W) -> (N, W, C)."""
    return x.gather(1, which.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _stages(base: Mapping[str, Any], depth: int) -> list[Quantizer]:
    """The quantizers of all stages; of FSQ all but the first made finer. ValueError if the base does not fit."""
    made = discrete_quantizers(base, depth, "base")
    first = made[0]
    if isinstance(first, FSQ):
        _check_grid(first, depth)
        return [first, *(Finer(cast(FSQ, stage), i) for i, stage in enumerate(made[1:], 1))]
    probe = torch.linspace(-3, 3, 2 * first.dim, dtype=torch.float32).view(1, first.dim, 2)
    if first.groups > 1 or first.in_dim != first.dim or not torch.equal(first.latents(probe), probe):
        raise ValueError(
            f"base {dict(base)} does not quantize residuals as they are, in one code each: a stage may neither normalise, "
            "project nor group its input; put the residual quantizer inside, as in type 'grouped' with a residual base"
        )
    if not first.state_dict():
        raise ValueError(
            f"base {dict(base)} has codes that never move: they cannot follow residuals; use 'vq' or 'fsq'"
        )
    return made


def _check_grid(base: FSQ, depth: int) -> None:
    highest = int(base.levels.max())
    if highest**depth > _FINEST:
        raise ValueError(
            f"depth {depth} of {highest} levels makes {highest**depth} levels of one channel; float32 tells {_FINEST} apart: "
            "take fewer stages or levels"
        )
    if base.noise_channels:
        raise ValueError("noise_dropout in the base would be quantized away by the next stage: set it to 0")


def _check(depth: int, dropout: float) -> None:
    if int(depth) != depth or depth < 2:
        raise ValueError(f"depth is {depth}; give an integer of at least 2: one stage is the base itself")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout is {dropout}; give a probability in [0, 1], 0 to use all stages always")
