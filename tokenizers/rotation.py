"""Directions: vectors of unit length, and the rotation trick (Fifty et al. 2024, arXiv 2410.06424, section 4.2).

Where straight-through hands the gradient g of a code q to the latent e unchanged, the rotation trick takes the map from e to q
for a rotation and a scaling, both constant: q = lambda R e. So the angle between g and q is that between e and its gradient:

    lambda = |q| / |e|     u = e / |e|     v = q / |q|     w = (u + v) / |u + v|
    R = I - 2 w w^T + 2 v u^T           R u = v           gradient to e = lambda R^T g = lambda (g - 2 w (w . g) + 2 u (v . g))

The forward value is q, bit for bit; computing lambda R e would round it. Limits: opposite vectors have no w, and w = 0 leaves the
reflection I - 2 u u^T, which is orthogonal and maps u to v too; e = 0 has no direction, and the gradient passes unchanged; q = 0
makes lambda 0, and so the gradient. A short e makes lambda large (section 6 of the paper): `normalize` avoids it.
"""

import torch
from torch import Tensor

_NO_LENGTH = 1e-8  # shorter vectors have no direction
_OPPOSITE = 1e-3  # |u + v| below which rounding, not the vectors, would choose w


def unit(x: Tensor, axis: int = 1) -> Tensor:
    """x / |x| along `axis`; vectors shorter than 1e-8 stay as they are, so that value and gradient are finite at zero."""
    square = x.square().sum(axis, keepdim=True)
    return x / torch.where(square > _NO_LENGTH**2, square, 1).sqrt()


def rotated(value: Tensor, carrier: Tensor) -> Tensor:
    """`value` (B, D, *S) exactly, with the gradient lambda R^T g to `carrier`, the same shape; rotations along axis 1."""
    return _Rotated.apply(value.detach(), carrier)  # type: ignore[no-any-return]


def rotated_gradient(value: Tensor, carrier: Tensor, gradient: Tensor) -> Tensor:
    """lambda R^T g for q = `value`, e = `carrier`, g = `gradient`, all (B, D, *S)."""
    u, v = unit(carrier), unit(value)
    between = u + v
    w = torch.where(_length(between) > _OPPOSITE, unit(between), 0)
    turned = gradient - 2 * w * _dot(w, gradient) + 2 * u * _dot(v, gradient)
    length = _length(carrier)
    directed = length > _NO_LENGTH
    return torch.where(directed, _length(value) / torch.where(directed, length, 1) * turned, gradient)


class _Rotated(torch.autograd.Function):
    """Forward: `value`, bit for bit. Backward: the rotated and scaled gradient to `carrier`."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, carrier: Tensor) -> Tensor:
        ctx.save_for_backward(value, carrier)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[None, Tensor]:
        value, carrier = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        return None, rotated_gradient(value, carrier, gradients[0])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def _length(x: Tensor) -> Tensor:
    return _dot(x, x).sqrt()
