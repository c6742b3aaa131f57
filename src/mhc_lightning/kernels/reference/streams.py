"""Reading from and writing to streams [T, n, C] with given mappings.

Products are batched small matrices per token, in the mappings' precision (float32 or float64)
whatever the streams' dtype: rounding a mixing matrix to bfloat16 makes the signal drift over many
sub-layers. They are given dense tensors: of others, such as streams that are views of one tensor or
the gradient of a sum, torch multiplies and copies one token's matrix after the other.
"""

import torch
from torch import Tensor

from mhc_lightning.kernels.transforms import transforming


def dot_per_stream(streams: Tensor, vector: Tensor) -> Tensor:
    """``Σ_c streams[t, i, c] · vector[t, c]``: [T, n, C], [T, C] -> [T, n]."""
    # As a row times a matrix: batched products with a single column are several times slower.
    return torch.bmm(vector.contiguous()[:, None, :], streams.contiguous().mT).squeeze(1)


def aggregate_forward(streams: Tensor, pre: Tensor) -> Tensor:
    """``Σ_j pre[j] · streams[j]``, [T, C] in the streams' dtype."""
    wide = streams.to(pre.dtype).contiguous()
    return torch.bmm(pre.contiguous()[:, None, :], wide).squeeze(1).to(streams.dtype)


def aggregate_backward(
    grad: Tensor, streams: Tensor, pre: Tensor, need_streams: bool, need_pre: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of streams and pre, None where not needed."""
    grad, pre = grad.to(pre.dtype).contiguous(), pre.contiguous()
    streams_grad = pre_grad = None
    if need_streams:
        streams_grad = torch.bmm(pre[:, :, None], grad[:, None, :]).to(streams.dtype)
    if need_pre:
        pre_grad = dot_per_stream(streams.to(pre.dtype), grad)
    return streams_grad, pre_grad


def mean_forward(streams: Tensor) -> Tensor:
    """The mean of the streams [T, C], in their dtype."""
    return streams.mean(1)


def expand_backward(grad: Tensor) -> Tensor:
    """What comes back to the one tensor that all streams are views of, their sum [T, C]."""
    return grad.sum(1)


def merge_forward(streams: Tensor, output: Tensor, residual: Tensor, post: Tensor) -> Tensor:
    """``new[i] = Σ_j residual[i, j] · streams[j] + post[i] · output`` in the streams' dtype."""
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
