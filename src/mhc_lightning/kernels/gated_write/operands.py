"""What the operator of gated writes takes and gives, and its arithmetic on [B, P, n] numbers."""

from typing import NamedTuple

import torch
from torch import Tensor

CONV_EPS = 1e-5  # of the norm before the convolution, as the released code has it


class WriteOperands(NamedTuple):
    """What is written to the streams.

    Attributes:
        value: [B, P, C]; the last S of the P positions are those of the streams.
        gate: [B, P, n], float32.
        taps: [K, n, C], float32, the present position last; None without a convolution.
        dilation: Positions between two taps.
    """

    value: Tensor
    gate: Tensor
    taps: Tensor | None
    dilation: int

    @property
    def reach(self) -> int:
        """Positions before the present one that the convolution sees."""
        return 0 if self.taps is None else (len(self.taps) - 1) * self.dilation


class WriteGrads(NamedTuple):
    """Gradients of value, gate and taps."""

    value: Tensor
    gate: Tensor
    taps: Tensor | None


def mean_square(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean square over C of a value [B, P, C], [B, P, 1], in one pass."""
    norm = torch.linalg.vector_norm(value, dim=-1, keepdim=True, dtype=dtype)
    return norm.square() / value.shape[-1]


def inverse_rms(gate: Tensor, square: Tensor) -> Tensor:
    """1 / rms of gate · value [B, P, n], given the value's mean square [B, P, 1].

    All of a position's gated values are multiples of one value: so the normalised ones are, too,
    `gate · inverse_rms · value`, and need not be written.
    """
    return (gate.square() * square + CONV_EPS).rsqrt()


def through_norm(scale_grad: Tensor, gate: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the gates and of the mean square, given those of `gate · inverse_rms`."""
    cubed = scale_grad * inverse.pow(3)
    return CONV_EPS * cubed, -0.5 * (cubed * gate.pow(3)).sum(-1, keepdim=True)
