"""Residual quantization: each stage quantizes what the stages before it left over.

    r_1 = latents(z)      c_i = q_i(r_i)      r_{i+1} = r_i - c_i      code = c_1 + ... + c_n, added from the left

SoundStream (Zeghidour et al. 2021, arXiv 2107.03312, section III.C), each stage with a codebook of its own; RQ-VAE (Lee et al.
2022, arXiv 2203.01941, section 3.1), where the stages share one. As there, losses are added over stages: the commitment is
sum_i mean((r_i - sg[c_i])^2), whose r_i = r_1 - sg[c_1 + ... + c_{i-1}] hands every term to z. The gradient of the code is that
of latents(z), once, whatever the depth; or, if the base is built so, rotated from r_1 to the sum (rotation.py).

VQ: stage i has its own codebook of residuals.

FSQ: z is bounded once, and stage i > 1 has the same grid, made finer until it fills one cell of the stage before, exactly:

    c_i = (q(r_i L^(i-1) + m) - m) / L^(i-1)        m = midpoint of the lowest and the highest code, per channel

so that n stages are one uniform quantizer of L^n levels a channel, with an error L^(n-1) times smaller. With (L - 1)^(i-1), which
maps the cell onto the outermost codes, neighbouring cells would share their border: two tuples of indices for one code. With the
grid as it is, applied to a residual of less than half a step, all stages but the first would give zero.

Dropout (section III.C of SoundStream) in training: with probability p a sample uses k stages only, k uniform in {1, ..., n}:

    code = c_1 + ... + c_k        the losses of the other stages send no gradient to z

Every stage quantizes every sample, returns its index and learns from it, since k is independent of the
residuals. So the codes of a sample are indices_to_codes(indices[..., :k]), bit for bit.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from midway.tokenizers.base import Composite, Quantized, Quantizer, float32_island, straight_through
from midway.tokenizers.checks import check_channels, dropout_noise, one_a_sample
from midway.tokenizers.codebook import Codebook
from midway.tokenizers.fsq import FSQ, channelwise
from midway.tokenizers.grouped import added, rows_of_counts
from midway.tokenizers.rotation import rotated
from midway.tokenizers.summands import summands

_FINEST = 2**18  # levels of a channel, all stages together, that float32 sums can distinguish


class Residual(Composite):
    """Equal `stages`: indices (B, *S, depth), K and dim those of a stage.

    `dropout` is p in [0, 1], 1 as in SoundStream; above 0, `forward` takes one more channel of noise in training. Stages are
    discrete quantizers whose codes can follow the residuals, or FSQ of L^depth <= 2**18 levels in every channel, of which all
    but the first are replaced by `Finer`. They share their noise; codebooks travel in the checkpoint as `stages.i`.
    """

    def __init__(self, stages: Sequence[Quantizer], dropout: float = 0.0) -> None:
        super().__init__()
        depth = len(stages)
        _check(stages[0], depth, dropout)
        self.stages = nn.ModuleList(
            Finer(stage, i) if i and isinstance(stage, FSQ) else stage for i, stage in enumerate(stages)
        )
        first = stages[0]
        self.dim = first.dim
        self.codebook_size = first.codebook_size
        self.groups = depth
        self.dropout = dropout
        self.noise_channels = first.noise_channels + (dropout > 0)
        self._through = rotated if getattr(first, "gradient", None) == "rotation" else straight_through

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """z (B, D, *S) -> codes; losses of the base, added over stages. Gradient: see above.

        `noise` (B, noise_channels, *S), standard normal: the noise of the stages, then, used in training only, the channel whose
        first position decides how many stages a sample uses.
        """
        latents = self.latents(z)
        depths = self.depths(noise, latents) if self.training and self.dropout else None
        shared = None if noise is None else noise[:, : self.members[0].noise_channels]
        with float32_island(z):
            residual, total, outs = latents, torch.zeros_like(latents), []
            for i, stage in enumerate(self.members):
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
                parts=tuple(outs),
            )

    def depths(self, noise: Tensor | None, latents: Tensor) -> Tensor:
        """Number of stages of each sample in training, (B, 1, ..., 1) int64 in {1, ..., depth}: a function of its noise."""
        chosen = one_a_sample(dropout_noise(noise, latents, self.noise_channels, "dropout"))
        draw = torch.special.ndtr(chosen.float())
        cut = 1 + (draw * (self.groups / self.dropout)).to(torch.int64).clamp(max=self.groups - 1)
        return torch.where(draw < self.dropout, cut, self.groups)

    def latents(self, z: Tensor) -> Tensor:
        return self.members[0].latents(z)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest code of each stage to what is left, added from the left. Of VQ stages, a sum may be snapped to another."""
        check_channels(latents, self.dim, "latents")
        with float32_island(latents):
            residual, codes, indices = latents.detach().float(), [], []
            for stage in self.members:
                code, own = stage.nearest(residual)
                residual = residual - code
                codes.append(code)
                indices.append(own)
            return sum(codes[1:], codes[0]), torch.stack(indices, -1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, *S, k) int64 -> (B, D, *S) float32: the sum of the first k stages, k from 1 to depth."""
        if indices.ndim < 2 or not 1 <= indices.shape[-1] <= self.groups:
            shape = tuple(indices.shape)
            raise ValueError(
                f"indices have shape {shape}; this quantizer takes (B, *S, k) with k from 1 to {self.groups}"
            )
        with float32_island(indices):
            codes = [stage.indices_to_codes(own) for stage, own in zip(self.members, indices.unbind(-1), strict=False)]
            return sum(codes[1:], codes[0])  # added from the left

    def distinct_in(self, dtype: torch.dtype) -> bool:
        """float32 and wider: the sums of all stages are too many to look at."""
        return Quantizer.distinct_in(self, dtype)

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Each stage from what those before it, already started, leave of z (B, D, *S)."""
        residual = self.latents(z)
        for i, stage in enumerate(self.members):
            stage.start(residual if i else z)
            residual = residual - stage.snap(residual)

    def extra_repr(self) -> str:
        return f"depth={self.groups}, dropout={self.dropout}"

    @property
    def members(self) -> list[Quantizer]:
        return cast(list[Quantizer], list(self.stages))

    @torch.no_grad()
    def _search(self, codes: Tensor) -> Tensor:
        """The nearest codes; where their sum is another, summands by a search (summands.py), which may miss them."""
        sums, indices = self.nearest(codes)
        books = [stage.codes() for stage in self.members if isinstance(stage, Codebook)]
        other = (sums != codes).any(1)
        if books and bool(other.any()):
            indices[other] = summands(codes.movedim(1, -1)[other], books)
        return indices


class Finer(FSQ):
    """The grid of an FSQ, L^power times finer in each channel, for residuals of stage `power`: latents are the input itself."""

    origin: Tensor

    def __init__(self, base: FSQ, power: int) -> None:
        super().__init__(base.levels.tolist(), base.form, base.symmetric)
        self.power = power
        ends = base.indices_to_codes(torch.tensor([[0, self._size - 1]]))
        # Integers, because `module.to(torch.bfloat16)` leaves them alone: m = origin / L, and origin is 0 or -1.
        origin = (ends.double().mean((0, 2)) * base.levels).round().to(torch.int64)
        self.register_buffer("origin", origin, persistent=False)

    def latents(self, z: Tensor) -> Tensor:
        check_channels(z, self.dim)
        return z.float()

    def latents_to_digits(self, latents: Tensor) -> Tensor:
        check_channels(latents, self.dim, "latents")
        scale, middle = self._map(latents)
        return super().latents_to_digits(latents.float() * scale + middle)

    def digits_to_codes(self, digits: Tensor) -> Tensor:
        scale, middle = self._map(digits)
        return (super().digits_to_codes(digits) - middle) / scale

    def extra_repr(self) -> str:
        return f"power={self.power}"

    def _map(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """L^power and m, float32, to broadcast over (B, D, *S)."""
        levels, origin = (channelwise(v, like) for v in (self.levels, self.origin))
        return (levels**self.power).float(), origin.float() / levels.float()


def _check(first: Quantizer, depth: int, dropout: float) -> None:
    """ValueError unless `depth` quantizers like `first` can be stages."""
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout is {dropout}; give a probability in [0, 1], 0 to use all stages always")
    if isinstance(first, FSQ):
        _check_grid(first, depth)
        return
    probe = torch.linspace(-3, 3, 2 * first.dim, dtype=torch.float32).view(1, first.dim, 2)
    if first.groups > 1 or first.in_dim != first.dim or not torch.equal(first.latents(probe), probe):
        raise ValueError(
            f"base {first} does not quantize residuals as they are, in one code each: a stage may neither normalise, "
            "project nor group its input; put the residual quantizer inside, as in type 'grouped' with a residual base"
        )
    if not first.state_dict():
        raise ValueError(f"base {first} has codes that never move: they cannot follow residuals; use 'vq' or 'fsq'")


def _check_grid(base: FSQ, depth: int) -> None:
    highest = int(base.levels.max())
    if highest**depth > _FINEST:
        raise ValueError(
            f"depth {depth} of {highest} levels makes {highest**depth} levels of one channel; float32 distinguishes {_FINEST}: "
            "take fewer stages or levels"
        )
    if base.noise_channels:
        raise ValueError("noise_dropout in the base would be quantized away by the next stage: set it to 0")
