"""Options of a tokenizer: the choices, and checks of what fits together."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from midway.tokenizers.networks import check_downsample

LatentSpace = Literal["pre", "post"]
Network = Literal["conv", "vit", "diffusers"]
Shortcut = Literal["principal", "orthogonal"]


def plain(config: Any) -> Any:
    """`config` as JSON gives it back: lists, no tuples."""
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, list | tuple) else config


def check_sizes(image_size: int, downsample: int) -> None:
    """ValueError unless images can be cut into patches of `downsample` pixels a side, a power of two."""
    check_downsample(downsample)
    if image_size < 1 or image_size % downsample:
        raise ValueError(f"image_size {image_size} is not a multiple of downsample {downsample}: change one of them")


def check_choices(
    latent_space: str,
    network: str,
    shortcut: str,
    latent_tokens: int | None,
    diffusers_config: Mapping[str, Any] | None,
) -> None:
    """ValueError for an unknown word, or for options of another network than the chosen one."""
    if latent_space not in get_args(LatentSpace):
        raise ValueError(f"latent_space is {latent_space!r}; choose 'pre' or 'post'")
    if shortcut not in get_args(Shortcut):
        raise ValueError(f"shortcut is {shortcut!r}; choose 'principal' or 'orthogonal'")
    if network not in get_args(Network):
        raise ValueError(f"network is {network!r}; choose 'conv' or 'vit', or 'diffusers' with foreign")
    if (diffusers_config is None) == (network == "diffusers"):
        raise ValueError(
            f"network is {network!r} and foreign is {diffusers_config}; 'diffusers', and only it, needs foreign"
        )
    if latent_tokens is not None and network != "vit":
        raise ValueError(f"latent_tokens is {latent_tokens}; only network='vit' has them")
