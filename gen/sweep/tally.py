"""The work of a sweep as it is done: how long the rest takes, and a first run of every kind of source that is not timed.

    seconds left = (e E + f F + b B) s

with E, F and B the network evaluations, decoded images and blocks of figures that are left, e, f and b the seconds that one took
here, and s the time since sampling began over what these account for; less what has passed since anything was done last.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import astuple, dataclass

from torch import Tensor

from midway.gen.evaluation.sources import SampleSource
from midway.gen.evaluation.spaces import Spaces, extract
from midway.gen.progress.bar import Progress


@dataclass(frozen=True)
class Work:
    """Network evaluations, decoded images, and blocks whose figures are computed."""

    evaluations: int = 0
    images: int = 0
    blocks: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


class Tally:
    """What this process has done of a sweep, of the part of all work that is its own."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._left, self._done, self._seconds = Work(), Work(), [0.0, 0.0, 0.0]
        self._began = self._last = 0.0
        self._progress, self._about, self._images, self._total = None, "", 0, 0
        self._warm: set[Hashable] = set()

    def expect(self, work: Work, processes: int = 1) -> None:
        """So much is to be done, by so many processes."""
        self._left = Work(*(count // processes for count in astuple(work)))

    def name(self, progress: Progress, about: str, total: int) -> None:
        """What is sampled from now on, of so many images in all, for the lines of `progress`."""
        self._progress, self._about, self._images, self._total = progress, about, 0, total
        progress.at(about)

    def spend(self, work: Work, sampling: float, looking: float, figures: float = 0.0) -> None:
        """So much was done, in so many seconds of sampling, of decoding and features, and of figures."""
        self._last = self.clock()
        if not sum(self._seconds):
            self._began = self._last - sampling - looking - figures
        self._done += work
        more = (sampling, looking, figures)
        self._seconds = [seconds + its for seconds, its in zip(self._seconds, more, strict=True)]
        self._images += work.images
        if self._progress is not None and 0 < self._images < self._total:
            self._progress.at(f"{self._about}, {self._images:,} of {self._total:,} images")

    def left(self) -> float | None:
        """Seconds that the rest takes at the speed so far; None before anything was done."""
        if not sum(self._seconds):
            return None
        counts = zip(self._seconds, astuple(self._done), astuple(self._left), strict=True)
        rest = sum(seconds / max(done, 1) * max(all_of_it - done, 0) for seconds, done, all_of_it in counts)
        factor = (self._last - self._began) / sum(self._seconds)
        return max(factor * rest - (self.clock() - self._last), 0.0)

    def warm_up(self, source: SampleSource, seeds: Tensor, spaces: Spaces) -> None:
        """Run a source once before it is timed: allocations, compilation and caches are no cost of its samples.

        Once for every kind of source and number of seeds: solvers of one kind run the same networks. Nothing of it is kept, and
        images are functions of their seeds, so that it changes no number.
        """
        if (key := (source.kind, len(seeds))) not in self._warm:
            self._warm.add(key)
            extract(spaces, source.images(source.sample(seeds)))
