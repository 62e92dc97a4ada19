"""One line of a comparison of tokenizers, and the figures in it that need no image: size, use of codes, ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from midway.gen.metrics.code_usage import CodeUse
from midway.gen.metrics.latent_rank import moments, ranks
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.tokenizer.stored import tokenizer_hash
from midway.tokenizers.base import bits_per_image
from midway.tokenizers.tokenizer import ImageTokenizer


@dataclass(frozen=True)
class TokenizerRow:
    """All figures of one tokenizer, and the protocol they were measured by. None: undefined here, or not requested.

    `codebook` is K of each of `groups` codes a position; `used` and `dead` are of all groups together, `counted` the tokens of
    one; `perplexity` is the mean over groups. Seconds are for 1000 images, encoding with quantization. `noise` are the sigmas of
    `psnr_noisy` (latents decoded as they are) and `psnr_snapped` (snapped first).
    """

    name: str
    tokenizer: str
    quantizer: str
    parameters: int
    latent_shape: str
    tokens: int
    groups: int
    codebook: int | None
    mse: float
    psnr: float
    ssim: float
    lpips: float | None
    distance: float | None
    interpolated: float | None
    floor: float | None
    usage: float | None
    used: int | None
    dead: int | None
    counted: int | None
    perplexity: float | None
    bits: float | None
    entropy_bits: float | None
    rate: float | None
    psnr_sampled: float | None
    code_rank: float | None
    code_stable_rank: float | None
    latent_rank: float
    latent_stable_rank: float
    noise: tuple[float, ...]
    psnr_noisy: tuple[float, ...]
    psnr_snapped: tuple[float, ...] | None
    encode_seconds: float
    decode_seconds: float
    n: int
    seed: int
    images: str
    features: str | None
    reference: str | None
    perceptual: str | None


def description(config: Mapping[str, Any]) -> str:
    """A quantizer's configuration in a line: `fsq levels 8,5,5,5`, `residual base (vq codebook_size 256, dim 8), depth 4`."""
    options = [f"{key} {_words(value)}" for key, value in config.items() if key != "type"]
    return f"{config['type']} {', '.join(options)}".rstrip()


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({description(value)})"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def figures_of(
    name: str, tokenizer: ImageTokenizer, use: CodeUse | None, codes: FeatureStatistics | None, latents: Tensor
) -> dict[str, Any]:
    """Size, use of codes and ranks, by the fields of `TokenizerRow`; `codes`: moments of the codes as used."""
    quantizer, perplexities = tokenizer.quantizer, [] if use is None else use.perplexities
    code, code_stable = (None, None) if codes is None else ranks(codes)
    latent, latent_stable = ranks(moments(latents))
    return {
        "name": name,
        "tokenizer": tokenizer_hash(tokenizer),
        "quantizer": description(tokenizer.config["quantizer"]),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "latent_shape": "x".join(map(str, tokenizer.latent_shape)),
        "tokens": tokenizer.tokens,
        "groups": quantizer.groups,
        "codebook": quantizer.codebook_size,
        "usage": use and use.used / (use.used + use.dead),
        "used": use and use.used,
        "dead": use and use.dead,
        "counted": use and use.counted,
        "perplexity": use and sum(perplexities) / len(perplexities),
        "bits": use and bits_per_image(tokenizer.tokens * quantizer.groups, use.size),
        "entropy_bits": use and tokenizer.tokens * sum(map(math.log2, perplexities)),
        "code_rank": code,
        "code_stable_rank": code_stable,
        "latent_rank": latent,
        "latent_stable_rank": latent_stable,
    }
