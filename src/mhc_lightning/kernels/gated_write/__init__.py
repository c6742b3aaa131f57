"""Adding a value to the streams, as far as their gates let it, with a short convolution of it."""

from typing import Any

from torch import Tensor

from mhc_lightning.kernels.argument_checks import check_shape
from mhc_lightning.kernels.backend import implementation
from mhc_lightning.kernels.gated_write import reference
from mhc_lightning.kernels.gated_write.operands import WriteGrads, WriteOperands
from mhc_lightning.kernels.precision import compute_dtype, full_precision
from mhc_lightning.kernels.registration import operator
from mhc_lightning.kernels.transforms import plain_gradients, transformable, transforming


def gated_write(
    streams: Tensor,
    value: Tensor,
    gate: Tensor,
    taps: Tensor | None = None,
    dilation: int = 1,
) -> Tensor:
    """Add a value to the streams by their gates (arXiv 2601.07372, section 2.3).

    With `v[i] = gate[i] · value` of stream i,

        new[i] = streams[i] + v[i] + SiLU(Σ_k taps[k, i] · norm(v[i]) (K - 1 - k) · dilation before)

    Norms are over C, with 1e-5 added to the mean square. Before the first position stands zero.

    Args:
        streams: [B, S, n, C].
        value: [B, P, C], P at least S; the positions before the streams' are seen by the
            convolution alone.
        gate: [B, P, n].
        taps: [K, n, C], the present position last; None to leave the convolution out.
        dilation: Positions from one tap to the next, at least 1.

    Returns:
        [B, S, n, C] in the dtype of `streams`, computed in float32.

    Raises:
        ValueError: If the shapes don't fit, P is neither S nor S + (K - 1) · dilation, or the
            dilation is below 1.
    """
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, not {dilation}")
    batch, length, n, width = streams.shape
    positions = value.shape[1]
    check_shape("value", value, [batch, positions, width], streams)
    check_shape("gate", gate, [batch, positions, n], streams)
    dtype = compute_dtype(streams, value, gate)
    if taps is not None:
        check_shape("taps", taps, [len(taps), n, width], streams)
        taps = taps.to(dtype).contiguous()
    reach = 0 if taps is None else (len(taps) - 1) * dilation
    if positions not in (length, length + reach):
        raise ValueError(
            f"value must have {length} or {length + reach} positions for streams of {length}, not"
            f" {positions}"
        )
    run = transformable(write_op, _write_plain)
    with full_precision(streams):
        return run(streams, value, gate.to(dtype), taps, dilation)


@operator("gated_write")
def write_op(streams: Tensor, operands: WriteOperands) -> Tensor:
    """[B, S, n, C] -> [B, S, n, C]."""
    return implementation("gated_write", streams, operands.gate).write_forward(streams, operands)


@operator("gated_write_backward")
def write_backward_op(grad: Tensor, operands: WriteOperands) -> WriteGrads:
    """Gradients of value, gate and taps, given that of the new streams."""
    return implementation("gated_write", grad, operands.gate).write_backward(grad, operands)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    streams, value, gate, taps, *ctx.constants = inputs
    # The streams themselves are not needed: but a transform of the backward pass asks for them.
    ctx.save_for_backward(streams, value, gate, taps)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if transforming():
        return plain_gradients(_write_plain, ctx, 4, (grad,))
    needs = ctx.needs_input_grad
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs[1:4]):
        grads = write_backward_op(grad, *ctx.saved_tensors[1:], *ctx.constants)
    return *(g if need else None for g, need in zip((grad, *grads), needs, strict=False)), None


write_op.register_autograd(_backward, setup_context=_setup_context)


def _write_plain(
    streams: Tensor, value: Tensor, gate: Tensor, taps: Tensor | None, dilation: int
) -> Tensor:
    return reference.write_forward(streams, WriteOperands(value, gate, taps, dilation))
