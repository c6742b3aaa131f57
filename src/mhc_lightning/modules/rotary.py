"""Rotary position embedding (arXiv 2104.09864), half-split layout."""

import torch
from torch import Tensor


def rotary_angles(
    start: int, length: int, dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, dim] of the rotation from position ``start`` on, float32.

    Computed from constants at each use: a stored table would be rounded by ``.bfloat16()`` and
    lost by materialisation from the meta device.
    """
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    positions = torch.arange(start, start + length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, theta**-exponents).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + dim/2) of ``x`` [..., length, dim]; computed in float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
