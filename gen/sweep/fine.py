"""The exact solution of a model: a fine solution of every seed, which samples are compared with.

    rmse       of standardised latents: the solver's own error, seed by seed
    to_exact   Fréchet distance between the images of a solver and those of the fine solution of the same seeds, block by block

Both are 0 at convergence, whatever the model. The fine solution has an error of its own, measured against twice its steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from midway.gen.core.config import from_dict, to_dict
from midway.gen.core.processes import ProcessInfo
from midway.gen.evaluation.metrics import Features
from midway.gen.evaluation.records import TO_EXACT
from midway.gen.evaluation.sources import SampledBatch, SampleSource
from midway.gen.evaluation.spaces import Spaces, column, extract, key
from midway.gen.metrics.frechet import frechet_distance, frechet_distance_of_features
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.metrics.psnr_ssim import psnr
from midway.gen.sweep.figures import FineCosts
from midway.gen.sweep.store import Cell, CellStore, Part, Seeds, check_rows
from midway.gen.sweep.tally import Tally, Work


@dataclass(frozen=True)
class FineSolution:
    """The fine solution of every seed, stored as parts of the same seeds, with its features in every space."""

    source: SampleSource
    seeds: Seeds
    store: CellStore
    process: ProcessInfo
    spaces: Spaces
    tally: Tally = field(default_factory=Tally, compare=False)
    """Takes what was done."""
    timed: bool = True
    """Whether its seconds are reported, so that a run is made before that is not timed."""

    @cached_property
    def cell(self) -> Cell:
        """Where the parts are; it is never finished."""
        identity = {"fine solution": self.source.identity, "first": self.seeds.first, "n": self.seeds.n}
        spaces = {space: [reference.features, reference.id] for space, reference in self.spaces.items()}
        return self.store.cell({**identity, "spaces": spaces})

    def make(self) -> None:
        """Make the missing parts of this process."""
        for number, (_, seeds) in self.process.mine(self.seeds.parts):
            if self.cell.part(number, self.check) is None:
                if self.timed:
                    self.tally.warm_up(self.source, seeds, self.spaces)
                batch, begun = self.source.sample(seeds), self.tally.clock()
                images = self.source.images(batch)
                tensors = {"latents": batch.values, "images": images}
                tensors |= {key(space): its.features for space, its in extract(self.spaces, images).items()}
                work = Work(round(batch.nfe * len(images)), len(images))
                self.tally.spend(work, batch.seconds, self.tally.clock() - begun)
                self.cell.write(number, Part(tensors, to_dict(FineCosts(batch.nfe, batch.seconds))))

    def check(self, number: int, part: Part) -> None:
        """`Check` of a part."""
        from_dict(FineCosts, part.costs)
        check_rows(part, len(self.seeds.parts[number][1]), "latents", "images", *map(key, self.spaces))

    def part(self, number: int) -> Part:
        """One that was made before. RuntimeError if it is gone."""
        (part,) = self.cell.parts([number], self.check)
        return part

    def latents(self, most: int) -> Tensor:
        """The fine solution of the first seeds, at most so many."""
        return self._first("latents", most)

    def images(self, most: int) -> Tensor:
        """Its images, uint8 (<= most, C, H, W)."""
        return self._first("images", most)

    def _first(self, name: str, most: int) -> Tensor:
        found: list[Tensor] = []
        for number in range(len(self.seeds.parts)):
            part = self.cell.part(number, self.check)
            if part is None or sum(map(len, found)) >= most:
                break
            found.append(part.tensors[name])
        return torch.cat(found)[:most]

    def errors(self, number: int, latents: Tensor, images: Tensor) -> dict[str, Tensor]:
        """float64 (n,) twice: mean square distance of latents (n, C, h, w), and PSNR in dB of images, to the fine solution."""
        part = self.part(number)
        return {"errors": square_errors(latents, part.tensors["latents"]), "psnr": psnr(images, part.tensors["images"])}

    def distances(self, numbers: Sequence[int], features: dict[str, Features]) -> dict[str, float]:
        """`to_exact` of these features of the seeds of these parts, in every space; none where the fine solution diverged."""
        parts = self.cell.parts(numbers, self.check)
        if not all(bool(part.tensors["latents"].isfinite().all()) for part in parts):
            return {}
        return {
            column(space, TO_EXACT): distance_between(
                its.features, torch.cat([part.tensors[key(space)] for part in parts])
            )
            for space, its in features.items()
        }


def distance_between(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of features (n, D) and (m, D); of few without their covariances."""
    if len(x) <= x.shape[1]:
        return frechet_distance_of_features(x, y)
    return frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))


def square_errors(latents: Tensor, others: Tensor) -> Tensor:
    """float64 (n,): mean square distance of float values (n, *)."""
    return (latents.double() - others.double()).square().flatten(1).mean(1)


@dataclass(frozen=True)
class StoredSolution(SampleSource):
    """The parts of a fine solution as a source of samples, so that it is a row of its own without being sampled again."""

    fine: FineSolution

    @property
    def identity(self) -> dict[str, Any]:
        """The fine solution's."""
        return {"exact": self.fine.cell.identity}

    @property
    def kind(self) -> str:
        """Its images are decoded as those of the fine solution."""
        return "stored"

    def sample(self, seeds: Tensor) -> SampledBatch:
        """Of the seeds of one part."""
        firsts = [int(its[0]) for _, its in self.fine.seeds.parts]
        part = self.fine.part(firsts.index(int(seeds[0])))
        costs = from_dict(FineCosts, part.costs)
        return SampledBatch(part.tensors["latents"], costs.nfe, costs.seconds)

    def images(self, raw: SampledBatch) -> Tensor:
        """Decoded again."""
        return self.fine.source.images(raw)
