"""The reading half of an mHC connection as one differentiable step.

Mappings and the sub-layer's input are computed from one pair of passes over the streams, and the
streams are handed on as an output of the same step: the gradient that comes back through the
merge is then accumulated inside the matrix product, and autograd never adds stream-sized tensors.
"""

import torch
from torch import Tensor

from mhc_lightning.kernels.coefficients import (
    Projection,
    check_shapes,
    coefficients_backward,
    coefficients_of,
    compute_dtype,
    logits_of,
    project,
)
from mhc_lightning.kernels.record import StreamMappings
from mhc_lightning.kernels.sinkhorn import check_iterations
from mhc_lightning.kernels.streams import dot_per_stream


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, phi, alpha, bias, num_iterations, eps):  # type: ignore[no-untyped-def]
        n = streams.shape[1]
        wide = streams.to(phi.dtype)
        flat = wide.reshape(-1, phi.shape[0])
        projection = project(flat, phi, eps)
        mappings = coefficients_of(logits_of(projection, alpha, bias, n), n, num_iterations)
        ctx.save_for_backward(streams, phi, alpha, bias, *projection, *mappings)
        ctx.num_iterations = num_iterations
        ctx.set_materialize_grads(False)
        read = torch.bmm(mappings.pre[:, None, :], wide).squeeze(1).to(streams.dtype)
        return streams.view_as(streams), read, *mappings

    @staticmethod
    def backward(ctx, streams_grad, read_grad, pre_grad, post_grad, residual_grad):  # type: ignore[no-untyped-def]
        streams, phi, alpha, bias, raw, inverse_rms, *saved = ctx.saved_tensors
        mappings = StreamMappings(*saved)
        wide = streams.to(phi.dtype)
        flat = wide.reshape(-1, phi.shape[0])
        if pre_grad is None:
            pre_grad = torch.zeros_like(mappings.pre)
        if post_grad is None:
            post_grad = torch.zeros_like(mappings.post)
        if residual_grad is None:
            residual_grad = torch.zeros_like(mappings.residual)
        if read_grad is not None:
            read_grad = read_grad.to(phi.dtype)
            pre_grad = pre_grad + dot_per_stream(wide, read_grad)
        parts = coefficients_backward(
            StreamMappings(pre_grad, post_grad, residual_grad),
            mappings,
            flat,
            Projection(raw, inverse_rms),
            phi,
            alpha,
            bias,
            ctx.num_iterations,
            ctx.needs_input_grad[1],
        )
        grad = None
        if ctx.needs_input_grad[0]:
            if streams_grad is None:
                grad = parts.raw.t() @ phi.t()
            else:
                incoming = streams_grad.to(phi.dtype).reshape(flat.shape)
                grad = torch.addmm(incoming, parts.raw.t(), phi.t())
            grad.addcmul_(flat, parts.scale[:, None])
            grad = grad.view(streams.shape)
            if read_grad is not None:
                grad.addcmul_(mappings.pre[:, :, None], read_grad[:, None, :])
            grad = grad.to(streams.dtype)
        return grad, parts.phi, parts.alpha, parts.bias, None, None


def read_streams(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    num_iterations: int = 20,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, StreamMappings]:
    """``stream_mappings`` and ``aggregate_streams`` in one step.

    Args:
        streams: [..., n, C].
        phi: [n·C, n² + 2n].
        alpha: [3].
        bias: [n² + 2n].
        num_iterations: Sinkhorn iterations, at least 1.
        eps: Added to the mean square, inside the square root.

    Returns:
        The streams to merge into (the same values; use these, so that gradients accumulate here),
        the sub-layer's input [..., C], and the mappings.

    Raises:
        ValueError: If the shapes don't fit or ``num_iterations`` < 1.
    """
    check_shapes(streams, phi, alpha, bias)
    check_iterations(num_iterations)
    *leading, n, width = streams.shape
    dtype = compute_dtype(streams, phi, alpha, bias)
    with torch.autocast(streams.device.type, enabled=False):
        kept, read, pre, post, residual = _Read.apply(
            streams.reshape(-1, n, width),
            phi.to(dtype),
            alpha.to(dtype),
            bias.to(dtype),
            num_iterations,
            eps,
        )
    mappings = StreamMappings(
        pre.reshape(*leading, n), post.reshape(*leading, n), residual.reshape(*leading, n, n)
    )
    return kept.reshape(streams.shape), read.reshape(*leading, width), mappings
