"""The discriminator of a tokenizer's adversarial loss, trained in the same optimizer step.

    tokenizer minimises        L_rec + weight lambda L_gen(D(x'))           x' = reconstruction of x
    discriminator minimises    L_D(D(x), D(sg[x'])) + r1 R1 + gradient_penalty GP + lecam R_LC

Both are one loss: the first holds the parameters of D fixed, the second takes images without a gradient, so one backward pass
gives each its own gradient, at the same parameters. The tokenizer therefore runs once a step, and fit() treats both as one
loss when resuming, accumulating and skipping steps. Nothing is added before step `adversary_start`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from midway.gen.tokenizer.loss_config import LossConfig
from midway.gen.training.batches import Context
from midway.tokenizers.adversarial import (
    AdaptiveWeight,
    Kind,
    LeCamAverages,
    discriminator_loss,
    frozen,
    generator_loss,
    gradient_penalty,
    lecam,
    r1_penalty,
)
from midway.tokenizers.discriminator import PatchDiscriminator
from midway.tokenizers.losses import mean


@dataclass(frozen=True)
class GANTerms:
    """The term added to the tokenizer's loss, the discriminator's loss, and logs: pairs (sum, count), see progress.Averages."""

    generator: Tensor
    discriminator: Tensor
    logs: dict[str, Tensor]


class Adversary(nn.Module):
    """The discriminator of images (B, channels, size, size), and its running quantities."""

    def __init__(self, config: LossConfig, channels: int, image_size: int) -> None:
        super().__init__()
        if config.adversary == "none":
            raise ValueError("loss.adversary is none: choose hinge, say")
        self.config = config
        self.kind: Kind = config.adversary
        self.discriminator = PatchDiscriminator(
            channels, config.critic_width, config.critic_layers, config.spectral_norm
        )
        self.discriminator.check_size(image_size)
        self.averages = LeCamAverages() if config.lecam else None
        self.adaptive = AdaptiveWeight() if config.adaptive else None

    def terms(self, reconstruction: Tensor, images: Tensor, error: Tensor, last: Tensor, context: Context) -> GANTerms:
        """`error`: the tokenizer's loss of the reconstruction, of which `last` is the decoder's last layer."""
        if context.step < self.config.adversary_start:
            nothing = error.new_zeros(())
            return GANTerms(nothing, nothing, {name: error.new_zeros(2) for name in self._names()})
        gain = generator_loss(frozen(self.discriminator)(reconstruction), self.kind)
        weight = self.config.adversary_weight * self._ratio(error, gain, last, len(images))
        own, parts = self._discriminator_loss(reconstruction.detach(), images, context)
        logs = {"generator": gain, "critic": own, **parts}
        if self.adaptive is not None:
            logs["adaptive_weight"] = self.adaptive.value.clone()
        return GANTerms(weight * gain, own, {name: _once(value) for name, value in logs.items()})

    def update(self, step_ok: Tensor) -> None:
        """Once per optimizer step, on every process."""
        self.discriminator.update(step_ok)
        for part in (self.averages, self.adaptive):
            if part is not None:
                part.update(step_ok)

    def _ratio(self, error: Tensor, gain: Tensor, last: Tensor, samples: int) -> Tensor | float:
        if self.adaptive is None:
            return 1.0
        if torch.is_grad_enabled():
            self.adaptive.measure(error, gain, last, weight=float(samples > 0))
        return self.adaptive.value.clone()

    def _discriminator_loss(self, fake: Tensor, real: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts unweighted."""
        config = self.config
        on_real, on_fake = self.discriminator(real), self.discriminator(fake)
        loss = discriminator_loss(on_real, on_fake, self.kind)
        parts = {"real_logits": mean(on_real.float()), "fake_logits": mean(on_fake.float())}
        weighted: dict[str, float] = {}
        if config.r1:
            parts["r1"], weighted["r1"] = r1_penalty(self.discriminator, real), config.r1
        if config.gradient_penalty:
            mix = context.uniform("mix").to(real.dtype)
            parts["gradient_penalty"] = gradient_penalty(self.discriminator, real, fake, mix)
            weighted["gradient_penalty"] = config.gradient_penalty
        if self.averages is not None:
            parts["lecam"] = lecam(on_real, on_fake, self.averages.real, self.averages.fake)
            weighted["lecam"] = config.lecam
            self.averages.gather(on_real, on_fake)
        return loss + sum(weight * parts[name] for name, weight in weighted.items()), parts

    def _names(self) -> list[str]:
        """Names of the logs."""
        options = {"r1": self.config.r1, "gradient_penalty": self.config.gradient_penalty, "lecam": self.averages}
        own = [name for name, used in options.items() if used]
        return [
            "generator",
            "critic",
            "real_logits",
            "fake_logits",
            *own,
            *(["adaptive_weight"] if self.adaptive else []),
        ]


def _once(value: Tensor) -> Tensor:
    """(value, 1)."""
    value = value.detach().float()
    return torch.stack([value, torch.ones_like(value)])
