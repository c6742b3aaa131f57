"""Projections that may be fused into another computation, since calling them does nothing else."""

from torch import Tensor, nn


def plain_weight(projection: nn.Module) -> Tensor | None:
    """The weight [out, in] of a projection whose call is ``x · weightᵀ``; None for any other.

    Whoever fuses the product must call what is not plain instead: an adapter around the projection,
    a bias, hooks, a parametrization, a quantised or sharded weight, or a forward of its own. Hooks
    that say ``only_observes`` of themselves do not count: watching is to change nothing.
    """
    # A parametrization, and FSDP2, make a class of their own.
    if type(projection) is not nn.Linear or projection.bias is not None:
        return None
    hooks = (
        projection._forward_pre_hooks,
        [h for h in projection._forward_hooks.values() if not getattr(h, "only_observes", False)],
        projection._backward_pre_hooks,
        projection._backward_hooks,
    )
    if any(hooks) or "forward" in vars(projection):
        return None
    # DTensor and quantised tensors: products with them are theirs to define.
    return None if hasattr(projection.weight, "__tensor_flatten__") else projection.weight
