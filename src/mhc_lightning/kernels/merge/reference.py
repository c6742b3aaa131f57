"""Merging in plain torch, forward and backward, in the mappings' precision."""

import torch
from torch import Tensor

from mhc_lightning.kernels.aggregate.reference import dot_per_stream
from mhc_lightning.kernels.transforms import transforming


def merge_forward(streams: Tensor, output: Tensor, residual: Tensor, post: Tensor) -> Tensor:
    """`new[i] = Σ_j residual[i, j] · streams[j] + post[i] · output` in the streams' dtype."""
    dtype = residual.dtype
    merged = torch.bmm(residual.contiguous(), streams.to(dtype).contiguous())
    add = torch.addcmul if transforming() else Tensor.addcmul_
    merged = add(merged, post[:, :, None], output.to(dtype)[:, None, :])
    return merged.to(streams.dtype)


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
    grad, residual = grad.to(residual.dtype).contiguous(), residual.contiguous()
    streams_grad = output_grad = residual_grad = post_grad = None
    if need_streams:
        streams_grad = torch.bmm(residual.mT, grad).to(streams.dtype)
    if need_output:
        output_grad = torch.bmm(post.contiguous()[:, None, :], grad).squeeze(1).to(output.dtype)
    if need_coefficients:
        residual_grad = torch.bmm(grad, streams.to(grad.dtype).contiguous().mT)
        post_grad = dot_per_stream(grad, output.to(grad.dtype))
    return streams_grad, output_grad, residual_grad, post_grad
