"""Checks of what quantizers are given."""

import math

import torch
from torch import Tensor


def check_channels(z: Tensor, channels: int, name: str = "z") -> None:
    """ValueError unless z is (B, channels, *S)."""
    if z.ndim < 2 or z.shape[1] != channels:
        raise ValueError(f"{name} has shape {tuple(z.shape)}; this quantizer takes (B, {channels}, *S)")


def check_noise(noise: Tensor, latents: Tensor) -> None:
    """ValueError unless noise has the shape of the latents (B, D, *S)."""
    if noise.shape != latents.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; the latents have {tuple(latents.shape)}")


def check_finite(name: str, value: float, hint: str, positive: bool = False) -> None:
    """ValueError unless `value` is finite and >= 0, or `positive`; the message ends with `hint`."""
    if not (math.isfinite(value) and (value > 0 or (value == 0 and not positive))):
        raise ValueError(f"{name} is {value}; give a finite {'number > 0' if positive else 'weight >= 0'}{hint}")


def dropout_noise(noise: Tensor | None, latents: Tensor, channels: int, option: str) -> Tensor:
    """The noise that dropout takes in training; ValueError unless it is (B, channels, *S) for latents (B, D, *S)."""
    expected = (len(latents), channels, *latents.shape[2:])
    if noise is None or noise.shape != expected:
        given = "none was given" if noise is None else f"it has shape {tuple(noise.shape)}"
        name = option.replace("_", " ")
        raise ValueError(f"{name} in training takes noise {expected}, but {given}; or set {option} to 0")
    return noise


def one_a_sample(noise: Tensor) -> Tensor:
    """The last channel's first position, (B, 1, ..., 1), of noise (B, C, *S)."""
    return noise[(slice(None), slice(-1, None), *[slice(1)] * (noise.ndim - 2))]


def check_indices(indices: Tensor, size: int) -> None:
    """ValueError unless indices are integers in {0, ..., size - 1}; reads the data, so a GPU synchronises."""
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"indices are {indices.dtype}; give int64 (a float cannot count beyond 2**24)")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise ValueError(
            f"indices span {int(indices.min())}..{int(indices.max())}; this codebook has 0..{size - 1}: "
            "remove mask or class tokens before decoding"
        )
