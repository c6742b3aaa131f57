"""Merging by compiled kernels: each stream-sized operand is read or written once."""

import torch
from torch import Tensor

from mhc_lightning.kernels.compiled_support.library import call, readable, result, view


def merge_forward(streams: Tensor, output: Tensor, residual: Tensor, post: Tensor) -> Tensor:
    """`new[i] = Σ_j residual[i, j] · streams[j] + post[i] · output` in the streams' dtype."""
    merged = streams.new_empty(streams.shape)
    given = (view(streams), view(readable(output)), residual.contiguous(), post.contiguous())
    call("merge_forward", residual.dtype, *given, result(merged), *streams.shape, streams=streams)
    return merged


def merge_backward(
    grad: Tensor,
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    need_streams: bool,
    need_output: bool,
    need_coefficients: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of streams, output, residual and post, None where not needed."""
    streams_grad = streams.new_empty(streams.shape) if need_streams else None
    output_grad = readable(output).new_empty(output.shape) if need_output else None
    residual_grad = post_grad = None
    if need_coefficients:
        residual_grad = torch.empty_like(residual, memory_format=torch.contiguous_format)
        post_grad = torch.empty_like(post, memory_format=torch.contiguous_format)
    if need_streams or need_output or need_coefficients:
        call(
            "merge_backward",
            residual.dtype,
            view(readable(grad)),
            view(streams),
            view(readable(output)),
            residual.contiguous(),
            post.contiguous(),
            result(streams_grad),
            result(output_grad),
            residual_grad,
            post_grad,
            *streams.shape,
            streams=streams,
        )
    if output_grad is not None:
        output_grad = output_grad.to(output.dtype)
    return streams_grad, output_grad, residual_grad, post_grad
