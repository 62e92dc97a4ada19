"""Grids of images as PNG."""

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from midway.gen.core.files import write_atomically

LEAST_SIDE = 48  # pixels an image should have in a grid to be looked at


def grid_png(images: Tensor, columns: int, scale: int | None = None) -> bytes:
    """uint8 (N, C, H, W) -> a PNG with `columns` images a row, 2 pixels apart, each enlarged by a whole factor."""
    factor = scale or max(1, math.ceil(LEAST_SIDE / images.shape[-1]))
    large = images.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    large = F.pad(large.expand(-1, 3, -1, -1), (1, 1, 1, 1), value=255)
    missing = -len(large) % columns
    large = torch.cat([large, large.new_full((missing, *large.shape[1:]), 255)])
    rows = large.unflatten(0, (-1, columns))  # (R, K, 3, h, w)
    picture = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.numpy())).save(buffer, format="PNG")
    return buffer.getvalue()


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write `grid_png` to `path`, completely or not at all."""
    write_atomically(path, grid_png(images, columns))
