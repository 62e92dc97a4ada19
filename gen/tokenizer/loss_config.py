"""Configuration of a tokenizer's losses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from midway.gen.core.ranges import LAYERS, POSITIVE, WEIGHT, WIDTH, check_ranges
from midway.tokenizers.losses import Pixel

Adversary = Literal["none", "hinge", "non_saturating", "wasserstein"]


@dataclass(frozen=True)
class LossConfig:
    """Losses of the reconstruction, beside those of the quantizer."""

    pixel: Pixel = "l2"
    """Mean error of a pixel in [-1, 1]: l1, l2 (squared) or charbonnier (sqrt(d^2 + 1e-6))."""
    perceptual: float = 0.0
    """Weight of LPIPS (0: off). Its network's weights are downloaded unless --loss.perceptual-weights has them."""
    perceptual_net: Literal["vgg", "alex"] = "vgg"
    """Network of LPIPS."""
    perceptual_weights: Path | None = None
    """torchvision's file of that network's weights, or the same as safetensors."""
    adversary: Adversary = "none"
    """Adversarial loss, against a patch discriminator."""
    adversary_weight: float = 0.1
    """Weight of the adversarial loss."""
    adaptive: bool = False
    """Multiply that weight by the ratio of both gradients at the decoder's last layer (VQGAN)."""
    adversary_start: int = 0
    """The optimizer step from which it is added."""
    critic_width: int = 64
    """Channels of the discriminator's first layer."""
    critic_layers: int = 2
    """Halvings of the resolution."""
    critic_rate: float = 1.0
    """Its learning rate, as a multiple of the tokenizer's."""
    spectral_norm: bool = False
    """Divide each of its layers by its largest singular value."""
    r1: float = 0.0
    """Weight of its squared gradient at real images."""
    gradient_penalty: float = 0.0
    """Weight of (|gradient| - 1)^2 between real images and reconstructions (WGAN-GP)."""
    lecam: float = 0.0
    """Weight of its distance to running means of its outputs (LeCam)."""

    def __post_init__(self) -> None:
        weights = ("perceptual", "adversary_weight", "adversary_start", "r1", "gradient_penalty", "lecam")
        for name in weights:
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name} must not be negative, got {getattr(self, name)}")
        if not self.critic_rate > 0:
            raise ValueError(f"loss.critic_rate must be positive, got {self.critic_rate}")
        unused = [name for name, used in _critic_options(self).items() if used and self.adversary == "none"]
        if unused:
            raise ValueError(
                f"loss.{unused[0]} is an option of the discriminator (critic); choose loss.adversary, hinge say"
            )
        if self.adversary == "wasserstein" and not (self.gradient_penalty or self.spectral_norm):
            raise ValueError(
                "a wasserstein discriminator must be Lipschitz: give loss.gradient_penalty 10 or spectral_norm"
            )
        if self.perceptual_weights is not None and not self.perceptual:
            raise ValueError("loss.perceptual_weights is given but loss.perceptual is 0: give it a weight, 1 say")
        check_ranges(self, critic_width=WIDTH, critic_layers=LAYERS, critic_rate=POSITIVE, perceptual=WEIGHT)
        check_ranges(self, adversary_weight=WEIGHT, r1=WEIGHT, gradient_penalty=WEIGHT, lecam=WEIGHT)


def described(config: LossConfig, perceptual: str = "lpips") -> tuple[str, ...]:
    """The losses with their weights, for people; `perceptual` names the network of LPIPS."""
    parts = {config.pixel: 1.0, perceptual: config.perceptual}
    if config.adversary != "none":
        parts |= {config.adversary: config.adversary_weight, "r1": config.r1, "lecam": config.lecam}
        parts["gradient penalty"] = config.gradient_penalty
    named = [f"{name} {weight:g}" for name, weight in parts.items() if weight]
    switches = {"adaptive weight": config.adaptive, "spectral norm": config.spectral_norm}
    return (*named, *(name for name, used in switches.items() if used))


def _critic_options(config: LossConfig) -> dict[str, bool]:
    """Whether each option of the discriminator is set."""
    own = {name: getattr(config, name) > 0 for name in ("adversary_start", "r1", "gradient_penalty", "lecam")}
    return {**own, "adaptive": config.adaptive, "spectral_norm": config.spectral_norm}
