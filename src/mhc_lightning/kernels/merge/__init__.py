"""Mixing the streams and writing a sub-layer's output to them with given mappings."""

from typing import Any

from torch import Tensor

from mhc_lightning.kernels.argument_checks import check_shape
from mhc_lightning.kernels.backend import implementation
from mhc_lightning.kernels.merge import reference
from mhc_lightning.kernels.observers import note_merge
from mhc_lightning.kernels.precision import compute_dtype, full_precision
from mhc_lightning.kernels.registration import operator
from mhc_lightning.kernels.transforms import plain_gradients, transformable, transforming


def merge_streams(streams: Tensor, output: Tensor, residual: Tensor, post: Tensor) -> Tensor:
    """Mix the streams and write a sub-layer's output to them (arXiv 2512.24880, eq. 3).

    `new[i] = Σ_j residual[i, j] · streams[j] + post[i] · output`

    Args:
        streams: [..., n, C].
        output: The sub-layer's output [..., C].
        residual: Mixing matrices [..., n, n].
        post: Write weights [..., n].

    Returns:
        [..., n, C] in the dtype of `streams`, accumulated in float32.

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


@operator("merge_streams")
def merge_op(streams: Tensor, output: Tensor, residual: Tensor, post: Tensor) -> Tensor:
    """[T, n, C], [T, C], [T, n, n], [T, n] -> [T, n, C]."""
    kernels = implementation("merge", streams, residual, post)
    return kernels.merge_forward(streams, output, residual, post)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of streams, output, residual and post."""
    return implementation("merge", streams, residual, post).merge_backward(
        grad, streams, output, residual, post, need_streams, need_output, need_coefficients
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.constants = ()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if transforming():
        return plain_gradients(reference.merge_forward, ctx, 4, (grad,))
    needs = ctx.needs_input_grad
    grads = merge_backward_op(grad, *ctx.saved_tensors, needs[0], needs[1], needs[2] or needs[3])
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


merge_op.register_autograd(_backward, setup_context=_setup_context)
