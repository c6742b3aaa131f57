"""Merging for one sub-layer and reading for the next as one step: one pass over the streams."""

from typing import Any

import torch
from torch import Tensor

from mhc_lightning.kernels.argument_checks import check_shape
from mhc_lightning.kernels.backend import implementation
from mhc_lightning.kernels.mappings import MappingGrads, MappingRule, Mix, StreamMappings
from mhc_lightning.kernels.merge_read import reference
from mhc_lightning.kernels.merge_read.operands import (
    MergeReadGrads,
    MergeReadOperands,
    MergeReadResults,
)
from mhc_lightning.kernels.observers import note_merge
from mhc_lightning.kernels.precision import compute_dtype, full_precision
from mhc_lightning.kernels.read import manifold_rule, mappings_by_token
from mhc_lightning.kernels.read.operands import Projection
from mhc_lightning.kernels.registration import operator
from mhc_lightning.kernels.transforms import plain_gradients, transformable, transforming

_OPERANDS = len(MergeReadOperands._fields)


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
    """`merge_streams` for one sub-layer and `read_streams` for the next, as one step.

    Kernels move (3n + 2)·C elements per token forward and (4n + 4)·C backward, where the
    two steps move (4n + 2)·C and more. With `carry`, the new streams are read with mappings that
    are known already (single-pass mHC, arXiv 2609.19969): kernels then move (2n + 2)·C and
    (3n + 3)·C.

    Args:
        streams: [..., n, C].
        output: The sub-layer's output [..., C].
        residual: Its mixing matrices [..., n, n].
        post: Its write weights [..., n].
        phi: The next connection's projection [n·C, n² + 2n], or [n·C, 2n + m] with `mix`.
        alpha: The next connection's gates [3].
        bias: The next connection's biases [n² + 2n], or [2n + m].
        carry: Weights [..., n] to read the new streams with; by default their own `pre`.
        num_iterations: Sinkhorn iterations, at least 1.
        eps: Added to the mean square, inside the square root.
        mix: As in `stream_mappings`, for the next connection.

    Returns:
        The new streams [..., n, C], the next sub-layer's input [..., C], and the mappings that the
        new streams yield.

    Raises:
        ValueError: If the shapes don't fit or `num_iterations` < 1.
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
    run = transformable(merge_read_op, _plain)
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


@operator("merge_and_read")
def merge_read_op(operands: MergeReadOperands, rule: MappingRule) -> MergeReadResults:
    """Merge the output of one sub-layer, then read for the next."""
    streams, _, residual, _, phi, *_ = operands
    return implementation("merge_read", streams, phi, residual).merge_read_forward(operands, rule)


@operator("merge_and_read_backward")
def merge_read_backward_op(
    operands: MergeReadOperands,
    new: Tensor,
    projection: Projection,
    new_grad: Tensor | None,
    read_grad: Tensor | None,
    grads: MappingGrads,
    rule: MappingRule,
) -> MergeReadGrads:
    """Gradients of the operands; a carry that has no gradient gets zero."""
    streams, _, residual, _, phi, *_ = operands
    result = implementation("merge_read", streams, phi, residual).merge_read_backward(
        operands, new, projection, new_grad, read_grad, grads, rule
    )
    if operands.carry is not None and result.carry is None:
        result = result._replace(carry=torch.zeros_like(operands.carry))
    return result


def _plain(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator's results that have gradients, in plain torch."""
    operands, rule = arguments[:_OPERANDS], arguments[_OPERANDS:]
    results = reference.merge_read_forward(MergeReadOperands(*operands), MappingRule(*rule))
    return results[:5]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    operands, ctx.constants = inputs[:_OPERANDS], inputs[_OPERANDS:]
    new, _, pre, _, _, raw, inverse_rms = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, new, pre, raw, inverse_rms)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if transforming():
        return plain_gradients(_plain, ctx, _OPERANDS, grads[:5])
    results = merge_read_backward_op(*ctx.saved_tensors, *grads[:5], *ctx.constants)
    needs, constants = ctx.needs_input_grad[:_OPERANDS], (None,) * len(ctx.constants)
    return *(g if need else None for g, need in zip(results, needs, strict=True)), *constants


merge_read_op.register_autograd(_backward, setup_context=_setup_context)
