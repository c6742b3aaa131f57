"""The operator across the seam of two sub-layers: merge the one's output, read for the other."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mhc_lightning.kernels import reference, unfused_seam
from mhc_lightning.kernels.backend import backend_of, fuses_seams
from mhc_lightning.kernels.operands import check_shape, compute_dtype, full_precision
from mhc_lightning.kernels.reading import manifold_rule, mappings_by_token
from mhc_lightning.kernels.record import MappingGrads, StreamMappings, note_merge
from mhc_lightning.kernels.rule import Mix, Rule
from mhc_lightning.kernels.transforms import (
    operator,
    plain_gradients,
    transformable,
    transforming,
)


def merge_and_read(
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None = None,
    num_iterations: int = 20,
    eps: float = 1e-20,
    mix: Mix | None = None,
) -> tuple[Tensor, Tensor, StreamMappings]:
    """``merge_streams`` for one sub-layer and ``read_streams`` for the next, as one step.

    By kernels it moves (3n + 2)·C elements per token forward and (4n + 4)·C backward, where the
    two steps move (4n + 2)·C and more. With ``carry``, the new streams are read with mappings that
    are known already (single-pass mHC, arXiv 2609.19969), in (2n + 2)·C and (3n + 3)·C.

    Args:
        streams: [..., n, C].
        output: The sub-layer's output [..., C].
        residual: Its mixing matrices [..., n, n].
        post: Its write weights [..., n].
        phi: The next connection's projection [n·C, n² + 2n], or [n·C, 2n + m] with ``mix``.
        alpha: The next connection's gates [3].
        bias: The next connection's biases [n² + 2n], or [2n + m].
        carry: Weights [..., n] to read the new streams with; by default their own ``pre``.
        num_iterations: Sinkhorn iterations, at least 1.
        eps: Added to the mean square, inside the square root.
        mix: As in ``stream_mappings``, for the next connection.

    Returns:
        The new streams [..., n, C], the next sub-layer's input [..., C], and the mappings that the
        new streams yield.

    Raises:
        ValueError: If the shapes don't fit or ``num_iterations`` < 1.
    """
    *leading, n, width = streams.shape
    rule = manifold_rule(streams, phi, alpha, bias, num_iterations, eps, mix)
    check_shape("output", output, [*leading, width], streams)
    check_shape("residual", residual, [*leading, n, n], streams)
    check_shape("post", post, [*leading, n], streams)
    if carry is not None:
        check_shape("carry", carry, [*leading, n], streams)
        carry = carry.reshape(-1, n)
    dtype = compute_dtype(streams, residual, post, phi, alpha, bias)
    coefficients = (residual.reshape(-1, n, n), post.reshape(-1, n), phi, alpha, bias, carry)
    run = transformable(merge_and_read_op, _plain)
    with full_precision(streams):
        new, read, pre, next_post, next_residual, *_ = run(
            streams.reshape(-1, n, width),
            output.reshape(-1, width),
            *(None if c is None else c.to(dtype) for c in coefficients),
            *rule,
        )
        mappings = mappings_by_token(leading, pre, next_post, next_residual, mix)
    new = new.reshape(streams.shape)
    note_merge(residual, new)
    return new, read.reshape(*leading, width), mappings


def _plain(
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    rule: str,
    num_iterations: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """What the operator returns that has gradients, in plain torch."""
    new, read, mappings, _, _ = unfused_seam.seam_forward(
        *(reference, streams, output, residual, post, phi, alpha, bias, carry),
        Rule(rule, num_iterations, eps),
    )
    return new, read, *mappings


def _kernels(streams: Tensor, *coefficients: Tensor) -> tuple[Callable, Callable]:
    backend = backend_of(streams, *coefficients)
    if fuses_seams(streams, *coefficients):
        return backend.seam_forward, backend.seam_backward
    parts = unfused_seam.seam_forward, unfused_seam.seam_backward
    return partial(parts[0], backend), partial(parts[1], backend)


@operator("merge_and_read")
def merge_and_read_op(
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    rule: str,
    num_iterations: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """New streams, input, pre, post, residual, raw coefficients, inverse norms."""
    seam_forward, _ = _kernels(streams, phi, residual)
    new, read, mappings, raw, inverse_rms = seam_forward(
        *(streams, output, residual, post, phi, alpha, bias, carry),
        Rule(rule, num_iterations, eps),
    )
    return new, read, *mappings, raw, inverse_rms


@operator("merge_and_read_backward")
def merge_and_read_backward_op(
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    new: Tensor,
    pre: Tensor,
    raw: Tensor,
    inverse_rms: Tensor,
    new_grad: Tensor | None,
    read_grad: Tensor | None,
    pre_grad: Tensor | None,
    post_grad: Tensor | None,
    residual_grad: Tensor | None,
    rule: str,
    num_iterations: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the eight operands; that of a carry without gradient is zero, or empty."""
    _, seam_backward = _kernels(streams, phi, residual)
    *grads, carry_grad = seam_backward(
        *(streams, output, residual, post, phi, alpha, bias, carry, new, pre, raw, inverse_rms),
        *(new_grad, read_grad),
        MappingGrads(pre_grad, post_grad, residual_grad),
        Rule(rule, num_iterations, eps),
    )
    if carry_grad is None:
        carry_grad = streams.new_empty(0) if carry is None else torch.zeros_like(carry)
    return *grads, carry_grad


@merge_and_read_op.register_fake
def _(
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    rule: str,
    num_iterations: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, n, width = streams.shape
    logits = (phi.shape[1] - 2 * n,)
    return (
        streams.new_empty(streams.shape),
        streams.new_empty(tokens, width),
        phi.new_empty(tokens, n),
        phi.new_empty(tokens, n),
        phi.new_empty(tokens, *(logits if rule == "gates" else (n, n))),
        phi.new_empty(phi.shape[1], tokens),
        phi.new_empty(tokens),
    )


@merge_and_read_backward_op.register_fake
def _(
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    new: Tensor,
    pre: Tensor,
    raw: Tensor,
    inverse_rms: Tensor,
    new_grad: Tensor | None,
    read_grad: Tensor | None,
    pre_grad: Tensor | None,
    post_grad: Tensor | None,
    residual_grad: Tensor | None,
    rule: str,
    num_iterations: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        streams.new_empty(streams.shape),
        output.new_empty(output.shape),
        torch.empty_like(residual),
        torch.empty_like(post),
        torch.empty_like(phi),
        torch.empty_like(alpha),
        torch.empty_like(bias),
        streams.new_empty(0) if carry is None else torch.empty_like(carry),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    operands, ctx.constants = inputs[:8], inputs[8:]
    new, _, pre, _, _, raw, inverse_rms = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, new, pre, raw, inverse_rms)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if transforming():
        return plain_gradients(_plain, ctx, 8, grads[:5])
    results = merge_and_read_backward_op(*ctx.saved_tensors, *grads[:5], *ctx.constants)
    needs = ctx.needs_input_grad[:8]
    return *(g if need else None for g, need in zip(results, needs, strict=True)), None, None, None


merge_and_read_op.register_autograd(_backward, setup_context=_setup_context)
