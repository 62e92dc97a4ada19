"""The proving ground: a mixture of Gaussians fitted to image patches, whose exact field takes the place of a network.

Patches (or whole images) in [-1, 1] are flattened, centred, turned to their first principal axes and multiplied by one factor
that gives a pixel the standard deviation 0.5, which EDM assumes of its data (Karras et al. 2022, arXiv 2206.00364). The axes are
orthonormal, so a distance here is one of pixels, in units of that factor. The mixture is the truth from then on: how well it
describes images does not enter any figure.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.core.errors import DataError
from midway.gen.core.ranges import SEED, WIDTH, check_ranges
from midway.gen.data.images import load_images, to_float
from midway.gen.data.pixels import Images
from midway.gen.progress.bar import busy
from midway.samplers.mixture import Mixture

PATCHES = "patches"
"""The bundled ground: the two photographs of scikit-learn."""
STD = 0.5
MOST = 20_000
"""Vectors that a mixture is fitted to."""
MOST_IMAGES = 5_000
"""Images that patches are taken from."""
_STRIDE = 5
"""Pixels from one patch of a photograph to the next."""


@dataclass(frozen=True)
class GroundConfig:
    """Which vectors, and how many Gaussians."""

    data: str = PATCHES
    """patches: 8x8x3 patches of scikit-learn's two photographs; or a named source, an image folder or a zip."""
    patch: int = 8
    """Side of the patches in pixels; 0 takes whole images."""
    axes: int = 96
    """Principal axes that are kept, fewer where the data have fewer."""
    components: int = 20
    """Gaussians of the mixture."""
    download: bool = False
    """Fetch a named source that is not on this machine."""
    channels: int | None = None
    """1 converts the images to grey, 3 to RGB."""
    resize: int | None = None
    """Bring all images to this size: shorter side, then a centre crop."""
    seed: int = 0
    """Of the choice of vectors, and of the fit."""

    def __post_init__(self) -> None:
        check_ranges(self, patch=(0, WIDTH[1]), axes=(2, WIDTH[1]), components=(1, 1000), seed=SEED)


@dataclass(frozen=True)
class Ground:
    """A mixture and what it was fitted to."""

    mixture: Mixture
    name: str
    """`patches@<hash of the mixture>`."""
    description: str


def make_ground(config: GroundConfig) -> Ground:
    """Fit the mixture. DataError for images that cannot be read or are too few; UsageError for unknown names."""
    images, name = _images(config)
    vectors = flattened(images, config)
    needed = max(10 * config.components, config.axes + 1)
    if len(vectors) < needed:
        raise DataError(
            f"{name} gives {len(vectors)} vectors",
            f"{config.components} Gaussians on {config.axes} axes need at least {needed}",
            "give more images, or fewer --components and --axes",
        )
    turned, share = principal(vectors, config.axes)
    with busy("fitting the mixture"):
        mixture = fit(turned, config.components, config.seed)
    source = "two photographs" if config.data == PATCHES else name
    side = f"{config.patch}x{config.patch}x{images[0].shape[1]} patches" if config.patch else "images"
    return Ground(
        mixture,
        f"{name}@{mixture.hash}",
        f"{len(mixture.weights)} Gaussians with full covariances, fitted to {len(vectors):,} {side} of {source}, "
        f"{vectors.shape[1]} numbers each, on their first {mixture.dim} principal axes ({100 * share:.2f} % of the variance), "
        f"standard deviation {STD} a number",
    )


def _images(config: GroundConfig) -> tuple[list[Images], str]:
    """Batches uint8 (N, C, H, W) of equal images, and their name."""
    if config.data == PATCHES:
        from sklearn.datasets import load_sample_images

        photographs = [torch.from_numpy(np.array(image)) for image in load_sample_images().images]
        return [image.movedim(2, 0)[None] for image in photographs], PATCHES
    data = load_images(config.data, download=config.download, channels=config.channels, resize=config.resize)
    return [data.images], data.name


def flattened(images: Sequence[Images], config: GroundConfig) -> Tensor:
    """At most `MOST` vectors float32 (M, C side^2), chosen by the seed. DataError for images smaller than a patch."""
    stride = _STRIDE if config.data == PATCHES else max(config.patch, 1)
    parts = []
    for batch in images:
        some = _chosen(batch, MOST_IMAGES if config.patch else MOST, config.seed)
        if config.patch > min(some.shape[2:]):
            height, width = some.shape[2:]
            raise DataError(
                f"images of {width}x{height} pixels", f"patches have a side of {config.patch}", "lower --patch"
            )
        pixels = to_float(some)
        if config.patch:
            pixels = pixels.unfold(2, config.patch, stride).unfold(3, config.patch, stride).movedim(1, 3).flatten(0, 2)
        parts.append(pixels.flatten(1))
    return _chosen(torch.cat(parts), MOST, config.seed)


def _chosen(rows: Images, most: int, seed: int) -> Tensor:
    """All rows, or `most` of them chosen by the seed, in their order."""
    if len(rows) <= most:
        return rows[:]
    return rows[randomness.permutation(seed, "ground", 0, len(rows))[:most].sort().values]


def principal(vectors: Tensor, axes: int) -> tuple[Tensor, float]:
    """Centred and scaled vectors on their first axes, (M, A <= axes) float64, and the share of the variance that these have.

    Directions without variance are left out. DataError where there is none at all.
    """
    centred = vectors.double() - vectors.double().mean(0)
    values, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    values, directions = values.flip(0), directions.flip(1)
    kept = min(axes, int((values > 1e-6 * values[0]).sum()))
    if kept < 2 or not values[0] > 0:
        raise DataError("these images are all alike", "they have no principal axes", "give images that differ")
    signs = directions[:, :kept].gather(0, directions[:, :kept].abs().argmax(0, keepdim=True)).sign()
    scale = STD / (values.sum() / len(values)).sqrt()
    return centred @ (directions[:, :kept] * signs) * scale, float(values[:kept].sum() / values.sum())


def fit(vectors: Tensor, components: int, seed: int) -> Mixture:
    """20 steps of expectation and maximisation from k-means++, in float32: the truth need not be the best fit."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(components, reg_covar=1e-5, max_iter=20, init_params="k-means++", random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(vectors.numpy().astype(np.float32))
    weights, means, covariances = (
        torch.from_numpy(np.asarray(found, np.float64)) for found in (model.weights_, model.means_, model.covariances_)
    )
    return Mixture.of(weights / weights.sum(), means, (covariances + covariances.mT) / 2)
