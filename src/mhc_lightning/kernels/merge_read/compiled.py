"""Merging and reading by compiled kernels: one pass over the streams in each direction."""

import torch
from torch import Tensor

from mhc_lightning.kernels.compiled_support.library import call, readable, result, view
from mhc_lightning.kernels.mappings import MappingGrads, MappingRule
from mhc_lightning.kernels.merge_read.operands import (
    MergeReadGrads,
    MergeReadOperands,
    MergeReadResults,
)
from mhc_lightning.kernels.read.compiled import dense_grads, new_grads, new_results, reading
from mhc_lightning.kernels.read.operands import Projection, ReadNeeds


def merge_read_forward(operands: MergeReadOperands, rule: MappingRule) -> MergeReadResults:
    """Compute what `by_parts.merge_read_forward` does."""
    streams, output, residual, post = operands.merge
    new = streams.new_empty(streams.shape)
    to_read = operands.read(new)
    results = new_results(to_read, rule, want_read=True)
    call(
        "merge_read_forward",
        residual.dtype,
        view(streams),
        view(readable(output)),
        residual.contiguous(),
        post.contiguous(),
        result(new),
        reading(to_read, rule),
        result(results.read),
        *results[1:],
        streams=streams,
    )
    return MergeReadResults(new, *results)


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
    streams, output, residual, post = operands.merge
    to_read = operands.read(new)
    needs = ReadNeeds(streams=False, phi=True, carry=True)
    of_read = new_grads(to_read, needs, read_grad)
    streams_grad = streams.new_empty(streams.shape)
    output_grad = readable(output).new_empty(output.shape)
    residual_grad = torch.empty_like(residual, memory_format=torch.contiguous_format)
    post_grad = torch.empty_like(post, memory_format=torch.contiguous_format)
    call(
        "merge_read_backward",
        residual.dtype,
        view(streams),
        view(readable(output)),
        residual.contiguous(),
        post.contiguous(),
        reading(to_read, rule),
        *(tensor.contiguous() for tensor in projection),
        None if new_grad is None else view(readable(new_grad)),
        None if read_grad is None else view(readable(read_grad)),
        *dense_grads(grads),
        result(streams_grad),
        result(output_grad),
        residual_grad,
        post_grad,
        *of_read[1:],
        streams=streams,
    )
    of_merge = (streams_grad, output_grad.to(output.dtype), residual_grad, post_grad)
    return MergeReadGrads._make((*of_merge, *of_read[1:]))
