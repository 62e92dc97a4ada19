"""Known damage of real images, by which a metric is tested: does it answer?

    damage                       is what a generator does that                                                 required
    class means                  draws one picture per class                                                   20 x floor
    deviations x 0.5             has half the variety within classes                                           1.5 x
    half the classes missing     has lost classes: the first half, then the second, in turn                    1.5 x
    one class missing            has lost one class: each in turn                                              1.5 x
    50 images repeated           has memorised few images                                                      1.5 x
    blur 3x3                     has no fine detail: means over 3 x 3 pixels, edges repeated                   1.5 x
    noise 0.05                   leaves noise: standard deviation 0.05 of the range, rounded to 8 bits         1.5 x
    noise 0.02, shift of 1 pixel, JPEG 75                                                                      reported

The requirements are of the Fréchet distance. A damage is a function of held-out images alone: some change pixels, others choose
images. Where a damage leaves fewer images it is compared with as many undamaged ones, since distances depend on the count.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from midway.gen.core.randomness import normal
from midway.gen.features.reference import Subject

REPEATED = 50
"""Images of which a memorised set consists."""


def _same(subject: Subject) -> Tensor:
    return subject.pixels


def _all(labels: Tensor) -> list[Tensor]:
    return [torch.arange(len(labels))]


@dataclass(frozen=True)
class Damage:
    """`change` maps the images to others of the same shape; `choose` maps labels (N,) to sets of places, each a measurement."""

    name: str
    required: float | None = None
    """The least ratio to the floor that a Fréchet distance must reach; None: reported only."""
    change: Callable[[Subject], Tensor] = _same
    choose: Callable[[Tensor], list[Tensor]] = _all
    classes: int = 1
    """The number of classes from which on there is such a damage."""


def class_means(subject: Subject, share: float = 0.0) -> Tensor:
    """uint8: every image moved to the mean image of its class, but for `share` of its deviation; rounded."""
    x = subject.pixels.float()
    classes, members = subject.labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), *x.shape[1:]).index_add_(0, members, x)
    means = (sums / torch.bincount(members).view(-1, 1, 1, 1))[members]
    return _to_uint8(means + share * (x - means))


def half_deviations(subject: Subject) -> Tensor:
    """uint8: half of every deviation from the class mean is gone."""
    return class_means(subject, 0.5)


def blurred(subject: Subject) -> Tensor:
    """uint8: means over 3 x 3 pixels, edges repeated."""
    return _to_uint8(F.avg_pool2d(F.pad(subject.pixels.float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1))


def noisy(sigma: float) -> Callable[[Subject], Tensor]:
    """Gaussian noise of standard deviation 255 sigma, the same for an image wherever it is; rounded and clipped."""

    def change(subject: Subject) -> Tensor:
        noise = normal(0, "damage", 0, subject.places, subject.pixels.shape[1:])
        return _to_uint8(subject.pixels.float() + 255 * sigma * noise)

    return change


def shifted(subject: Subject) -> Tensor:
    """Every image one pixel to the right, its first column twice."""
    return torch.cat([subject.pixels[..., :1], subject.pixels[..., :-1]], dim=-1)


def compressed(subject: Subject) -> Tensor:
    """Every image through JPEG of quality 75."""
    return torch.stack([_jpeg(image, 75) for image in subject.pixels])


def without_half(labels: Tensor) -> list[Tensor]:
    """Places of the images that remain without the first, and without the second, half of the classes."""
    classes = labels.unique()
    return [_places(torch.isin(labels, half)) for half in (classes[len(classes) // 2 :], classes[: len(classes) // 2])]


def without_one(labels: Tensor) -> list[Tensor]:
    """Places of the images that remain without each class in turn."""
    return [_places(labels != left_out) for left_out in labels.unique()]


def repeated(labels: Tensor) -> list[Tensor]:
    """The first 50 places over and over, as many as there are images."""
    return [torch.arange(len(labels)) % REPEATED]


def undamaged(count: int, chosen: list[Tensor]) -> list[Tensor]:
    """For each set of places the same number of all `count` places: what a run of them, another for each set, leaves."""
    step = count // max(1, len(chosen))
    order = [torch.arange(count).roll(-i * step) for i in range(len(chosen))]
    return [places[count - len(its) :] for places, its in zip(order, chosen, strict=True)]


DAMAGES = (
    Damage("class means", 20.0, class_means),
    Damage("deviations x 0.5", 1.5, half_deviations),
    Damage("half the classes missing", 1.5, choose=without_half, classes=2),
    Damage("one class missing", 1.5, choose=without_one, classes=2),
    Damage(f"{REPEATED} images repeated", 1.5, choose=repeated),
    Damage("blur 3x3", 1.5, blurred),
    Damage("noise 0.05", 1.5, noisy(0.05)),
    Damage("noise 0.02", None, noisy(0.02)),
    Damage("shift of 1 pixel", None, shifted),
    Damage("JPEG 75", None, compressed),
)


def _places(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


def _to_uint8(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


def _jpeg(image: Tensor, quality: int) -> Tensor:
    """uint8 (C, H, W) of an image (1 or 3, H, W)."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).view(*image.shape[1:], len(image)).permute(2, 0, 1)
