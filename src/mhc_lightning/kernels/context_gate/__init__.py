"""Gates that compare the streams with keys: how much of a memory each stream takes."""

from typing import Any

import torch
from torch import Tensor

from mhc_lightning.kernels.argument_checks import check_shape
from mhc_lightning.kernels.backend import implementation
from mhc_lightning.kernels.context_gate import reference
from mhc_lightning.kernels.context_gate.operands import GateGrads, GateOperands, GateResults
from mhc_lightning.kernels.precision import compute_dtype, full_precision
from mhc_lightning.kernels.registration import operator
from mhc_lightning.kernels.transforms import plain_gradients, transformable, transforming

_OPERANDS = len(GateOperands._fields)


def context_gates(
    streams: Tensor, key: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gates of each stream for a key of its own (arXiv 2601.07372, eq. 4; released code).

    With `rms(x)² = mean(x²) + eps` over C,

        s[i] = Σ_c streams[i] · key[i] · weight[i] / (rms(streams[i]) · rms(key[i]) · √C)
        gate[i] = σ(sign(s[i]) · √max(|s[i]|, 1e-6))

    Args:
        streams: [..., n, C].
        key: [..., n, C].
        weight: [n, C], the product of the weights of both norms.
        eps: Added to the mean squares.

    Returns:
        The streams, to go on with: their gradient is added up without a pass of its own. And the
        gates [..., n], float32.

    Raises:
        ValueError: If the shapes don't fit.
    """
    n, width = streams.shape[-2:]
    check_shape("key", key, list(streams.shape), streams)
    check_shape("weight", weight, [n, width], streams)
    run = transformable(_Gate.apply, _gate_plain)
    with full_precision(streams):
        kept, gate = run(streams, key, weight.to(compute_dtype(streams, key, weight)), eps)
    return kept, gate.reshape(streams.shape[:-1])


@operator("context_gates")
def gate_op(operands: GateOperands, eps: float) -> GateResults:
    """Gates, scores and inverse root mean squares."""
    kernels = implementation("context_gate", operands.streams, operands.weight[:, :1])
    return kernels.gate_forward(operands, eps)


@operator("context_gates_backward")
def gate_backward_op(
    operands: GateOperands,
    score: Tensor,
    inverse_rms: Tensor,
    key_inverse_rms: Tensor,
    kept_grad: Tensor | None,
    gate_grad: Tensor,
) -> GateGrads:
    """Gradients of the operands, with that of the kept streams in the streams'."""
    kernels = implementation("context_gate", operands.streams, operands.weight[:, :1])
    return kernels.gate_backward(
        operands, score, inverse_rms, key_inverse_rms, kept_grad, gate_grad
    )


class _Gate(torch.autograd.Function):
    """`gate_op` on streams [..., n, C], with the streams themselves as a further output."""

    @staticmethod
    def forward(ctx, streams, key, weight, eps):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.constants, ctx.shape = (eps,), streams.shape
        operands = (*(x.reshape(-1, *x.shape[-2:]) for x in (streams, key)), weight.contiguous())
        gate, *saved = gate_op(*operands, eps)
        ctx.save_for_backward(*operands, *saved)
        return streams.view_as(streams), gate

    @staticmethod
    def backward(ctx, kept_grad, gate_grad):  # type: ignore[no-untyped-def]
        if gate_grad is None:
            return kept_grad, None, None, None
        if kept_grad is not None:
            kept_grad = kept_grad.reshape(-1, *ctx.shape[-2:])
        grads = _gradients(ctx, kept_grad, gate_grad)
        shaped = (None if g is None else g.reshape(ctx.shape) for g in grads[:2])
        return *shaped, *grads[2:]


def _gradients(ctx: Any, kept_grad: Tensor | None, gate_grad: Tensor) -> tuple[Tensor | None, ...]:
    if transforming():
        return plain_gradients(_gate_plain, ctx, _OPERANDS, (kept_grad, gate_grad))
    results = gate_backward_op(*ctx.saved_tensors, kept_grad, gate_grad)
    needs = ctx.needs_input_grad
    return *(g if need else None for g, need in zip(results, needs, strict=False)), None


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.constants = inputs[_OPERANDS:]
    ctx.save_for_backward(*inputs[:_OPERANDS], *output[1:])


def _backward(ctx: Any, gate_grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, None, gate_grad)


# An exported program holds the operator without `_Gate`, and can be trained as well.
gate_op.register_autograd(_backward, setup_context=_setup_context)


def _gate_plain(streams: Tensor, key: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The streams and their gates in plain torch, for the transforms of `torch.func`."""
    flat, keys = (x.reshape(-1, *x.shape[-2:]) for x in (streams, key))
    return streams, reference.gate_forward(GateOperands(flat, keys, weight), eps).gate
