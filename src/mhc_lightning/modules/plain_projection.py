"""Projections that compute `x · weightᵀ` and nothing else, so that they may be fused."""

from torch import Tensor, nn


def plain_weight(projection: nn.Module) -> Tensor | None:
    """The weight [out, in] of a projection whose call is `x · weightᵀ`; None for any other.

    Code that fuses the product must call any other projection: one with an adapter around it, a
    bias, hooks, a parametrization, a quantised or sharded weight, or its own `forward`. Hooks with
    a true attribute `only_observes` do not count, so that watching changes nothing.
    """
    # A parametrization, and FSDP2, change the class.
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
    # DTensor and quantised tensors define products with themselves.
    return None if hasattr(projection.weight, "__tensor_flatten__") else projection.weight
