"""The objective of a tokenizer: the error of the reconstruction plus the weighted losses of the quantizer.

    loss = pixel error + perceptual LPIPS(x', x) + weight lambda L_gen(D(x')) + quantizer losses       x' = reconstruction of x

Terms with weight 0 are not computed (`LossConfig`); the discriminator D has its own loss in the same step (gan.py).
"""

import torch
from torch import Tensor, nn

from midway.gen.data.images import to_float, to_uint8
from midway.gen.data.pixels import Images
from midway.gen.metrics.psnr_ssim import mse, psnr
from midway.gen.progress.bar import reported
from midway.gen.tokenizer.gan import Adversary
from midway.gen.tokenizer.loss_config import LossConfig
from midway.gen.training.batches import Context, ImageBatch
from midway.tokenizers.base import bits_per_image, perplexity, usage
from midway.tokenizers.fsq import FSQ, saturation
from midway.tokenizers.losses import mean, pixel_loss
from midway.tokenizers.memory import images_at_once
from midway.tokenizers.perceptual import Perceptual
from midway.tokenizers.tokenizer import ImageTokenizer


class TokenizerObjective(nn.Module):
    """`loss` for fit() around an ImageTokenizer; with `flip` each image is mirrored left-right with probability 1/2."""

    def __init__(self, tokenizer: ImageTokenizer, flip: bool = False, losses: LossConfig | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.flip = flip
        self.losses = losses or LossConfig()
        self.perceptual, self.adversary = None, None
        if self.losses.perceptual:
            self.perceptual = Perceptual(self.losses.perceptual_net, self.losses.perceptual_weights)
            self.perceptual.check_size(tokenizer.image_shape[1])
        if self.losses.adversary != "none":
            channels, size, _ = tokenizer.image_shape
            self.adversary = Adversary(self.losses, channels, size)
        self.discriminator_prefix = "" if self.adversary is None else "adversary."
        self.discriminator_rate = self.losses.critic_rate

    def start(self, batch: ImageBatch, context: Context) -> None:
        """A codebook begins at the encoder's vectors of the first images, which are the same on every process."""
        self.tokenizer.start(self._images(batch, context))

    def loss(self, batch: ImageBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, with the discriminator's loss if there is one; logs the parts, mse in [-1, 1] units always."""
        images = self._images(batch, context)
        shape = self.tokenizer.noise_shape
        out = self.tokenizer(images, context.normal("posterior", shape) if shape[0] else None)
        if self.training:
            self.tokenizer.observe(out.quantized)
        loss, logs = self._error(out.reconstruction, images)
        logs |= {**out.quantized.losses, **batch_codes(out.quantized.indices, out.quantized.counts)}
        if isinstance(self.tokenizer.quantizer, FSQ):  # its gradients vanish near the ends of the bound
            logs |= saturation(self.tokenizer.quantizer, out.z)
        if self.adversary is not None:
            terms = self.adversary.terms(out.reconstruction, images, loss, self.tokenizer.last_layer, context)
            loss, logs = loss + terms.generator + terms.discriminator, {**logs, **terms.logs}
        return loss + out.quantized.loss, logs

    def _error(self, reconstruction: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The error of a reconstruction, and its parts."""
        loss = pixel_loss(reconstruction, images, self.losses.pixel)
        mse = loss if self.losses.pixel == "l2" else pixel_loss(reconstruction, images, "l2")
        logs = {"mse": mse} if mse is loss else {"mse": mse, self.losses.pixel: loss}
        if self.perceptual is not None:
            logs["lpips"] = mean(self.perceptual(reconstruction, images))
            loss = loss + self.losses.perceptual * logs["lpips"]
        return loss, logs

    def after_step(self, step_ok: Tensor) -> None:
        """Codebook statistics are applied once per optimizer step; those of a skipped one (`step_ok` False) never."""
        self.tokenizer.update(step_ok)
        if self.adversary is not None:
            self.adversary.update(step_ok)

    def _images(self, batch: ImageBatch, context: Context) -> Tensor:
        """float32 (B, C, H, W) in [-1, 1], mirrored by a draw per sample."""
        images = batch.images
        return to_float(context.either(images, images.flip(-1), "flip") if self.flip else images)


def batch_codes(indices: Tensor | None, counts: Tensor | None) -> dict[str, Tensor]:
    """How many codes one micro-batch used, and their perplexity, without leaving the device: shows a collapse as it happens.

    With several groups the mean; both 0 without tokens. Summed over tokens, of which there are fewer than codes in a large
    codebook.
    """
    if indices is None or counts is None:
        return {}
    if not indices.numel():
        return dict.fromkeys(("batch_codes", "batch_perplexity"), torch.zeros((), device=counts.device))
    by_group = counts.view(-1, counts.shape[-1])
    tokens = indices.reshape(-1, len(by_group)).T
    shared = by_group.gather(1, tokens).float()  # by how many tokens the code of each token is used
    perplexity = tokens.shape[1] / shared.log().mean(1).exp()
    return {"batch_codes": shared.reciprocal().sum(1).mean(), "batch_perplexity": perplexity.mean()}


@torch.no_grad()
def reconstruct(tokenizer: ImageTokenizer, images: Tensor, batch_size: int | None = None) -> Tensor:
    """uint8 (N, C, H, W) -> reconstructions, uint8 on the CPU; `batch_size` by memory if it is None."""
    device = tokenizer.device
    parts = [
        tokenizer(to_float(part.to(device))).reconstruction
        for part in images.split(batch_size or images_at_once(tokenizer))
    ]
    return torch.cat([to_uint8(part).cpu() for part in parts])


@torch.no_grad()
def evaluate_tokenizer(tokenizer: ImageTokenizer, images: Images, batch_size: int | None = None) -> dict[str, float]:
    """Means over uint8 images of mse and psnr of their 8-bit reconstruction; usage, perplexity and bits_per_image of codes.

    `batch_size` by memory if it is None."""
    errors, quality, counts, start = *torch.empty(2, len(images), dtype=torch.float64), None, 0
    parts = images.split(batch_size or images_at_once(tokenizer))
    for part in reported(parts, "reconstructing held-out images:", len(images)):
        out = tokenizer(to_float(part.to(tokenizer.device)))
        shown = to_uint8(out.reconstruction).cpu()
        # in place: small results kept between large ones would split the heap, and memory would grow with every batch
        errors[start : start + len(part)], quality[start : start + len(part)] = mse(part, shown), psnr(part, shown)
        start += len(part)
        found = out.quantized.counts
        counts = found if counts is None or found is None else counts + found
    report = {"mse": errors.mean().item(), "psnr": quality.mean().item()}
    size = tokenizer.quantizer.codebook_size
    if size is None:
        return report
    if counts is not None:
        report |= {"usage": usage(counts), "perplexity": perplexity(counts)}
    return report | {"bits_per_image": bits_per_image(tokenizer.tokens * tokenizer.quantizer.groups, size)}
