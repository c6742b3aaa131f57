"""What the operator of context gates takes and gives, and its arithmetic on [T, n] numbers."""

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_SCORE = 1e-6  # below it the signed square root is flat


class GateOperands(NamedTuple):
    """Streams and keys [T, n, C], and the product of their norms' weights [n, C] (float32)."""

    streams: Tensor
    key: Tensor
    weight: Tensor


class GateResults(NamedTuple):
    """Gates, scores and the inverse root mean squares of streams and keys, all [T, n], float32."""

    gate: Tensor
    score: Tensor
    inverse_rms: Tensor
    key_inverse_rms: Tensor


class GateGrads(NamedTuple):
    """Gradients of the operands."""

    streams: Tensor
    key: Tensor
    weight: Tensor


def gate_of(score: Tensor) -> Tensor:
    """σ of the signed square root of a score."""
    return torch.sigmoid(score.sign() * score.abs().clamp(min=LEAST_SCORE).sqrt())


def gradient_factors(
    gate_grad: Tensor, score: Tensor, inverse_rms: Tensor, key_inverse_rms: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors [T, n], by which the gradients are sums of the operands.

    With these factors p, a and b, streams h, keys k and the weight w, the gradients are

        grad h = p · k · w + a · h
        grad k = p · h · w + b · k
        grad w = Σ_tokens p · h · k
    """
    gate, size = gate_of(score), score.abs()
    slope = torch.where(size >= LEAST_SCORE, 0.5 * size.clamp(min=LEAST_SCORE).rsqrt(), 0)
    score_grad = gate_grad * gate * (1 - gate) * slope
    through_norm = -score_grad * score / width
    return (
        score_grad * inverse_rms * key_inverse_rms / width**0.5,
        through_norm * inverse_rms.square(),
        through_norm * key_inverse_rms.square(),
    )
