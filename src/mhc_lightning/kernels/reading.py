"""The operators that compute a connection's mappings and read its sub-layer's input.

Reading also hands the streams on: the gradient that comes back through the merge is then added
inside the kernel that finishes the streams' gradient, and autograd never adds stream-sized tensors.
"""

from typing import Any

import torch
from torch import Tensor

from mhc_lightning.kernels import reference
from mhc_lightning.kernels.backend import backend_of
from mhc_lightning.kernels.operands import (
    check_iterations,
    check_shape,
    compute_dtype,
    empty,
    full_precision,
)
from mhc_lightning.kernels.record import MappingGrads, StreamMappings
from mhc_lightning.kernels.rule import Mix, Rule
from mhc_lightning.kernels.transforms import (
    operator,
    plain_gradients,
    transformable,
    transforming,
)


def stream_mappings(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    num_iterations: int = 20,
    eps: float = 1e-20,
    mix: Mix | None = None,
) -> StreamMappings:
    """Compute one connection's mappings for every token (arXiv 2512.24880, eqs. 7–9 and 14–19).

    The n streams of a token are normalised together, ``x / sqrt(mean(x²) + eps)``, projected by
    ``phi``, scaled by ``alpha``, shifted by ``bias`` (order: pre | post | residual, row-major), and
    passed through σ, 2σ and Sinkhorn-Knopp. Or through σ, 2σ and ``mix``, which sets the variants
    of mHC apart: there may then be any number m of coefficients instead of the last n².

    Args:
        streams: [..., n, C].
        phi: [n·C, n² + 2n], or [n·C, 2n + m].
        alpha: [3], the gates of pre, post and residual.
        bias: [n² + 2n], or [2n + m].
        num_iterations: Sinkhorn iterations, at least 1.
        eps: Added to the mean square, inside the square root.
        mix: Makes the residual mapping [..., n, n] of logits [..., m] in place of Sinkhorn-Knopp.

    Returns:
        Mappings of leading shape ``streams.shape[:-2]``, float32 (float64 if any operand is).

    Raises:
        ValueError: If the shapes don't fit or ``num_iterations`` < 1.
    """
    rule = manifold_rule(streams, phi, alpha, bias, num_iterations, eps, mix)
    return _read(streams, phi, alpha, bias, rule, want_read=False, mix=mix)[2]


def read_streams(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    num_iterations: int = 20,
    eps: float = 1e-20,
    carry: Tensor | None = None,
    mix: Mix | None = None,
) -> tuple[Tensor, Tensor, StreamMappings]:
    """``stream_mappings`` and ``aggregate_streams`` in one step.

    Args:
        streams: [..., n, C].
        phi: [n·C, n² + 2n], or [n·C, 2n + m] with ``mix``.
        alpha: [3].
        bias: [n² + 2n], or [2n + m].
        num_iterations: Sinkhorn iterations, at least 1.
        eps: Added to the mean square, inside the square root.
        carry: Weights [..., n] to aggregate with; by default the mappings' ``pre``.
        mix: As in ``stream_mappings``.

    Returns:
        The streams to merge into (the same values; use these, so that gradients accumulate here),
        the sub-layer's input [..., C], and the mappings.

    Raises:
        ValueError: If the shapes don't fit or ``num_iterations`` < 1.
    """
    rule = manifold_rule(streams, phi, alpha, bias, num_iterations, eps, mix)
    if carry is not None:
        check_shape("carry", carry, list(streams.shape[:-1]), streams)
    return _read(streams, phi, alpha, bias, rule, want_read=True, carry=carry, mix=mix)


def hyper_mappings(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, tanh: bool = True, eps: float = 1e-20
) -> StreamMappings:
    """Compute the dynamic mappings of Hyper-Connections for every token (arXiv 2409.19606).

    Each stream is normalised by itself and yields its own coefficients: with
    ``z[j] = act(streams[j] / rms(streams[j]) · phi)``,
    ``pre[j] = alpha[0] · z[j, 0] + b``, ``post[j] = alpha[1] · z[j, 1] + b`` and
    ``residual[i, j] = alpha[0] · z[j, 2 + i] + b`` (eq. 5 of arXiv 2512.24880).

    Args:
        streams: [..., n, C].
        phi: [C, n + 2], columns in the order pre | post | residual.
        alpha: [2]: the scale of pre and residual, and the scale of post.
        bias: The static mappings [n² + 2n] in the order pre | post | residual (row-major).
        tanh: Whether ``act`` is tanh or the identity.
        eps: Added to the mean square, inside the square root.

    Returns:
        Mappings of leading shape ``streams.shape[:-2]``, float32 (float64 if any operand is).

    Raises:
        ValueError: If the shapes don't fit.
    """
    rule = _hyper_rule(streams, phi, alpha, bias, tanh, eps)
    return _read(streams, phi, alpha, bias, rule, want_read=False)[2]


def read_hyper_streams(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, tanh: bool = True, eps: float = 1e-20
) -> tuple[Tensor, Tensor, StreamMappings]:
    """``hyper_mappings`` and ``aggregate_streams`` in one step; returns what ``read_streams`` does.

    Args:
        streams: [..., n, C].
        phi: [C, n + 2].
        alpha: [2].
        bias: [n² + 2n].
        tanh: Whether the dynamic part is bounded by tanh.
        eps: Added to the mean square, inside the square root.

    Raises:
        ValueError: If the shapes don't fit.
    """
    rule = _hyper_rule(streams, phi, alpha, bias, tanh, eps)
    return _read(streams, phi, alpha, bias, rule, want_read=True)


def manifold_rule(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    num_iterations: int,
    eps: float,
    mix: Mix | None,
) -> Rule:
    """MHC's rule or that of its variants, for operands that fit; ValueError otherwise."""
    n, width = streams.shape[-2:]
    count = n * n + 2 * n if mix is None else max(2 * n, phi.shape[-1])
    check_shape("phi", phi, [n * width, count], streams)
    check_shape("alpha", alpha, [3], streams)
    check_shape("bias", bias, [count], streams)
    check_iterations(num_iterations)
    return Rule("sinkhorn" if mix is None else "gates", num_iterations, eps)


def _hyper_rule(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, tanh: bool, eps: float
) -> Rule:
    n, width = streams.shape[-2:]
    check_shape("phi", phi, [width, n + 2], streams)
    check_shape("alpha", alpha, [2], streams)
    check_shape("bias", bias, [n * n + 2 * n], streams)
    return Rule("tanh" if tanh else "linear", 1, eps)


def _read(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    rule: Rule,
    want_read: bool,
    carry: Tensor | None = None,
    mix: Mix | None = None,
) -> tuple[Tensor, Tensor, StreamMappings]:
    *leading, n, width = streams.shape
    dtype = compute_dtype(streams, phi, alpha, bias)
    run = transformable(_Read.apply, _read_plain)
    with full_precision(streams):
        kept, read, pre, post, residual = run(
            streams,
            *(parameter.to(dtype).contiguous() for parameter in (phi, alpha, bias)),
            None if carry is None else carry.reshape(-1, n).to(dtype),
            *rule,
            want_read,
        )
        mappings = mappings_by_token(leading, pre, post, residual, mix)
    if want_read:
        read = read.reshape(*leading, width)
    return kept, read, mappings


def mappings_by_token(
    leading: list[int], pre: Tensor, post: Tensor, residual: Tensor, mix: Mix | None
) -> StreamMappings:
    """Give the mappings of T tokens their shape; with ``mix``, ``residual`` are logits [T, m]."""
    n = pre.shape[1]
    if mix is None:
        residual = residual.reshape(*leading, n, n)
    else:
        residual = mix(residual.reshape(*leading, residual.shape[1]))
        if list(residual.shape) != [*leading, n, n]:
            raise ValueError(f"mix must return {[*leading, n, n]}, not {list(residual.shape)}")
    return StreamMappings(pre.reshape(*leading, n), post.reshape(*leading, n), residual)


def _read_plain(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    rule: str,
    num_iterations: int,
    eps: float,
    want_read: bool,
) -> tuple[Tensor, ...]:
    flat = streams.reshape(-1, *streams.shape[-2:])
    read, mappings, _, _ = reference.read_forward(
        flat, phi, alpha, bias, carry, Rule(rule, num_iterations, eps), want_read
    )
    return streams, read, *mappings


class _Read(torch.autograd.Function):
    """``read_op`` on streams [..., n, C], with these as a further output.

    They are not made of the flat ones: to an exporter with sizes of its own, splitting tokens again
    would say something about them.
    """

    @staticmethod
    def forward(ctx, streams, phi, alpha, bias, carry, rule, num_iterations, eps, want_read):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        flat = streams.reshape(-1, *streams.shape[-2:])
        ctx.constants = (rule, num_iterations, eps, want_read)
        read, pre, post, residual, raw, inverse_rms = read_op(
            flat, phi, alpha, bias, carry, *ctx.constants
        )
        ctx.shape = streams.shape
        ctx.save_for_backward(flat, phi, alpha, bias, carry, pre, raw, inverse_rms)
        return streams.view_as(streams), read, pre, post, residual

    @staticmethod
    def backward(ctx, kept_grad, read_grad, *grads):  # type: ignore[no-untyped-def]
        if kept_grad is not None:
            kept_grad = kept_grad.reshape(-1, *ctx.shape[-2:])
        streams_grad, *others = _backward_of(ctx, kept_grad, read_grad, *grads)
        return None if streams_grad is None else streams_grad.reshape(ctx.shape), *others


@operator("read_streams")
def read_op(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    rule: str,
    num_iterations: int,
    eps: float,
    want_read: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Input [T, C] (empty unless wanted), pre, post, residual, raw coefficients, inverse norms."""
    read, mappings, raw, inverse_rms = backend_of(streams, phi).read_forward(
        streams, phi, alpha, bias, carry, Rule(rule, num_iterations, eps), want_read
    )
    return read, *mappings, raw, inverse_rms


@operator("read_streams_backward")
def read_backward_op(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    pre: Tensor,
    raw: Tensor,
    inverse_rms: Tensor,
    kept_grad: Tensor | None,
    read_grad: Tensor | None,
    pre_grad: Tensor | None,
    post_grad: Tensor | None,
    residual_grad: Tensor | None,
    rule: str,
    num_iterations: int,
    eps: float,
    need_streams: bool,
    need_phi: bool,
    need_carry: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five operands; an empty tensor for one that is not needed or not there."""
    streams_grad, phi_grad, alpha_grad, bias_grad, carry_grad = backend_of(
        streams, phi
    ).read_backward(
        *(streams, phi, alpha, bias, carry, pre, raw, inverse_rms, kept_grad, read_grad),
        MappingGrads(pre_grad, post_grad, residual_grad),
        Rule(rule, num_iterations, eps),
        need_streams,
        need_phi,
        need_carry,
    )
    if carry_grad is None and carry is not None and need_carry:
        carry_grad = torch.zeros_like(carry)
    return (
        empty(streams) if streams_grad is None else streams_grad,
        empty(streams) if phi_grad is None else phi_grad,
        alpha_grad,
        bias_grad,
        empty(streams) if carry_grad is None else carry_grad,
    )


@read_op.register_fake
def _(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    rule: str,
    num_iterations: int,
    eps: float,
    want_read: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, n, width = streams.shape
    rows = tokens * n if Rule(rule, num_iterations, eps).per_stream else tokens
    logits = (phi.shape[1] - 2 * n,)
    return (
        streams.new_empty(tokens, width) if want_read else streams.new_empty(0),
        phi.new_empty(tokens, n),
        phi.new_empty(tokens, n),
        phi.new_empty(tokens, *(logits if rule == "gates" else (n, n))),
        phi.new_empty(phi.shape[1], rows),
        phi.new_empty(rows),
    )


@read_backward_op.register_fake
def _(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    pre: Tensor,
    raw: Tensor,
    inverse_rms: Tensor,
    kept_grad: Tensor | None,
    read_grad: Tensor | None,
    pre_grad: Tensor | None,
    post_grad: Tensor | None,
    residual_grad: Tensor | None,
    rule: str,
    num_iterations: int,
    eps: float,
    need_streams: bool,
    need_phi: bool,
    need_carry: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        streams.new_empty(streams.shape) if need_streams else empty(streams),
        phi.new_empty(phi.shape) if need_phi else empty(streams),
        torch.empty_like(alpha),
        torch.empty_like(bias),
        torch.empty_like(carry) if carry is not None and need_carry else empty(streams),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    operands, ctx.constants = inputs[:5], inputs[5:]
    _, pre, _, _, raw, inverse_rms = output
    ctx.save_for_backward(*operands, pre, raw, inverse_rms)


def _backward(ctx: Any, read_grad: Tensor | None, *grads: Tensor | None) -> tuple:
    if read_grad is not None and read_grad.numel() == 0 and ctx.saved_tensors[0].numel() > 0:
        read_grad = None
    return _backward_of(ctx, None, read_grad, *grads[:3])


def _backward_of(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs, given those of kept streams, input and mappings."""
    if transforming():
        return plain_gradients(_read_plain, ctx, 5, grads)
    needs, rule = ctx.needs_input_grad[:5], ctx.constants[:3]
    results = read_backward_op(*ctx.saved_tensors, *grads, *rule, needs[0], needs[1], needs[4])
    return *(g if need else None for g, need in zip(results, needs, strict=True)), *[None] * 4


read_op.register_autograd(_backward, setup_context=_setup_context)
