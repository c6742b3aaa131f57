"""Reading from and writing to the residual streams, with gradients in as few passes as possible.

Products are batched small matrices per token, in float32 whatever the streams' dtype (float64 if an
operand is): rounding a mixing matrix to bfloat16 makes the signal drift over many sub-layers.
"""

import torch
from torch import Tensor

from mhc_lightning.kernels.coefficients import compute_dtype


def dot_per_stream(streams: Tensor, vector: Tensor) -> Tensor:
    """``Σ_c streams[t, i, c] · vector[t, c]``: [tokens, n, C], [tokens, C] -> [tokens, n]."""
    # As a row times a matrix: batched products with a single column are several times slower.
    return torch.bmm(vector[:, None, :], streams.mT).squeeze(1)


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, pre):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(streams, pre)
        return torch.bmm(pre[:, None, :], streams.to(pre.dtype)).squeeze(1).to(streams.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        streams, pre = ctx.saved_tensors
        grad = grad.to(pre.dtype)
        streams_grad = pre_grad = None
        if ctx.needs_input_grad[0]:
            streams_grad = torch.bmm(pre[:, :, None], grad[:, None, :]).to(streams.dtype)
        if ctx.needs_input_grad[1]:
            pre_grad = dot_per_stream(streams.to(pre.dtype), grad)
        return streams_grad, pre_grad


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, output, residual, post):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(streams, output, residual, post)
        dtype = residual.dtype
        merged = torch.bmm(residual, streams.to(dtype))
        merged.addcmul_(post[:, :, None], output.to(dtype)[:, None, :])
        return merged.to(streams.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        streams, output, residual, post = ctx.saved_tensors
        need_streams, need_output, need_residual, need_post = ctx.needs_input_grad
        grad = grad.to(residual.dtype)
        streams_grad = output_grad = residual_grad = post_grad = None
        if need_streams:
            streams_grad = torch.bmm(residual.mT, grad).to(streams.dtype)
        if need_output:
            output_grad = torch.bmm(post[:, None, :], grad).squeeze(1).to(output.dtype)
        if need_residual:
            residual_grad = torch.bmm(grad, streams.to(grad.dtype).mT)
        if need_post:
            post_grad = dot_per_stream(grad, output.to(grad.dtype))
        return streams_grad, output_grad, residual_grad, post_grad


def aggregate_streams(streams: Tensor, pre: Tensor) -> Tensor:
    """Read a sub-layer's input from the streams: ``Σ_j pre[j] · streams[j]``.

    Args:
        streams: [..., n, C].
        pre: Read weights [..., n].

    Returns:
        [..., C] in the dtype of ``streams``, accumulated in float32.

    Raises:
        ValueError: If the shapes don't fit.
    """
    if pre.shape != streams.shape[:-1]:
        raise ValueError(
            f"pre must be {list(streams.shape[:-1])} for streams {list(streams.shape)},"
            f" not {list(pre.shape)}"
        )
    n, width = streams.shape[-2:]
    dtype = compute_dtype(streams, pre)
    with torch.autocast(streams.device.type, enabled=False):
        read = _Aggregate.apply(streams.reshape(-1, n, width), pre.reshape(-1, n).to(dtype))
    return read.reshape(*streams.shape[:-2], width)


def merge_streams(streams: Tensor, output: Tensor, residual: Tensor, post: Tensor) -> Tensor:
    """Mix the streams and write a sub-layer's output to them (arXiv 2512.24880, eq. 3).

    ``new[i] = Σ_j residual[i, j] · streams[j] + post[i] · output``

    Args:
        streams: [..., n, C].
        output: The sub-layer's output [..., C].
        residual: Mixing matrices [..., n, n].
        post: Write weights [..., n].

    Returns:
        [..., n, C] in the dtype of ``streams``, accumulated in float32.

    Raises:
        ValueError: If the shapes don't fit.
    """
    *leading, n, width = streams.shape
    for name, tensor, shape in (
        ("output", output, [*leading, width]),
        ("residual", residual, [*leading, n, n]),
        ("post", post, [*leading, n]),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for streams {list(streams.shape)},"
                f" not {list(tensor.shape)}"
            )
    dtype = compute_dtype(streams, residual, post)
    with torch.autocast(streams.device.type, enabled=False):
        merged = _Merge.apply(
            streams.reshape(-1, n, width),
            output.reshape(-1, width),
            residual.reshape(-1, n, n).to(dtype),
            post.reshape(-1, n).to(dtype),
        )
    return merged.reshape(streams.shape)
