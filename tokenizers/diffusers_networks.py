"""The networks of diffusers' autoencoders, from their own configurations, as an encoder and a decoder of ours.

    AutoencoderKL     z = quant_conv(Encoder(x)) = (mean, ln variance)      x' = Decoder(post_quant_conv(code))
    VQModel           z = quant_conv(Encoder(x))                            x' = Decoder(post_quant_conv(code) [, code])
    AutoencoderTiny   z = layers((x + 1) / 2)                               x' = 2 layers(3 tanh(code / 3)) - 1

KL and VQ: Rombach et al. 2021, arXiv 2112.10752; their 1x1 convolutions are optional in KL. The [, code] of VQ is for
norm_type "spatial", whose norms read it at every resolution (MoVQ, Zheng et al. 2022, arXiv 2209.09002, section 3.2).
AutoencoderTiny's `forward` also rounds latents to bytes, which stops gradients; its `encode` and `decode` do not, nor do these.

All of them halve the resolution between blocks: downsample = 2^(blocks - 1).
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
"""What diffusers calls them."""


@dataclass(frozen=True)
class Interface:
    """What goes in and out: channels of an image, pixels a side of a code, and `make_quantizer`'s configuration between."""

    in_channels: int
    downsample: int
    quantizer: dict[str, Any]


class CodeDecoder(nn.Module):
    """Codes (B, D, h, w) -> images, by diffusers' decoder; if `spatial` it is given the codes a second time, for its norms."""

    def __init__(self, post_quant_conv: nn.Module, decoder: nn.Module, spatial: bool) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder, self.spatial = post_quant_conv, decoder, spatial

    def forward(self, codes: Tensor) -> Tensor:
        hidden = self.post_quant_conv(codes)
        return self.decoder(hidden, codes) if self.spatial else self.decoder(hidden)


class _FromZero(nn.Module):
    """[-1, 1] -> [0, 1]. (diffusers' EncoderTiny leaves it out when it recomputes activations, so its layers are used alone.)"""

    def forward(self, images: Tensor) -> Tensor:
        return images.add(1).div(2)


def check_diffusers_config(
    diffusers_config: Mapping[str, Any], in_channels: int, downsample: int, quantizer: Mapping[str, Any]
) -> None:
    """ValueError unless these networks can stand between such images and such a quantizer."""
    needed = interface_of(diffusers_config)
    given = Interface(in_channels, downsample, dict(quantizer))
    fits = all(quantizer.get(key) == value for key, value in needed.quantizer.items())
    if not fits or (in_channels, downsample) != (needed.in_channels, needed.downsample):
        raise ValueError(
            f"the networks of this {diffusers_config['class']} need {needed}, not {given}: use import_tokenizer"
        )


def interface_of(diffusers_config: Mapping[str, Any]) -> Interface:
    """What `diffusers_config`, {"class": one of CLASSES, ...its options}, is built for; ValueError if that cannot be run here."""
    options = _options(diffusers_config)
    if options["in_channels"] != options["out_channels"]:
        raise ValueError(
            f"{options['in_channels']} channels in and {options['out_channels']} out: a tokenizer gives back what it was given"
        )
    tiny = diffusers_config["class"] == "AutoencoderTiny"
    downsample = _tiny_downsample(options) if tiny else _block_downsample(options)
    return Interface(options["in_channels"], downsample, _quantizer(diffusers_config["class"], options))


def networks_of(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The encoder and the decoder of a diffusers model of one of CLASSES: its own modules, not copies."""
    parts: Any = model
    if type(model).__name__ == "AutoencoderTiny":
        encoder, decoder = nn.Sequential(_FromZero(), *parts.encoder.layers), parts.decoder
    else:
        encoder = nn.Sequential(parts.encoder, parts.quant_conv or nn.Identity())
        spatial = parts.config.get("norm_type") == "spatial"
        decoder = CodeDecoder(parts.post_quant_conv or nn.Identity(), parts.decoder, spatial)
    for module in (*encoder.modules(), *decoder.modules()):
        if hasattr(module, "gradient_checkpointing"):  # which calls this, and diffusers sets it only on whole models
            module._gradient_checkpointing_func = _recompute  # pyright: ignore[reportArgumentType]
    return encoder, decoder


def build(diffusers_config: Mapping[str, Any]) -> nn.Module:
    """The diffusers model that `diffusers_config` describes, with new weights; ValueError if there is no such model."""
    try:
        return diffusers_class(diffusers_config["class"])(**_options(diffusers_config))
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(
            f"diffusers cannot build this {diffusers_config['class']} ({error}): correct its options"
        ) from error


def describe(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """{"class": name, ...}: those entries of a diffusers configuration that are options of the class."""
    options = inspect.signature(diffusers_class(name).__init__).parameters
    return {"class": name, **{key: value for key, value in config.items() if key in options}}


def completed(diffusers_config: Mapping[str, Any]) -> dict[str, Any]:
    """`diffusers_config` with the options that it leaves to diffusers' defaults, which may change; ValueError for unknown
    ones."""
    return {"class": diffusers_config["class"], **_options(diffusers_config)}


def diffusers_class(name: object) -> Any:
    """The class of this name; ValueError unless it is one of CLASSES. The first import takes seconds."""
    if name not in CLASSES:
        raise ValueError(f"class is {name!r}; choose one of: {', '.join(CLASSES)}")
    return getattr(diffusers, str(name))


def _options(diffusers_config: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of the class, given or by default."""
    given = {key: value for key, value in diffusers_config.items() if key != "class"}
    parameters = inspect.signature(diffusers_class(diffusers_config.get("class")).__init__).parameters
    known = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"the installed diffusers' {diffusers_config['class']} has no option {', '.join(unknown)}: upgrade diffusers"
        )
    return {**known, **given}


def _quantizer(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    dim = options["latent_channels"]
    if name != "VQModel":
        return {"type": "kl" if name == "AutoencoderKL" else "identity", "dim": dim}
    code_dim = dim if options["vq_embed_dim"] is None else options["vq_embed_dim"]
    norm = options["norm_type"]
    if norm not in ("group", "spatial") or (norm == "spatial" and code_dim != dim):
        raise ValueError(
            f"norm_type {norm!r} with codes of {code_dim} and latents of {dim} channels; supported are 'group', and "
            "'spatial' where both are equal"
        )
    return {"type": "vq_gradient", "codebook_size": options["num_vq_embeddings"], "dim": code_dim}


def _block_downsample(options: Mapping[str, Any]) -> int:
    widths, down, up = (len(options[key]) for key in ("block_out_channels", "down_block_types", "up_block_types"))
    if not widths == down == up:
        raise ValueError(f"{down} down blocks, {up} up blocks and {widths} widths: give one width for every block")
    return 2 ** (widths - 1)


def _tiny_downsample(options: Mapping[str, Any]) -> int:
    down = 2 ** (len(options["num_encoder_blocks"]) - 1)
    up = options["upsampling_scaling_factor"] ** (len(options["num_decoder_blocks"]) - 1)
    if down != up:
        raise ValueError(
            f"the encoder makes sides {down} times smaller, the decoder {up} times larger: make them equal"
        )
    return down


def _recompute(module: nn.Module, *inputs: Any) -> Any:
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
