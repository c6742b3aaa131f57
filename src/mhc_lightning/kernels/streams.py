"""The operators that read from and write to the residual streams with given mappings."""

from typing import Any

from torch import Tensor

from mhc_lightning.kernels import reference
from mhc_lightning.kernels.backend import backend_of
from mhc_lightning.kernels.operands import check_shape, compute_dtype, empty, full_precision
from mhc_lightning.kernels.record import note_merge
from mhc_lightning.kernels.transforms import (
    operator,
    plain_gradients,
    transformable,
    transforming,
)


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
    *leading, n, width = streams.shape
    check_shape("pre", pre, [*leading, n], streams)
    dtype = compute_dtype(streams, pre)
    weights = pre.reshape(-1, n).to(dtype)
    run = transformable(aggregate_op, reference.aggregate_forward)
    with full_precision(streams):
        read = run(streams.reshape(-1, n, width), weights)
    return read.reshape(*leading, width)


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
    check_shape("output", output, [*leading, width], streams)
    check_shape("residual", residual, [*leading, n, n], streams)
    check_shape("post", post, [*leading, n], streams)
    dtype = compute_dtype(streams, residual, post)
    run = transformable(merge_op, reference.merge_forward)
    with full_precision(streams):
        merged = run(
            streams.reshape(-1, n, width),
            output.reshape(-1, width),
            residual.reshape(-1, n, n).to(dtype),
            post.reshape(-1, n).to(dtype),
        )
    merged = merged.reshape(streams.shape)
    note_merge(residual, merged)
    return merged


@operator("aggregate_streams")
def aggregate_op(streams: Tensor, pre: Tensor) -> Tensor:
    """[T, n, C], [T, n] -> [T, C]."""
    return backend_of(streams, pre).aggregate_forward(streams, pre)


@operator("aggregate_streams_backward")
def aggregate_backward_op(
    grad: Tensor, streams: Tensor, pre: Tensor, need_streams: bool, need_pre: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of streams and pre; an empty tensor for one that is not needed."""
    backend = backend_of(streams, pre)
    streams_grad, pre_grad = backend.aggregate_backward(grad, streams, pre, need_streams, need_pre)
    return (
        empty(streams) if streams_grad is None else streams_grad,
        empty(streams) if pre_grad is None else pre_grad,
    )


@aggregate_op.register_fake
def _(streams: Tensor, pre: Tensor) -> Tensor:
    return streams.new_empty(streams.shape[0], streams.shape[2])


@aggregate_backward_op.register_fake
def _(
    grad: Tensor, streams: Tensor, pre: Tensor, need_streams: bool, need_pre: bool
) -> tuple[Tensor, Tensor]:
    return (
        streams.new_empty(streams.shape) if need_streams else empty(streams),
        pre.new_empty(pre.shape) if need_pre else empty(streams),
    )


def _setup_aggregate(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.constants = ()


def _aggregate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if transforming():
        return plain_gradients(reference.aggregate_forward, ctx, 2, (grad,))
    needs = ctx.needs_input_grad
    grads = aggregate_backward_op(grad, *ctx.saved_tensors, needs[0], needs[1])
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


aggregate_op.register_autograd(_aggregate_backward, setup_context=_setup_aggregate)


@operator("merge_streams")
def merge_op(streams: Tensor, output: Tensor, residual: Tensor, post: Tensor) -> Tensor:
    """[T, n, C], [T, C], [T, n, n], [T, n] -> [T, n, C]."""
    return backend_of(streams, residual, post).merge_forward(streams, output, residual, post)


@operator("merge_streams_backward")
def merge_backward_op(
    grad: Tensor,
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    need_streams: bool,
    need_output: bool,
    need_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four operands; an empty tensor for one that is not needed."""
    grads = backend_of(streams, residual, post).merge_backward(
        grad, streams, output, residual, post, need_streams, need_output, need_coefficients
    )
    streams_grad, output_grad, residual_grad, post_grad = (
        empty(grad) if g is None else g for g in grads
    )
    return streams_grad, output_grad, residual_grad, post_grad


@merge_op.register_fake
def _(streams: Tensor, output: Tensor, residual: Tensor, post: Tensor) -> Tensor:
    return streams.new_empty(streams.shape)


@merge_backward_op.register_fake
def _(
    grad: Tensor,
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    need_streams: bool,
    need_output: bool,
    need_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        streams.new_empty(streams.shape) if need_streams else empty(streams),
        output.new_empty(output.shape) if need_output else empty(streams),
        residual.new_empty(residual.shape) if need_coefficients else empty(streams),
        post.new_empty(post.shape) if need_coefficients else empty(streams),
    )


def _setup_merge(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.constants = ()


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if transforming():
        return plain_gradients(reference.merge_forward, ctx, 4, (grad,))
    needs = ctx.needs_input_grad
    grads = merge_backward_op(grad, *ctx.saved_tensors, needs[0], needs[1], needs[2] or needs[3])
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


merge_op.register_autograd(_merge_backward, setup_context=_setup_merge)
