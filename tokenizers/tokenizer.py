"""Images to tokens or latents, and back: encoder, quantizer, decoder in one `save_pretrained` artefact.

    z = encode(x)          codes, indices = quantize(z)          x' = decode(codes)

A latent model sees y = (raw - mean) / std per channel, where raw is, by `latent_space`,

    "pre"    quantizer.latents(z): continuous, before snapping (as in latent diffusion, arXiv 2112.10752)
    "post"   the codes themselves

and its samples return through decode_latents: y std + mean, snapped to the nearest code if `snap_on_decode`, decoded.
Mean and std are measured once on training images and travel with the weights.
"""

from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from midway.tokenizers import principal
from midway.tokenizers.base import Quantized, Quantizer
from midway.tokenizers.card import plain_card
from midway.tokenizers.diffusers_networks import build, check_diffusers_config, completed, networks_of
from midway.tokenizers.kl import Identity
from midway.tokenizers.memory import images_at_once
from midway.tokenizers.networks import Decoder, Encoder, Upsample
from midway.tokenizers.options import LatentSpace, check_choices, check_sizes, plain
from midway.tokenizers.precision import Convert
from midway.tokenizers.pretrained import Pretrained
from midway.tokenizers.quantizers import make_quantizer
from midway.tokenizers.vit import ViTConfig, ViTDecoder, ViTEncoder

_ROUNDING = 2**-20  # of numbers in float32, with some room


@dataclass(frozen=True)
class TokenizerOutput:
    """reconstruction: (B, C, H, W) float32, meant for [-1, 1] but unbounded. quantized: codes, indices, losses. z: what was
    quantized, (B, in_dim, h, w)."""

    reconstruction: Tensor
    quantized: Quantized
    z: Tensor


class ImageTokenizer(Pretrained):
    """Square images (B, in_channels, image_size, image_size) in [-1, 1] <-> a grid of codes.

    `quantizer` is a config for `make_quantizer`, FSQ [8, 5, 5, 5] by default. {"type": "identity", "dim": in_channels}
    with downsample 1 is the pixel model: latents are pixels, and there are no networks. Saved and loaded bit for bit by
    save_pretrained and from_pretrained (pretrained.py).

    `network` "conv" (networks.py) has `blocks`, `upsample`, `attention` and `multipliers`, [1] by default; "vit" (vit.py) has
    `depth`, `heads` and `latent_tokens`, its patches are `downsample` pixels a side. With L latent tokens there is no grid:
    codes and latents are (B, D, 1, L). "diffusers" (diffusers_networks.py) takes the networks of a diffusers autoencoder from
    `foreign`, {"class": "AutoencoderKL", ...its options}; `import_tokenizer` (diffusers_import.py) makes such tokenizers, with
    weights.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["bottleneck", "latent_mean", "latent_std"]  # noqa: RUF012  (the name and the type are diffusers')

    latent_mean: Tensor
    latent_std: Tensor
    latents_measured: Tensor
    shortcut_started: Tensor

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 8,
        width: int = 64,
        downsample: int = 2,
        blocks: int = 2,
        quantizer: dict[str, Any] | None = None,
        upsample: str = "pixel_shuffle",
        latent_space: str = "pre",
        snap_on_decode: bool = True,
        attention: bool = False,
        multipliers: list[int] | None = None,
        network: str = "conv",
        depth: int = 4,
        heads: int = 4,
        latent_tokens: int | None = None,
        foreign: dict[str, Any] | None = None,
        shortcut: str = "orthogonal",
    ) -> None:
        super().__init__()
        check_sizes(image_size, downsample)
        check_choices(latent_space, network, shortcut, latent_tokens, foreign)
        description = plain(quantizer or {"type": "fsq", "levels": [8, 5, 5, 5]})
        self.register_to_config(quantizer=description)  # the default is written out, so that it may change later
        self.image_shape = (in_channels, image_size, image_size)
        self.downsample = downsample
        self.latent_tokens = latent_tokens
        self.tiles: tuple[int, int] | None = None  # tile and margin in pixels, once `tile_networks` was applied
        self.latent_space: LatentSpace = cast(LatentSpace, latent_space)
        self.snap_on_decode = snap_on_decode
        self.bottleneck = make_quantizer(
            description
        )  # diffusers finds config["quantizer"] before a module of that name
        self.passes_through = isinstance(self.quantizer, Identity) and downsample == 1 and foreign is None
        dim, in_dim = self.quantizer.dim, self.quantizer.in_dim
        if self.passes_through:
            if dim != in_channels:
                raise ValueError(
                    f"identity of dim {dim} on {in_channels} channels: with downsample 1 pixels are the latents"
                )
            self.encoder, self.decoder = nn.Identity(), nn.Identity()
        elif foreign is not None:
            check_diffusers_config(foreign, in_channels, downsample, description)
            self.register_to_config(foreign=plain(completed(foreign)))
            self.encoder, self.decoder = networks_of(build(foreign))
        elif network == "vit":
            sizes = ViTConfig(image_size, downsample, width, depth, heads, latent_tokens)
            self.encoder, self.decoder = ViTEncoder(in_channels, sizes, in_dim), ViTDecoder(dim, sizes, in_channels)
        else:
            stages = multipliers or [1]
            self.encoder = Encoder(in_channels, width, downsample, blocks, in_dim, attention, stages)
            self.decoder = Decoder(
                dim, width, downsample, blocks, in_channels, cast(Upsample, upsample), attention, stages
            )
        self.register_buffer("latent_mean", torch.zeros(dim))
        self.register_buffer("latent_std", torch.ones(dim))
        self.register_buffer("latents_measured", torch.tensor(False))
        self.register_buffer(
            "shortcut_started", torch.tensor(shortcut != "principal"), persistent=shortcut == "principal"
        )

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer itself; `config["quantizer"]` is its description."""
        return self.bottleneck

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(D, h, w) of codes and latents; (D, 1, L) with latent tokens."""
        if self.latent_tokens is not None:
            return self.quantizer.dim, 1, self.latent_tokens
        side = self.image_shape[1] // self.downsample
        return self.quantizer.dim, side, side

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the noise that `forward` draws by; C is 0 if it draws nothing."""
        return self.quantizer.noise_channels, *self.latent_shape[1:]

    @property
    def tokens(self) -> int:
        """Positions that have a token: h w, unless the quantizer has another arrangement."""
        _, height, width = self.latent_shape
        return self.quantizer.tokens(height, width)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last layer. ValueError if there is no decoder."""
        matrices = [p for p in self.decoder.parameters() if p.dim() > 1]
        if not matrices:
            raise ValueError("this tokenizer has no decoder, and so no last layer")
        return matrices[-1]

    def forward(self, images: Tensor, noise: Tensor | None = None) -> TokenizerOutput:
        """Images -> reconstruction and what was quantized; `noise` (B, *noise_shape): see `Quantizer.forward`."""
        z = self.encode(images)
        quantized = self.quantizer(z, noise)
        return TokenizerOutput(self.decode(quantized.codes), quantized, z)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> the encoder's output z (B, in_dim, h, w), before the quantizer."""
        _check_shape(images, self.image_shape, "images")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; convert bytes to floats in [-1, 1] first")
        z = self.encoder(self._cast(images))
        return z if self.latent_tokens is None else z.unsqueeze(2)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, D, h, w) -> images (B, C, H, W) float32, meant for [-1, 1] but unbounded."""
        _check_shape(codes, self.latent_shape, "codes")
        if self.quantizer.codebook_size is not None:
            codes = codes.contiguous()  # convolutions round by layout, and tokens are to give the same image as forward
        return self.decoder(self._cast(codes if self.latent_tokens is None else codes.squeeze(2))).float()

    def encode_indices(self, images: Tensor) -> Tensor:
        """Images -> tokens int64, (B, h, w) or as the quantizer arranges them: those of `forward`, in any mode, without noise.

        ValueError if the quantizer is continuous, or the encoder's output not finite.
        """
        if self.quantizer.codebook_size is None:
            kind = self.config["quantizer"]["type"]
            raise ValueError(f"quantizer {kind!r} is continuous and has no indices; use encode_latents")
        z = self.encode(images)
        if not bool(z.isfinite().all()):
            raise ValueError(
                "the encoder's output is not finite, so it has no tokens: its training diverged, train it again"
            )
        return self.quantizer.encode(z)[1]

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Tokens as `encode_indices` gives them -> images. ValueError if one is outside the codebook."""
        return self.decode(self.quantizer.indices_to_codes(indices))

    def raw_latents(self, images: Tensor) -> Tensor:
        """Images -> latents (B, D, h, w) float32 before standardisation: what `set_latent_statistics` is measured on."""
        z = self.encode(images)
        return self.quantizer.encode(z)[0] if self.latent_space == "post" else self.quantizer.latents(z)

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Give the per-channel mean and standard deviation (D,) of `raw_latents` over the training images.

        ValueError for numbers that are not finite, and for a channel that does not vary beyond the rounding of its mean.
        """
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.latent_mean.shape or not bool(torch.isfinite(value).all()):
                shape = tuple(self.latent_mean.shape)
                raise ValueError(f"{name} is {value.tolist()}; give finite numbers of shape {shape}, one a channel")
        constant = (std <= _ROUNDING * mean.abs()).nonzero().flatten().tolist()
        if constant:
            raise ValueError(
                f"std of latent channel {', '.join(str(i + 1) for i in constant)} of {len(std)} is "
                f"{', '.join(f'{float(std[i]):.3g}' for i in constant)}, so it does not vary and carries nothing"
            )
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)
        self.latents_measured.fill_(True)

    def own_card(self, license: str) -> str:
        return plain_card(self.image_shape, self.latent_shape, self.config["quantizer"]["type"], license)

    def check_loaded(self) -> None:
        """ValueError for statistics of latents that `set_latent_statistics` does not take."""
        if bool(self.latents_measured):
            self.set_latent_statistics(self.latent_mean, self.latent_std)

    def encode_latents(self, images: Tensor) -> Tensor:
        """Images -> standardised latents (B, D, h, w). ValueError until statistics have been given."""
        self._check_measured()
        return (self.raw_latents(images) - _channelwise(self.latent_mean)) / _channelwise(self.latent_std)

    def decode_latents(self, latents: Tensor, snap: bool | None = None) -> Tensor:
        """Standardised latents (B, D, h, w) -> images; `snap` overrides `snap_on_decode`."""
        self._check_measured()
        _check_shape(latents, self.latent_shape, "latents")
        raw = latents.float() * _channelwise(self.latent_std) + _channelwise(self.latent_mean)
        return self.decode(self.quantizer.snap(raw) if (self.snap_on_decode if snap is None else snap) else raw)

    @torch.no_grad()
    def start(self, images: Tensor) -> None:
        """Start from the first images (B, C, H, W): once, before the first step, on every process with the same images.

        Principal shortcuts of convolutional networks, unless they have been started, and the quantizer's `start`.
        """
        if self.shortcut_started or not isinstance(self.encoder, Encoder) or not isinstance(self.decoder, Decoder):
            self.quantizer.start(torch.cat([self.encode(part) for part in images.split(images_at_once(self))]))
            return
        _check_shape(images, self.image_shape, "images")
        principal.start(self.encoder.shortcut, self.decoder.linear_shortcut, self.quantizer, images, self.downsample)
        self.shortcut_started.fill_(True)

    def observe(self, quantized: Quantized) -> None:
        """The quantizer's `observe`: once per training micro-batch, with what `forward` returned as `quantized`."""
        self.quantizer.observe(quantized)

    def update(self, step_ok: Tensor | None = None) -> None:
        """The quantizer's `update`: once per optimizer step, on every process; `step_ok` is False if it was skipped."""
        self.quantizer.update(step_ok)

    def _apply(self, fn: Convert, recurse: bool = True) -> Self:
        """`.to()`: the networks follow; mean and std of latents, like the quantizer, stay in float32."""
        mean, std = self.latent_mean, self.latent_std
        super()._apply(fn, recurse)
        if self.latent_mean.dtype != mean.dtype:
            self.latent_mean, self.latent_std = (x.to(self.latent_mean.device) for x in (mean, std))
        return self

    def _cast(self, x: Tensor) -> Tensor:
        """To the networks' dtype, for those loaded in bfloat16."""
        return x if self.passes_through else x.to(next(self.encoder.parameters()).dtype)

    def _check_measured(self) -> None:
        if not bool(self.latents_measured):
            raise ValueError(
                "this tokenizer's latent mean and std have not been measured, and latents of unknown scale shift the "
                "noise schedule: collect raw_latents over training images and call set_latent_statistics(mean, std)"
            )


def _channelwise(vector: Tensor) -> Tensor:
    """(D,) -> (D, 1, 1) float32."""
    return vector.float().view(-1, 1, 1)


def _check_shape(x: Tensor, shape: tuple[int, int, int], name: str) -> None:
    if x.ndim != 4 or tuple(x.shape[1:]) != shape:
        raise ValueError(f"{name} have shape {tuple(x.shape)}; this tokenizer takes (B, {', '.join(map(str, shape))})")
