"""Rotary position embedding (arXiv 2104.09864), half-split layout."""

import torch
from torch import Tensor


def rotary_angles(
    positions: Tensor, dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., length, dim] of the rotation at `positions` [..., length].

    Each call computes them from constants: a stored table would be rounded by `.bfloat16()`, and
    lost when the module is materialised from meta.
    """
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim
    angles = positions.to(dtype).unsqueeze(-1) * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + dim/2) of `x` [..., length, dim], in the dtype of `cos`."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
