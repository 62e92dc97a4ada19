"""Codebooks that are initialised from data and corrected by statistics of the encoder vectors, once per optimizer step."""

import random
from abc import abstractmethod
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from midway.tokenizers.base import Quantized, distributed, float32_island, rank
from midway.tokenizers.clustering import kmeans
from midway.tokenizers.codebook import Codebook
from midway.tokenizers.codebook_statistics import CodebookStatistics
from midway.tokenizers.rotation import unit

Init = Literal["kmeans", "batch"]


class DataCodebook(Codebook):
    """Base of VQ and GradientVQ: a subclass registers `codebook` (K, D) and `step`, which counts updates (-1 before `start`)."""

    codebook: Tensor
    step: Tensor
    init: Init
    seed: int
    _statistics: CodebookStatistics | None = None
    _host_step: int | None = None  # a copy of `step`, so that training need not wait for the device

    @property
    def initialised(self) -> bool:
        """Whether the codebook has been initialised from data."""
        return self._step() >= 0

    def raw_codebook(self) -> Tensor:
        return self.codebook.float()

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Initialise the codebook from rank 0's z (B, D, *S), unless it is; every rank must call it.

        Vectors that are not finite are left out, and so are those without a direction if codes are normalised. If none is
        left, the codebook stays as it was drawn and counts as initialised: restarts will bring it to the data. ValueError if
        there are no vectors at all.
        """
        if self.initialised:
            return
        if rank() == 0:
            with float32_island(z):
                rows = self._rows(self.latents(z))
                self.codebook.copy_(self._centres(unit(rows) if self.normalize else rows))
        if distributed():
            dist.broadcast(self.codebook, src=0)
        self._begin()
        self._set_step(0)

    @torch.no_grad()
    def observe(self, quantized: Quantized) -> None:
        """See `Quantizer.observe`. ValueError if the codebook has not been initialised."""
        if not self.initialised:
            raise ValueError("the codebook has not been initialised from data: call start(z) before the first step")
        seen = quantized.observation
        assert seen is not None
        if not len(seen.rows):
            return
        if self._statistics is None:
            self._statistics = CodebookStatistics(self._size, self.dim, seen.rows.device)
        priorities = seen.priorities
        if priorities is None:
            generator = self._generator(1 + self._statistics.batches)
            priorities = torch.rand(len(seen.rows), generator=generator, dtype=torch.float32).to(seen.rows.device)
        self._statistics.add(seen.rows, seen.indices, priorities)

    @torch.no_grad()
    def update(self, step_ok: Tensor | None = None) -> None:
        """Learn from all that was observed since the last update; without anything observed, nothing changes.

        Where `step_ok` () is False, or the sums are not finite on any rank, all of it is discarded. That is decided on the
        device, and every rank exchanges its statistics either way: under torch.distributed every rank must call it, as often
        as the others.
        """
        if not self.initialised or (self._statistics is None and not distributed()):
            return
        statistics = self._statistics or CodebookStatistics(self._size, self.dim, self.codebook.device)
        self._statistics = None
        sums, candidates = statistics.over_processes()
        learned = sums.isfinite().all() & (sums[:, -1].sum() > 0)
        self._learn(sums, candidates, learned if step_ok is None else learned & step_ok)
        self._set_step(self._step() + 1)

    @abstractmethod
    def _begin(self) -> None:
        """Set the statistics that belong to a new codebook."""

    @abstractmethod
    def _learn(self, sums: Tensor, candidates: Tensor, learned: Tensor) -> None:
        """Apply sums (K, D + 1) and candidates (R, D + 1), best first; nothing where `learned` () is False."""

    def _first_codes(self, init: Init, seed: int) -> Tensor:
        """The codes before any data, (K, D) float32: standard normal, a function of the seed. ValueError for another init."""
        if init not in get_args(Init):
            raise ValueError(f"init is {init!r}; choose 'kmeans' or 'batch'")
        self.init, self.seed = init, seed
        self.register_load_state_dict_post_hook(_forget_host_step)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self._size, self.dim, generator=generator, dtype=torch.float32)
        return unit(drawn) if self.normalize else drawn

    def _centres(self, rows: Tensor) -> Tensor:
        """The first codebook (K, D), from those of `rows` (N, D) that are usable; the present one if none is."""
        usable = rows[rows.isfinite().all(1) & ((rows != 0).any(1) | (not self.normalize))]
        if len(rows) and not len(usable):
            return self.codebook
        iterations = 10 if self.init == "kmeans" else 0
        centres = kmeans(usable, self._size, iterations, self._generator(0), self.normalize)
        return torch.where(centres.isfinite().all(1, keepdim=True), centres, self.codebook)  # their sum may overflow

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
        self._host_step = step


def _forget_host_step(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, DataCodebook)
    module._host_step = None
