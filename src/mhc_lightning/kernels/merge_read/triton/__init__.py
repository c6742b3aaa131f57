"""Merging and reading by kernels: fused into one pass over the streams where that fits the chip."""

from torch import Tensor

from mhc_lightning.kernels.backend import fuses_seams
from mhc_lightning.kernels.mappings import MappingGrads, MappingRule
from mhc_lightning.kernels.merge import triton as merge
from mhc_lightning.kernels.merge_read import by_parts
from mhc_lightning.kernels.merge_read.operands import (
    MergeReadGrads,
    MergeReadOperands,
    MergeReadResults,
)
from mhc_lightning.kernels.merge_read.triton.merge_project import merge_project
from mhc_lightning.kernels.merge_read.triton.merge_project_backward import merge_project_backward
from mhc_lightning.kernels.read import triton as read
from mhc_lightning.kernels.read.operands import Projection


def merge_read_forward(operands: MergeReadOperands, rule: MappingRule) -> MergeReadResults:
    """Compute what `by_parts.merge_read_forward` does."""
    streams, _, residual, _, phi, alpha, bias, carry = operands
    if not fuses_seams(streams, phi, residual):
        return by_parts.merge_read_forward(merge, read, operands, rule)
    new, read_by, products, squares, weights = merge_project(*operands, rule.eps)
    shape = (streams.shape[1], streams.shape[2])
    mappings, raw, inverse_rms = read.mappings_of(products, squares, alpha, bias, shape, rule)
    if carry is None:
        # Bit for bit what the streams were read with, so that a replay gives the same.
        mappings = mappings._replace(pre=weights)
    return MergeReadResults(new, read_by, *mappings, raw, inverse_rms)


def merge_read_backward(
    operands: MergeReadOperands,
    new: Tensor,
    projection: Projection,
    new_grad: Tensor | None,
    read_grad: Tensor | None,
    grads: MappingGrads,
    rule: MappingRule,
) -> MergeReadGrads:
    """Compute what `by_parts.merge_read_backward` does."""
    *_, phi, _, _, carry = operands
    if not fuses_seams(operands.streams, phi, operands.residual):
        given = (operands, new, projection, new_grad, read_grad, grads, rule)
        return by_parts.merge_read_backward(merge, read, *given)
    single_pass = carry is not None
    raw_grad, scale, alpha_grad, bias_grad = read.coefficient_grads(
        *(operands.read(new), projection, None if single_pass else read_grad, grads, rule)
    )
    *of_merge, phi_grad, carry_grad = merge_project_backward(
        *(*operands.merge, phi, raw_grad, scale),
        projection.pre if carry is None else carry,
        read_grad,
        new_grad,
        single_pass,
    )
    return MergeReadGrads._make((*of_merge, phi_grad, alpha_grad, bias_grad, carry_grad))
