"""Reading from and writing to streams [T, n, C] with given mappings.

Products are batches of small matrices, one per token. Their precision is that of the mappings
(float32 or float64), whatever the streams' dtype: with a mixing matrix rounded to bfloat16, the
signal drifts over many sub-layers. Their operands are made dense: torch would multiply and copy
others (streams that are views of one tensor, the gradient of a sum) one token at a time.
"""

import torch
from torch import Tensor


def dot_per_stream(streams: Tensor, vector: Tensor) -> Tensor:
    """`Σ_c streams[t, i, c] · vector[t, c]`: [T, n, C], [T, C] -> [T, n]."""
    # As a row times a matrix: batched products with a single column are several times slower.
    return torch.bmm(vector.contiguous()[:, None, :], streams.contiguous().mT).squeeze(1)


def aggregate_forward(streams: Tensor, pre: Tensor) -> Tensor:
    """`Σ_j pre[j] · streams[j]`, [T, C] in the streams' dtype."""
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
