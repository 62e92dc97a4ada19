"""What a Fréchet distance costs and how exact it is, beside scipy's matrix root, torchmetrics and torch-fidelity.

Time: all sides get the statistics of the same features, whose variances fall as 1 / k in a common basis of no special
direction, and take turns in one process on one thread; the time is process time, the least of the turns (what else the machine
does only adds). Before any time counts, all distances have to agree.

Error: of fewer images than features, beside singular values of centred features by LAPACK's gesvd, which none of the sides
uses; in 1e-12 of the distance, and what is smaller counts as 1. Ours is `frechet_distance_of_features`.

Sweep: a small model, tokenizer and feature network of random weights; wall time, with decoding and features in a second thread
while the next images are sampled, and without.

    python benchmarks/metrics.py --out benchmarks/results/metrics.json
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm, svd
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from midway.gen.core.environment import version_of
from midway.gen.core.processes import ProcessInfo
from midway.gen.core.runs import Run
from midway.gen.data.images import ImageData
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.diffusion.sampling import SamplingConfig
from midway.gen.evaluation.sources import SolverSource
from midway.gen.features.classifier import FeatureConfig, FeatureNetwork
from midway.gen.features.reference import make_reference
from midway.gen.metrics.frechet import frechet_distance, frechet_distance_of_features
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.sweep.measure import EvaluationContext, measure
from midway.gen.sweep.store import CellStore, Seeds
from midway.samplers.grids import GRIDS
from midway.samplers.solvers import SOLVERS
from midway.tokenizers.tokenizer import ImageTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Measured, Result, conclude, judged, printed, process_seconds

Distance = Callable[[], float]
Array = NDArray[np.float64]
OURS, SCIPY, TORCHMETRICS, FIDELITY = "ours", "scipy.linalg.sqrtm", "torchmetrics", "torch-fidelity"
TIMES_LESS = {SCIPY: 3.0}  # CPU time, where it is judged
TIMES_NEARER = 10.0
AGREEMENT = 1e-6
UNIT = 1e-12  # of errors; nobody needs smaller ones


@dataclass(frozen=True)
class Sizes:
    """Features, images of each set, and of the two sets that are fewer than features; images of the sweep."""

    dim: int = 2048
    count: int = 10_000
    few: tuple[int, int] = (1000, 1500)
    images: int = 4096


# ---- the same distance, by all sides ----


def features(seed: int, count: int, dim: int) -> Tensor:
    """float64 (count, dim): variances 1 / k in a basis that is the same for all seeds; the mean differs."""
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.5
    shift = 0.05 * torch.randn(dim, generator=generator, dtype=torch.float64)
    return (torch.randn(count, dim, generator=generator, dtype=torch.float64) + shift) * scales @ basis


def peers(a: FeatureStatistics, b: FeatureStatistics) -> dict[str, Distance]:
    """From the same statistics."""
    first, second = moments(a), moments(b)
    return {
        SCIPY: partial(by_sqrtm, first, second),
        TORCHMETRICS: by_torchmetrics(a, b),
        FIDELITY: partial(by_torch_fidelity, first, second),
    }


def moments(statistics: FeatureStatistics) -> tuple[Array, Array]:
    """Mean and covariance."""
    return statistics.mean.numpy(), statistics.covariance.numpy()


def by_sqrtm(first: tuple[Array, Array], second: tuple[Array, Array]) -> float:
    """How pytorch-fid, clean-fid and others do it. Without `disp`, which scipy 1.18 lacks, any version gives one matrix."""
    (mean1, cov1), (mean2, cov2) = first, second
    root = np.real(np.asarray(sqrtm(cov1 @ cov2)))
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(root))


def by_torch_fidelity(first: tuple[Array, Array], second: tuple[Array, Array]) -> float:
    """Its metric of statistics."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    statistics = [{"mu": mean, "sigma": covariance} for mean, covariance in (first, second)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


class _Identity(nn.Module):
    """The network of features that are features already."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, x: Tensor) -> Tensor:
        return x


def by_torchmetrics(a: FeatureStatistics, b: FeatureStatistics) -> Distance:
    """`compute` of its metric, whose sums are ours."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Identity(a.dim), compute_with_cache=False)
    for real, statistics in ((True, a), (False, b)):
        # It registers an update, and float64; then its sums are set.
        metric.update(torch.zeros(2, a.dim, dtype=torch.float64), real=real)
        side = "real" if real else "fake"
        setattr(metric, f"{side}_features_sum", statistics.count * statistics.mean)
        outer = statistics.scatter + statistics.count * torch.outer(statistics.mean, statistics.mean)
        setattr(metric, f"{side}_features_cov_sum", outer)
        setattr(metric, f"{side}_features_num_samples", torch.tensor(statistics.count))
    return lambda: float(metric.compute())


def exact(x: Tensor, y: Tensor) -> float:
    """By singular values of centred features; they need no covariance."""
    first, second = ((z - z.mean(0)).numpy() / np.sqrt(len(z) - 1) for z in (x, y))
    values = np.asarray(svd(first @ second.T, compute_uv=False, lapack_driver="gesvd"))
    shift = float((x.mean(0) - y.mean(0)).square().sum())
    return shift + float(np.square(first).sum() + np.square(second).sum()) - 2 * float(values.sum())


# ---- rows ----


def agreed(distances: dict[str, float]) -> None:
    """ValueError unless all are ours to `AGREEMENT`."""
    for name, value in distances.items():
        if not abs(value - distances[OURS]) <= AGREEMENT * distances[OURS]:
            raise ValueError(f"{name} finds {value!r}, ours is {distances[OURS]!r}: the sides do not do the same")


def time_rows(sizes: Sizes, turns: int) -> Iterator[Measured]:
    """Statistics to distance, beside each peer."""
    a, b = (FeatureStatistics.of(features(seed, sizes.count, sizes.dim)) for seed in (1, 2))
    sides: dict[str, Distance] = {OURS: partial(frechet_distance, a, b), **peers(a, b)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, float] = {}

    def keep(name: str) -> None:
        found[name] = sides[name]()

    keep(OURS)  # untimed: what is set up once
    for _ in range(turns):
        for name, taken in seconds.items():
            taken.append(process_seconds(partial(keep, name)))
        agreed(found)
    name = f"Fréchet distance, D = {sizes.dim}, N = {sizes.count}"
    for peer in (SCIPY, TORCHMETRICS, FIDELITY):
        pairs = [other / own for own, other in zip(seconds[OURS], seconds[peer], strict=True)]
        facts = {"differences": {"distance": abs(found[peer] / found[OURS] - 1)}, "turns": turns}
        spread = (round(min(pairs), 2), round(max(pairs), 2))
        own, other = min(seconds[OURS]), min(seconds[peer])
        yield judged(name, "CPU s", own, peer, other, TIMES_LESS.get(peer), quartiles=spread, **facts)


def error_rows(sizes: Sizes) -> Iterator[Measured]:
    """Distances of fewer images than features."""
    x, y = (features(seed, count, sizes.dim) for seed, count in zip((3, 4), sizes.few, strict=True))
    truth = exact(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of so few images: that is what this is about
        own = relative_error(frechet_distance_of_features(x, y), truth)
        name = f"its error, N = {sizes.few[0]} and {sizes.few[1]} < D"
        for peer, distance in peers(FeatureStatistics.of(x), FeatureStatistics.of(y)).items():
            yield judged(name, "1e-12", own, peer, relative_error(distance(), truth), TIMES_NEARER)


def relative_error(value: float, truth: float) -> float:
    """In `UNIT`, at least 1."""
    return max(abs(value / truth - 1) / UNIT, 1.0)


# ---- sweeps ----


def throughput_rows(sizes: Sizes, turns: int) -> Iterator[Measured]:
    """Images a second of a sweep whose decoding and features overlap with sampling, beside one after the other."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    with TemporaryDirectory() as folder:
        context = a_bench(sizes, Path(folder))
        source = a_source()
        measure(source, context)  # untimed: what is set up once
        for turn in range(turns):
            for overlap, seconds in taken.items():
                seeds = replace(context.seeds, first=(2 * turn + overlap + 1) * sizes.images)
                begun = time.perf_counter()
                measure(source, replace(context, seeds=seeds, overlap=overlap))
                seconds.append(time.perf_counter() - begun)
    pairs = [other / own for own, other in zip(taken[True], taken[False], strict=True)]
    own, other = (1000 * min(taken[overlap]) / sizes.images for overlap in (True, False))
    name = f"sweep of {sizes.images} images, 10 NFE, overlapped ({1000 / own:.0f} images/s)"
    spread = (round(min(pairs), 2), round(max(pairs), 2))
    yield judged(name, "ms/image", own, "one after the other", other, None, quartiles=spread, turns=turns)


def a_source() -> SolverSource:
    """A DiT of random weights on the latents of 8x8 images."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(width=64, downsample=4)
    tokenizer.set_latent_statistics(torch.zeros(4), torch.ones(4))
    config = LatentModelConfig(schedule="vp", target="v", dit=DiTConfig(width=96, depth=4, heads=4, patch=1))
    model = LatentModel(config, tokenizer.latent_shape, 10).eval().requires_grad_(False)
    trained = TrainedModel(
        model, tokenizer.eval().requires_grad_(False), DataConfig(), "random", Run(Path(), "latent_model")
    )
    table = SOLVERS["ddim"].build(model.schedule, GRIDS["uniform"](model.schedule, 10))
    return SolverSource(trained, table, SamplingConfig())


def a_bench(sizes: Sizes, folder: Path) -> EvaluationContext:
    """A feature network of random weights and random images as the reference."""
    torch.manual_seed(1)
    network = FeatureNetwork(FeatureConfig(1, 8, 10)).eval().requires_grad_(False)
    images = torch.randint(0, 256, (512, 1, 8, 8), dtype=torch.uint8)
    data = ImageData(images, torch.arange(512) % 10, tuple("0123456789"), "random", "0" * 64)
    reference = make_reference(network, "cnn-random@0", data)
    return EvaluationContext({"": reference}, Seeds(0, sizes.images, 1), CellStore(folder), ProcessInfo())


def rows_of(sizes: Sizes, turns: int) -> list[Callable[[], Iterator[Result]]]:
    """All rows of the table, made as they are printed: further ones are further entries."""
    return [partial(time_rows, sizes, turns), partial(error_rows, sizes), partial(throughput_rows, sizes, turns)]


def main() -> int:
    """Print the table, write the JSON; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "metrics.json")
    parser.add_argument("--turns", type=int, default=2, help="of each side")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()
    with threadpool_limits(1), torch.no_grad():
        rows = printed(rows_of(Sizes(), arguments.turns), 70)
    versions = {name: version_of(name) for name in ("scipy", TORCHMETRICS, FIDELITY)}
    return conclude(rows, arguments.out, "cpu", peers=versions, load={"before": load, "after": os.getloadavg()})


if __name__ == "__main__":
    sys.exit(main())
