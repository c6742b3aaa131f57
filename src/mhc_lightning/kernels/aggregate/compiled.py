"""Reading streams with given weights by compiled kernels."""

import torch
from torch import Tensor

from mhc_lightning.kernels.compiled_support.library import call, readable, result, view


def aggregate_forward(streams: Tensor, pre: Tensor) -> Tensor:
    """`Σ_j pre[j] · streams[j]`, [T, C] in the streams' dtype."""
    tokens, n, width = streams.shape
    read = streams.new_empty(tokens, width)
    given = (view(streams), pre.contiguous(), result(read))
    call("aggregate_forward", pre.dtype, *given, tokens, n, width, streams=streams)
    return read


def aggregate_backward(
    grad: Tensor, streams: Tensor, pre: Tensor, need_streams: bool, need_pre: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of streams and pre, None where not needed."""
    streams_grad = streams.new_empty(streams.shape) if need_streams else None
    pre_grad = torch.empty_like(pre, memory_format=torch.contiguous_format) if need_pre else None
    given = (view(readable(grad)), view(streams), pre.contiguous())
    results = (result(streams_grad), pre_grad)
    call("aggregate_backward", pre.dtype, *given, *results, *streams.shape, streams=streams)
    return streams_grad, pre_grad
