"""Merging and reading one after the other, by the merge and the read of one implementation."""

from types import ModuleType

from torch import Tensor

from mhc_lightning.kernels.mappings import MappingGrads, MappingRule
from mhc_lightning.kernels.merge_read.operands import (
    MergeReadGrads,
    MergeReadOperands,
    MergeReadResults,
)
from mhc_lightning.kernels.read.operands import Projection, ReadNeeds


def merge_read_forward(
    merge: ModuleType, read: ModuleType, operands: MergeReadOperands, rule: MappingRule
) -> MergeReadResults:
    """The new streams, and the results of reading them.

    Args:
        merge: `kernels.merge.reference` or `kernels.merge.triton`.
        read: `kernels.read.reference` or `kernels.read.triton`.
        operands: The operands of both.
        rule: The next connection's rule.
    """
    new = merge.merge_forward(*operands.merge)
    return MergeReadResults(new, *read.read_forward(operands.read(new), rule, want_read=True))


def merge_read_backward(
    merge: ModuleType,
    read: ModuleType,
    operands: MergeReadOperands,
    new: Tensor,
    projection: Projection,
    new_grad: Tensor | None,
    read_grad: Tensor | None,
    grads: MappingGrads,
    rule: MappingRule,
) -> MergeReadGrads:
    """Gradients of all operands.

    Args:
        merge: As in `merge_read_forward`.
        read: As in `merge_read_forward`.
        operands: As in `merge_read_forward`.
        new: The new streams [T, n, C].
        projection: Results of `merge_read_forward`.
        new_grad: Gradient of the new streams [T, n, C].
        read_grad: Gradient of the next input [T, C].
        grads: Gradients of the next mappings.
        rule: As in `merge_read_forward`.
    """
    total, *others = read.read_backward(
        *(operands.read(new), projection, new_grad, read_grad, grads, rule),
        ReadNeeds(streams=True, phi=True, carry=True),
    )
    of_merge = merge.merge_backward(total, *operands.merge, True, True, True)
    return MergeReadGrads._make((*of_merge, *others))
