"""Errors (B,) of a prediction (B, C, H, W) that training lowers, beside the mean square.

multiscale   sum over k < n of 2^k MSE(pool_k(prediction), pool_k(target)),   pool_k: averages of 2^k x 2^k pixels
             Hoogeboom et al. 2023, arXiv 2301.11093, section 3.2: the sum over resolutions s x s of MSE / s, times the largest
             s; n = 1 is the mean square
direction    1 - mean over places of cos(v, velocity), between vectors of C channels, in [0, 2]
             Yao et al. 2025, arXiv 2501.01423, Table 1
"""

from torch import Tensor
from torch.nn import functional as F


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
    return 1 - F.cosine_similarity(v, velocity, dim=1).flatten(1).mean(1)


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
