"""Mean and standard deviation of each channel of latents, streamed in float64.

Of n numbers with mean m and sum of squared deviations s, and n', m', s' more (Chan et al. 1983, equations 2.1 a and b):

    N = n + n'      M = m + (m' - m) n' / N      S = s + s' + (m' - m)^2 n n' / N      std = sqrt(S / (N - 1))

Unlike sums of squares they lose nothing where the mean is far from 0. The moments of every batch are found by themselves and
merged in the order of the batches, so that the result has the same bits whichever processes encoded which of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, DivergedError
from midway.gen.data.pixels import Images, in_parts
from midway.tokenizers.tokenizer import ImageTokenizer


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """Of `count` numbers in each of D channels: `mean` and sum of squared `deviations` from it, float64 (D,)."""

    count: int
    mean: Tensor
    deviations: Tensor

    @classmethod
    def none(cls, dim: int) -> "ChannelMoments":
        """Of no numbers."""
        return cls(0, *(torch.zeros(dim, dtype=torch.float64) for _ in range(2)))

    @classmethod
    def of(cls, raw: Tensor) -> "ChannelMoments":
        """Of latents (N, D, h, w) on the CPU."""
        if not raw.numel():
            return cls.none(raw.shape[1])
        rows = raw.double().transpose(0, 1).flatten(1)
        mean = rows.mean(1)
        return cls(rows.shape[1], mean, (rows - mean[:, None]).square().sum(1))

    def __add__(self, other: "ChannelMoments") -> "ChannelMoments":
        """Of both together."""
        if not other.count:
            return self
        share, apart = other.count / (self.count + other.count), other.mean - self.mean
        deviations = self.deviations + (other.deviations + apart.square() * self.count * share)
        return ChannelMoments(self.count + other.count, self.mean + apart * share, deviations)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and std (D,) float32; where all numbers are equal std is 0 but for rounding of the mean in float64."""
        return self.mean.float(), (self.deviations / max(self.count - 1, 1)).sqrt().float()

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, of which JSON keeps every bit."""
        return {"count": self.count, "mean": self.mean.tolist(), "deviations": self.deviations.tolist()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "ChannelMoments":
        """The inverse of `to_json`. KeyError, TypeError or ValueError for anything else."""
        mean, deviations = (torch.tensor(found[name], dtype=torch.float64) for name in ("mean", "deviations"))
        return cls(int(found["count"]), mean, deviations)


def merged(parts: Iterable[ChannelMoments], dim: int) -> ChannelMoments:
    """Of all parts, in their order."""
    return sum(parts, ChannelMoments.none(dim))


def give_statistics(tokenizer: ImageTokenizer, mean: Tensor, std: Tensor, images: Images) -> None:
    """`set_latent_statistics` of the latents of uint8 images (N, C, H, W).

    DivergedError if they are not finite. DataError for a channel that does not vary: of the images if one is constant there, or
    else of the latents.
    """
    try:
        tokenizer.set_latent_statistics(mean.to(tokenizer.device), std.to(tokenizer.device))
    except ValueError as error:
        what = "these latents cannot be standardised"
        if not bool((mean + std).isfinite().all()):
            fix = "its training diverged: train it again, at a lower --lr"
            raise DivergedError(what, f"the encoder's output is not finite: {error}", fix) from error
        constant = constant_channels(images)
        if not constant:
            fix = "train the tokenizer longer or with fewer channels of latents, or use other images"
            raise DataError(what, f"{error}, although every channel of the images varies", fix) from error
        fix = "use other images" if len(constant) == images.shape[1] else "use --channels 1, or other images"
        words = " and ".join(constant)
        why = f"{words} in every pixel of every image, and so the latents do not vary in every channel"
        raise DataError(what, why, f"{fix}; midway data check shows them") from error


def constant_channels(images: Images) -> list[str]:
    """The channels of uint8 images (N, C, H, W) with one value everywhere, in words: `channel 3 of 3 (blue) is 0`."""
    channels = images.shape[1]
    names = ("red", "green", "blue") if channels == 3 else ("grey",) * channels
    found: dict[int, int] | None = None
    for part in in_parts(images):
        by_channel = part.transpose(0, 1).flatten(1)
        if found is None:
            found = {i: int(values[0]) for i, values in enumerate(by_channel) if len(values)}
        found = {i: value for i, value in found.items() if bool((by_channel[i] == value).all())}
        if not found:
            break
    return [f"channel {i + 1} of {channels} ({names[i]}) is {value}" for i, value in (found or {}).items()]
