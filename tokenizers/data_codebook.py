"""Codebooks that begin at data and watch it: their first codes from encoder vectors, and what was seen since the last update.

`forward` only gathers statistics (pending.py); `update`, in the subclasses, applies them, once per optimizer step.
"""

import random
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from midway.tokenizers.base import float32_island
from midway.tokenizers.clustering import kmeans
from midway.tokenizers.codebook import Codebook, Gradient
from midway.tokenizers.pending import Pending, distributed, in_backward, rank
from midway.tokenizers.rotation import unit

Init = Literal["kmeans", "batch"]


class DataCodebook(Codebook):
    """`start` initialises the codebook. Without it the first *training* forward does, from that batch of rank 0 (other
    ranks receive it): then the codebook depends on how the batch is divided, and under torch.distributed every rank has
    to run its first training forward before its first update. `step` counts updates, forgotten ones too (-1 before
    initialisation); a subclass registers it, and `codebook`.
    """

    codebook: Tensor
    step: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        commitment: float,
        init: Init,
        seed: int,
        normalize: bool,
        gradient: Gradient,
        entropy_weight: float,
        entropy_temperature: float,
    ) -> None:
        super().__init__(codebook_size, dim, commitment, normalize, gradient, entropy_weight, entropy_temperature)
        if init not in get_args(Init):
            raise ValueError(f"init is {init!r}; choose 'kmeans' or 'batch'")
        self.init: Init = init
        self.seed = seed
        self._pending: Pending | None = None
        self._host_step: int | None = None  # a copy of `step`, so that forward need not wait for the device
        self._host_initialised = (
            False  # apart from it, because a compiled forward is compiled anew for every other number
        )
        self.register_load_state_dict_post_hook(_forget_host_step)

    @property
    def initialised(self) -> bool:
        """Whether the codebook has been initialised from data."""
        if not self._host_initialised:
            self._host_initialised = self._step() >= 0
        return self._host_initialised

    def raw_codebook(self) -> Tensor:
        return self.codebook.float()

    def start(self, z: Tensor) -> None:
        """Initialise the codebook from z (B, D, *S), unless it is; give the same z on every rank."""
        if not self.initialised:
            with float32_island(z):
                self.initialise(self._rows(self.latents(z).detach()))

    @torch.no_grad()
    def initialise(self, rows: Tensor) -> None:
        """Set the codebook from rank 0's encoder vectors `rows` (N, D). Every rank must call it together.

        Vectors that are not finite are left out, and so are those without a direction if codes are normalised. If none is
        left, the codebook stays as it was drawn and counts as initialised: restarts will bring it to the data. ValueError if
        there are no vectors at all.
        """
        if rank() == 0:
            self.codebook.copy_(self._centres(unit(rows) if self.normalize else rows))
        if distributed():
            dist.broadcast(self.codebook, src=0)
        self._begin()
        self._set_step(0)

    def _begin(self) -> None:
        """Set the statistics that belong to a new codebook."""

    def _first_codes(self) -> Tensor:
        """The codes before any data, (K, D) float32: standard normal, a function of the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(self._size, self.dim, generator=generator, dtype=torch.float32)
        return unit(drawn) if self.normalize else drawn

    def _prepare(self, rows: Tensor) -> None:
        if self.training and not self.initialised:
            self.initialise(rows)

    def _centres(self, rows: Tensor) -> Tensor:
        """The first codebook (K, D), from those of `rows` (N, D) that are usable; the present one if none is."""
        usable = rows[rows.isfinite().all(1) & ((rows != 0).any(1) | (not self.normalize))]
        if len(rows) and not len(usable):
            return self.codebook
        iterations = 10 if self.init == "kmeans" else 0
        centres = kmeans(usable, self._size, iterations, self._generator(0), self.normalize)
        return torch.where(centres.isfinite().all(1, keepdim=True), centres, self.codebook)  # their sum may overflow

    def _gather(self, rows: Tensor, indices: Tensor, noise: Tensor | None) -> None:
        """Add one training batch to the pending statistics, once, even if checkpointing runs forward again."""
        if not (self.training and torch.is_grad_enabled()):
            return
        if self._pending is None:
            self._pending = Pending(self._size, self.dim, rows.device)
        compiling = torch.compiler.is_compiling()
        if not compiling and in_backward() and self._pending.has_seen(indices):
            return
        if noise is None:
            generator = self._generator(1 + len(self._pending.fingerprints))
            priorities = torch.rand(len(rows), generator=generator, dtype=torch.float32).to(rows.device)
        else:
            priorities = torch.special.ndtr(noise[:, 0].to(rows)).flatten()
        add = self._pending.add_unless_seen if compiling else self._pending.add
        add(rows, indices, priorities)

    def _generator(self, purpose: int) -> torch.Generator:
        """A CPU generator that is a function of seed, rank, step and purpose, so that a resumed run draws the same."""
        key = f"{self.seed} {rank()} {self._step()} {purpose}"
        return torch.Generator().manual_seed(random.Random(key).getrandbits(63))

    def _step(self) -> int:
        if self._host_step is None:
            self._host_step = int(self.step.item())
        return self._host_step

    def _set_step(self, step: int) -> None:
        self.step.fill_(step)
        self._host_step, self._host_initialised = step, step >= 0


def _forget_host_step(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, DataCodebook)
    module._host_step, module._host_initialised = None, False
