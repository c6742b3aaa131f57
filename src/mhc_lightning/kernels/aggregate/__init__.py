"""Reading a sub-layer's input from the streams with given weights."""

from typing import Any

from torch import Tensor

from mhc_lightning.kernels.aggregate import reference
from mhc_lightning.kernels.argument_checks import check_shape
from mhc_lightning.kernels.backend import implementation
from mhc_lightning.kernels.precision import compute_dtype, full_precision
from mhc_lightning.kernels.registration import operator
from mhc_lightning.kernels.transforms import plain_gradients, transformable, transforming


def aggregate_streams(streams: Tensor, pre: Tensor) -> Tensor:
    """Read a sub-layer's input from the streams: `Σ_j pre[j] · streams[j]`.

    Args:
        streams: [..., n, C].
        pre: Read weights [..., n].

    Returns:
        [..., C] in the dtype of `streams`, accumulated in float32.

    Raises:
        ValueError: If the shapes don't fit.
    """
    *leading, n, width = streams.shape
    check_shape("pre", pre, [*leading, n], streams)
    weights = pre.reshape(-1, n).to(compute_dtype(streams, pre))
    run = transformable(aggregate_op, reference.aggregate_forward)
    with full_precision(streams):
        read = run(streams.reshape(-1, n, width), weights)
    return read.reshape(*leading, width)


@operator("aggregate_streams")
def aggregate_op(streams: Tensor, pre: Tensor) -> Tensor:
    """[T, n, C], [T, n] -> [T, C]."""
    return implementation("aggregate", streams, pre).aggregate_forward(streams, pre)


@operator("aggregate_streams_backward")
def aggregate_backward_op(
    grad: Tensor, streams: Tensor, pre: Tensor, need_streams: bool, need_pre: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of streams and pre."""
    kernels = implementation("aggregate", streams, pre)
    return kernels.aggregate_backward(grad, streams, pre, need_streams, need_pre)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.constants = ()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if transforming():
        return plain_gradients(reference.aggregate_forward, ctx, 2, (grad,))
    needs = ctx.needs_input_grad
    grads = aggregate_backward_op(grad, *ctx.saved_tensors, *needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


aggregate_op.register_autograd(_backward, setup_context=_setup_context)
