"""The batch of a training step, the order of the items, and the source of randomness.

Every draw of step s is a function of (seed, s, global position of the sample), so that neither the number of processes nor
accumulation nor a restart changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from midway.gen.core import randomness


@dataclass(frozen=True)
class ImageBatch:
    """images uint8 (B, C, H, W), labels int64 (B,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class LatentBatch:
    """Standardised latents float32 (B, C, H, W), labels int64 (B,), and the noise of each like latents, where pairs fix it.

    noise None: it is drawn for the step. features: a teacher's map float32 (B, C', h, w), where tokens are aligned with one.
    """

    latents: Tensor
    labels: Tensor
    noise: Tensor | None = None
    features: Tensor | None = None


@dataclass(frozen=True)
class CodeBatch:
    """Codes as tokens of digits (gen/priors/layout.py): tokens int64 (B, L, D), labels int64 (B,)."""

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Context:
    """Randomness of a step, a function of (seed, step, global position of each sample); sample_ids int64 (B,)."""

    seed: int
    step: int
    sample_ids: Tensor

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """float64 (B, *shape) on (0, 1), one independent set per purpose."""
        return randomness.uniform(self.seed, purpose, self.step, self.sample_ids, shape)

    def uniforms(self, *purposes: str) -> list[Tensor]:
        """`uniform` of each purpose, float64 (B,)."""
        return randomness.uniforms(self.seed, purposes, self.step, self.sample_ids)

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """float32 (B, *shape), standard normal."""
        return randomness.normal(self.seed, purpose, self.step, self.sample_ids, shape)

    def keep(self, purpose: str, shape: Sequence[int], probability: float) -> Tensor:
        """bool (B, *shape), each True with `probability` in (0, 1]."""
        return randomness.keep(self.seed, purpose, self.step, self.sample_ids, shape, probability)

    def either(self, a: Tensor, b: Tensor, purpose: str) -> Tensor:
        """For each sample of (B, *) the one of `a` or, with probability 1/2, that of `b`."""
        other = self.uniform(purpose) < 0.5
        return torch.where(other.view(-1, *[1] * (a.dim() - 1)), b, a)


@dataclass(frozen=True)
class RandomCrop:
    """`augment` of `Items`: a window of `size` x `size` pixels of each image, all places equally likely; labels stay."""

    size: int

    def __call__(self, batch: ImageBatch, context: Context) -> ImageBatch:
        """Rows top .. top + size - 1 with top = floor(u (H - size + 1)), u uniform by (seed, step, position); columns alike."""
        images, size = batch.images, self.size
        places = torch.tensor([side - size + 1 for side in images.shape[-2:]], device=images.device)
        top, left = (context.uniform("crop", (2,)) * places).long().unbind(1)
        windows = images.unfold(2, size, 1).unfold(3, size, 1)  # a view (B, C, H - size + 1, W - size + 1, size, size)
        return replace(
            batch, images=windows[torch.arange(len(images), device=images.device), :, top, left].contiguous()
        )


@dataclass
class Order:
    """Item indices of stream positions; caches the permutations of the epochs in use."""

    size: int
    seed: int
    epochs: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, start: int, count: int) -> Tensor:
        """int64 (count,): the items at positions start .. start + count - 1."""
        epochs = range(start // self.size, (start + count - 1) // self.size + 1)
        self.epochs = {e: self.epochs[e] if e in self.epochs else self._permutation(e) for e in epochs}
        first = start - epochs[0] * self.size
        table = self.epochs[epochs[0]] if len(epochs) == 1 else torch.cat([self.epochs[e] for e in epochs])
        return table[first : first + count]

    def _permutation(self, epoch: int) -> Tensor:
        return randomness.permutation(self.seed, "order", epoch, self.size)


def seed_global(seed: int, start: int, device: torch.device) -> None:
    """Fix torch's own generators, for modules that draw from them; ours never do."""
    word = randomness.integer(seed, "global", start)
    torch.default_generator.manual_seed(word)  # torch.manual_seed queries every kind of device, which takes 0.2 ms
    if device.type == "cuda":
        torch.cuda.manual_seed(word)
