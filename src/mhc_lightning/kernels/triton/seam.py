"""The seam of two sub-layers by kernels: one pass for the merge and the next projection."""

from torch import Tensor

from mhc_lightning.kernels.record import MappingGrads, StreamMappings
from mhc_lightning.kernels.rule import Rule
from mhc_lightning.kernels.triton.merge_project import merge_project
from mhc_lightning.kernels.triton.merge_project_backward import merge_project_backward
from mhc_lightning.kernels.triton.reading import coefficient_grads, mappings_of


def seam_forward(
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, StreamMappings, Tensor, Tensor]:
    """What ``unfused_seam.seam_forward`` computes."""
    new, read, products, squares, weights = merge_project(
        streams, output, residual, post, phi, alpha, bias, carry, rule.eps
    )
    shape = (streams.shape[1], streams.shape[2])
    mappings, raw, inverse_rms = mappings_of(products, squares, alpha, bias, shape, rule)
    if carry is None:
        # To the bit what was read with, so that a replay gives the same.
        mappings = mappings._replace(pre=weights)
    return new, read, mappings, raw, inverse_rms


def seam_backward(
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
    grads: MappingGrads,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What ``unfused_seam.seam_backward`` computes."""
    single_pass = carry is not None
    raw_grad, scale, alpha_grad, bias_grad = coefficient_grads(
        *(new, alpha, bias, pre, raw, inverse_rms),
        None if single_pass else read_grad,
        grads,
        rule,
    )
    *merged, phi_grad, carry_grad = merge_project_backward(
        *(streams, output, residual, post, phi, raw_grad, scale),
        pre if carry is None else carry,
        read_grad,
        new_grad,
        single_pass,
    )
    streams_grad, output_grad, residual_grad, post_grad = merged
    return (
        *(streams_grad, output_grad, residual_grad, post_grad),
        *(phi_grad, alpha_grad, bias_grad, carry_grad),
    )
