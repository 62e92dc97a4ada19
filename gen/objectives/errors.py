"""Errors (B,) of a prediction (B, C, H, W) that training lowers, beside the mean square.

multiscale   sum over k < n of 2^k MSE(pool_k(prediction), pool_k(target)),   pool_k: averages of 2^k x 2^k pixels
             Hoogeboom et al. 2023, arXiv 2301.11093, section 3.2: the sum over resolutions s x s of MSE / s, times the largest
             s; n = 1 is the mean square
direction    1 - mean over places of v . velocity / (max(|v|, c |velocity|) |velocity|), vectors of C channels, in [0, 2]
             1 - cos of Yao et al. 2025, arXiv 2501.01423, Table 1, for v not shorter than c |velocity|, c = 0.1; the gradient of
             cos has the length 1 / |v|, which has no bound, and v is 0 in an untrained network
"""

import torch
from torch import Tensor
from torch.nn import functional as F

SHORTEST, LEAST = 0.1, 1e-8
"""Of `direction`: c, and the length of a velocity that is 0."""


def multiscale(prediction: Tensor, target: Tensor, scales: int) -> Tensor:
    """Sum of mean squares (B,) at so many resolutions, each half of the one before and of twice its weight."""
    difference = prediction - target
    total = difference.square().flatten(1).mean(1)
    for k in range(1, scales):
        difference = F.avg_pool2d(difference, 2)
        total = total + 2**k * difference.square().flatten(1).mean(1)
    return total


def direction(v: Tensor, velocity: Tensor) -> Tensor:
    """1 - the mean cosine (B,) between vectors of channels."""
    length = torch.linalg.vector_norm(velocity, dim=1).clamp(min=LEAST)
    of_v = torch.linalg.vector_norm(v, dim=1).maximum(SHORTEST * length)
    return 1 - ((v * velocity).sum(1) / (of_v * length)).flatten(1).mean(1)


def check_errors(scales: int, direction: float, shape: tuple[int, int, int]) -> None:
    """ValueError for latents (C, H, W) that cannot be halved so often, and for a direction of one channel."""
    if direction and shape[0] == 1:
        raise ValueError("direction is of vectors of channels, and these latents have one: drop --model.direction")
    parts = 2 ** (scales - 1)
    if shape[1] % parts or shape[2] % parts:
        raise ValueError(
            f"{scales} scales halve latents of {shape[1]} x {shape[2]} {scales - 1} times, which leaves parts of pixels: "
            "lower --model.scales"
        )
