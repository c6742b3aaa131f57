"""Context gates in plain torch, forward and backward, at least in float32."""

import torch
from torch import Tensor

from mhc_lightning.kernels.context_gate.operands import (
    GateGrads,
    GateOperands,
    GateResults,
    gate_of,
    gradient_factors,
)
from mhc_lightning.kernels.transforms import transforming


def gate_forward(operands: GateOperands, eps: float) -> GateResults:
    """Gates and what backward needs of the sums over C."""
    weight = operands.weight
    streams, key = operands.streams.to(weight.dtype), operands.key.to(weight.dtype)
    width = weight.shape[-1]
    times = torch.mul if transforming() else Tensor.mul_
    products = times(streams * key, weight).sum(-1)
    inverse_rms, key_inverse_rms = (
        (torch.linalg.vector_norm(x, dim=-1).square() / width + eps).rsqrt() for x in (streams, key)
    )
    score = products * inverse_rms * key_inverse_rms / width**0.5
    return GateResults(gate_of(score), score, inverse_rms, key_inverse_rms)


def gate_backward(
    operands: GateOperands,
    score: Tensor,
    inverse_rms: Tensor,
    key_inverse_rms: Tensor,
    kept_grad: Tensor | None,
    gate_grad: Tensor,
) -> GateGrads:
    """Gradients of streams, keys and weight."""
    weight = operands.weight
    streams, key = operands.streams.to(weight.dtype), operands.key.to(weight.dtype)
    product, own, key_own = (
        factor[..., None]
        for factor in gradient_factors(
            gate_grad, score, inverse_rms, key_inverse_rms, weight.shape[-1]
        )
    )
    streams_grad = torch.mul(key, weight).mul_(product).addcmul_(streams, own)
    if kept_grad is not None:
        streams_grad.add_(kept_grad)
    key_grad = torch.mul(streams, product)
    weight_grad = (key_grad * key).sum(0)
    key_grad.mul_(weight).addcmul_(key, key_own)
    return GateGrads(
        streams_grad.to(operands.streams.dtype), key_grad.to(operands.key.dtype), weight_grad
    )
