"""How good a tokenizer is: errors of its reconstructions, use of its codes, shape of its latents, what a latent model can expect.

Reconstructions are rounded to 8 bits; PSNR and SSIM as in reconstruction.py. Beside them, on the same n held-out images:

    reconstruction distance   Fréchet distance of the n reconstructions to all training images. The sampling sweep measures its
                              samples in the same way, so that at the same n the two can be compared
    interpolated distance     the same of decode(slerp(y_i, y_j, 1/2)): y standardised latents, y_j the one of the other n - 1 of
                              least angle to y_i (iFID, arXiv 2603.05630; its code takes the neighbour among training images)
    noise curve               PSNR of decode(latent + sigma std_d noise), with and without snapping to codes: few solver steps
                              leave such noise, and snapping removes what is below half a cell
    entropy bits per image    tokens sum_g H_g / ln 2, H_g the entropy of group g's code frequencies: what an entropy coder that
                              knows no context would spend (too little where tokens are few for K)
    rate of a posterior       mean KL(posterior || prior) / ln 2 bits per image, what bits-back coding spends (Hinton and van Camp
                              1993); its distortion is `psnr_sampled`, of draws from the posterior
    effective rank            exp(H(s / sum s)), s the singular values of centred vectors (Roy and Vetterli 2007)
    stable rank               sum s^2 / max s^2

Ranks are of the codes as used, each as often as it occurs, and of the latents, over all images and positions. 10^5 tokens cannot
use 10^6 codes, so `dead` has to be read beside `counted`.

Every image draws by its own seed, its place among the held-out images; batches change nothing beyond rounding in the networks.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, DivergedError, UsageError
from midway.gen.core.randomness import normal
from midway.gen.data.images import ImageData, to_float, to_uint8
from midway.gen.data.pixels import Images
from midway.gen.evaluation.tokenizer_records import TokenizerRow, figures_of
from midway.gen.features.reference import FeatureReference, Subject, balanced_subject
from midway.gen.metrics.code_usage import CodeCounter
from midway.gen.metrics.latent_rank import channel_moments, interpolated, moments
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.metrics.psnr_ssim import mse, psnr, ssim
from midway.gen.progress.bar import reported
from midway.tokenizers.kl import KL, gaussian_kl
from midway.tokenizers.memory import images_at_once
from midway.tokenizers.tokenizer import ImageTokenizer

SHOWN = 10  # images shown of every tokenizer: with ten classes, one of each


@dataclass(frozen=True)
class EvaluationConfig:
    """What to measure: `n` held-out images (None: all), sigmas of the `noise` in units of each channel's standard deviation."""

    n: int | None = None
    batch_size: int | None = None
    """Images at once; by memory if it is None."""
    noise: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    seed: int = 0


@dataclass(frozen=True)
class TokenizerResult:
    """A row, and what is plotted and shown of it: `frequencies`, None without codes; the first images, uint8, on the CPU."""

    row: TokenizerRow
    frequencies: Tensor | None
    reconstructions: Tensor
    interpolations: Tensor | None


@dataclass(frozen=True)
class Instruments:
    """What measures images: a feature network with its reference and the floor, and LPIPS; each may be missing."""

    reference: FeatureReference | None = None
    floor: float | None = None
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    perceptual_name: str | None = None


def choose(held_out: ImageData, config: EvaluationConfig) -> Subject:
    """The first n images in an order balanced over classes. UsageError for flags that cannot be used."""
    available = len(held_out.images)
    n = available if config.n is None else config.n
    if not 2 <= n <= available:
        raise UsageError(f"--n {n}", f"2 to {available} images are held out", "choose a number among these")
    if config.batch_size is not None and config.batch_size < 1:
        raise UsageError(f"--batch-size {config.batch_size}", "a batch has images", "raise it")
    if not all(0 <= sigma < math.inf for sigma in config.noise):
        raise UsageError(f"--noise {' '.join(map(str, config.noise))}", "sigma is finite and >= 0", "correct the list")
    return balanced_subject(held_out, n)


def check_size(name: str, tokenizer: ImageTokenizer, images: Images, named: bool = False) -> None:
    """DataError unless the tokenizer takes these images, its own or those that are `named` on the command line."""
    channels, side, _ = tokenizer.image_shape
    if tokenizer.image_shape != tuple(images.shape[1:]):
        own = "train the tokenizer again, or give it back the data it was trained on"
        raise DataError(
            f"{name} takes {tokenizer.image_shape} images",
            f"{'--data gives' if named else 'its data now give'} {tuple(images.shape[1:])}",
            f"pass --channels {channels} --resize {side}" if named else own,
        )


# ---- the measurement ----


@dataclass
class _Gathered:
    """What one pass over the images leaves, in their order."""

    counter: CodeCounter | None
    scores: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    latents: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    shown: list[Tensor] = field(default_factory=list)
    codes: FeatureStatistics | None = None
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0

    def collect(self, images: Tensor, reference: FeatureReference | None) -> None:
        """Features of uint8 images, if there is a network, and the first of them to be shown."""
        if reference is not None:
            self.features.append(reference.activations(images).features.cpu())
        if sum(map(len, self.shown)) < SHOWN:
            self.shown.append(images)

    def distance(self, reference: FeatureReference | None) -> float | None:
        return None if reference is None else reference.distance_of(torch.cat(self.features))


@torch.no_grad()
def measure(
    name: str, tokenizer: ImageTokenizer, subject: Subject, instruments: Instruments, config: EvaluationConfig
) -> TokenizerResult:
    """Everything about one tokenizer in evaluation mode. DivergedError if it decodes to values that are not finite."""
    size = config.batch_size or images_at_once(tokenizer)
    found, reference = _reconstruct(name, tokenizer, subject, instruments, config.seed, size), instruments.reference
    latents = torch.cat(found.latents)
    means = {score: torch.cat(values).mean().item() for score, values in found.scores.items()}
    curves = _noise_curves(name, tokenizer, latents, subject, config, size)
    between = _Gathered(None)
    if reference is not None:
        for part in interpolated(latents).split(size):
            between.collect(_decode_raw(name, tokenizer, part, tokenizer.snap_on_decode), reference)
    use = None if found.counter is None else found.counter.use()
    row = TokenizerRow(
        **figures_of(name, tokenizer, use, found.codes, latents),
        mse=means["mse"],
        psnr=means["psnr"],
        ssim=means["ssim"],
        lpips=means.get("lpips"),
        psnr_sampled=means.get("psnr_sampled"),
        distance=found.distance(reference),
        interpolated=between.distance(reference),
        floor=instruments.floor,
        rate=means["kl"] / math.log(2) if "kl" in means else None,
        noise=config.noise,
        psnr_noisy=curves[False],
        psnr_snapped=curves.get(True),
        encode_seconds=1000 * found.encode_seconds / len(latents),
        decode_seconds=1000 * found.decode_seconds / len(latents),
        n=len(subject.images),
        seed=config.seed,
        images=subject.name,
        features=None if reference is None else reference.features,
        reference=None if reference is None else reference.name,
        perceptual=instruments.perceptual_name,
    )
    shown = torch.cat(between.shown)[:SHOWN] if between.shown else None
    return TokenizerResult(row, None if use is None else use.frequencies, torch.cat(found.shown)[:SHOWN], shown)


def _reconstruct(
    name: str, tokenizer: ImageTokenizer, subject: Subject, instruments: Instruments, seed: int, size: int
) -> _Gathered:
    """Encode and decode every image once, `size` at a time."""
    quantizer = tokenizer.quantizer
    found = _Gathered(
        None if quantizer.codebook_size is None else CodeCounter(quantizer.codebook_size, quantizer.groups)
    )
    first = to_float(subject.images[:size].to(tokenizer.device))
    tokenizer.decode(quantizer(tokenizer.encode(first)).codes)  # what only the first batch costs is not timed
    for part, ids in _batches(subject, size):
        x = to_float(part.to(tokenizer.device))
        started = _now(tokenizer)
        z = tokenizer.encode(x)
        quantized = quantizer(z)
        encoded = _now(tokenizer)
        decoded = tokenizer.decode(quantized.codes)
        found.decode_seconds += _now(tokenizer) - encoded
        found.encode_seconds += encoded - started
        shown = _to_8_bits(name, decoded)
        found.collect(shown, instruments.reference)
        scores = {"mse": mse(part, shown), "psnr": psnr(part, shown), "ssim": ssim(part, shown)}
        if instruments.perceptual is not None:
            scores["lpips"] = instruments.perceptual(to_float(shown.to(tokenizer.device)), x)
        if isinstance(quantizer, KL):  # in nats, and the PSNR of a draw
            draw = quantizer(z, normal(seed, "posterior", 0, ids, tokenizer.noise_shape).to(z.device)).codes
            scores["kl"] = gaussian_kl(*quantizer.moments(z))
            scores["psnr_sampled"] = psnr(part, _to_8_bits(name, tokenizer.decode(draw)))
        for score, values in scores.items():
            found.scores[score].append(values.double().cpu())
        if found.counter is not None:
            found.counter.add(quantized)
            statistics = moments(quantized.codes)
            found.codes = statistics if found.codes is None else found.codes + statistics
        # as `raw_latents`, without encoding again
        found.latents.append((quantized.codes if tokenizer.latent_space == "post" else quantizer.latents(z)).cpu())
    return found


def _batches(subject: Subject, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    parts = reported(subject.images.split(size), "reconstructing", len(subject.images))
    return zip(parts, subject.places.split(size), strict=True)


def _now(tokenizer: ImageTokenizer) -> float:
    """Seconds, after the device has finished its queue."""
    if tokenizer.device.type == "cuda":
        torch.cuda.synchronize(tokenizer.device)
    return time.perf_counter()


def _to_8_bits(name: str, decoded: Tensor) -> Tensor:
    """Rounded to uint8 on the CPU."""
    if not bool(torch.isfinite(decoded).all()):
        raise DivergedError(f"{name} decodes to NaN or infinity", "its training diverged", "train it again")
    return to_uint8(decoded).cpu()


def _decode_raw(name: str, tokenizer: ImageTokenizer, latents: Tensor, snap: bool) -> Tensor:
    """Raw latents (B, D, *S) on any device -> images, uint8 on the CPU."""
    latents = latents.to(tokenizer.device)
    return _to_8_bits(name, tokenizer.decode(tokenizer.quantizer.snap(latents) if snap else latents))


def _noise_curves(
    name: str, tokenizer: ImageTokenizer, latents: Tensor, subject: Subject, config: EvaluationConfig, size: int
) -> dict[bool, tuple[float, ...]]:
    """PSNR at every sigma, by whether latents were snapped: only where there are codes and samples are snapped to them."""
    snaps = [False] + [True] * (tokenizer.snap_on_decode and tokenizer.quantizer.codebook_size is not None)
    scores: dict[tuple[bool, float], list[Tensor]] = {(snap, sigma): [] for snap in snaps for sigma in config.noise}
    std = channel_moments(latents)[1].float().view(1, -1, 1, 1)
    for raw, (part, ids) in zip(latents.split(size), _batches(subject, size), strict=True):
        noise = std * normal(config.seed, "decode noise", 0, ids, raw.shape[1:])
        for (snap, sigma), found in scores.items():
            found.append(psnr(part, _decode_raw(name, tokenizer, raw + sigma * noise, snap)))
    return {snap: tuple(torch.cat(scores[snap, sigma]).mean().item() for sigma in config.noise) for snap in snaps}
