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
from mhc_lightning.kernels.pieces import token_pieces
from mhc_lightning.kernels.transforms import transforming


def gate_forward(operands: GateOperands, eps: float) -> GateResults:
    """Gates and what backward needs of the sums over C."""
    weight = operands.weight
    width = weight.shape[-1]
    times = torch.mul if transforming() else Tensor.mul_
    sums = []
    for here in token_pieces(operands.streams):
        streams, key = operands.streams[here].to(weight.dtype), operands.key[here].to(weight.dtype)
        product = times(streams * key, weight).sum(-1)
        squares = (torch.linalg.vector_norm(x, dim=-1).square() for x in (streams, key))
        sums.append(torch.stack([product, *squares]))
    product, square, key_square = torch.cat(sums, 1).unbind()
    inverse_rms = (square / width + eps).rsqrt()
    key_inverse_rms = (key_square / width + eps).rsqrt()
    score = product * inverse_rms * key_inverse_rms / width**0.5
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
    streams, key, weight = operands
    factors = gradient_factors(gate_grad, score, inverse_rms, key_inverse_rms, weight.shape[-1])
    streams_grad, key_grad = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (streams, key)
    )
    weight_sums = weight.new_zeros(0)
    for here in token_pieces(streams):
        h, k = streams[here].to(weight.dtype), key[here].to(weight.dtype)
        product, own, key_own = (factor[here, :, None] for factor in factors)
        grad = torch.mul(k, weight).mul_(product).addcmul_(h, own)
        if kept_grad is not None:
            grad += kept_grad[here]
        streams_grad[here] = grad
        torch.mul(h, product, out=grad)
        if here.start == 0:
            weight_sums = torch.zeros_like(grad)
        weight_sums[: len(grad)].addcmul_(grad, k)
        key_grad[here] = grad.mul_(weight).addcmul_(k, key_own)
    return GateGrads(streams_grad, key_grad, weight_sums.sum(0))
