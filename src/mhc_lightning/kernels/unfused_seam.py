"""Across the seam of two sub-layers by parts: merge the one's output, then read for the other."""

from types import ModuleType

from torch import Tensor

from mhc_lightning.kernels.record import MappingGrads, StreamMappings
from mhc_lightning.kernels.rule import Rule


def seam_forward(
    kernels: ModuleType,
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
    """New streams, the next input, the next mappings, raw coefficients and inverse norms.

    ``kernels`` is the backend, ``kernels.reference`` or ``kernels.triton``.
    ``carry`` [T, n] are weights to read the new streams with; None reads with the new ones.
    """
    new = kernels.merge_forward(streams, output, residual, post)
    return new, *kernels.read_forward(new, phi, alpha, bias, carry, rule, want_read=True)


def seam_backward(
    kernels: ModuleType,
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
    """Gradients of streams, output, residual, post, phi, alpha, bias and carry."""
    total, phi_grad, alpha_grad, bias_grad, carry_grad = kernels.read_backward(
        *(new, phi, alpha, bias, carry, pre, raw, inverse_rms, new_grad, read_grad, grads, rule),
        need_streams=True,
        need_phi=True,
        need_carry=True,
    )
    assert total is not None and phi_grad is not None
    merged = kernels.merge_backward(total, streams, output, residual, post, True, True, True)
    streams_grad, output_grad, residual_grad, post_grad = merged
    assert streams_grad is not None and output_grad is not None
    assert residual_grad is not None and post_grad is not None
    return (
        *(streams_grad, output_grad, residual_grad, post_grad),
        *(phi_grad, alpha_grad, bias_grad, carry_grad),
    )
