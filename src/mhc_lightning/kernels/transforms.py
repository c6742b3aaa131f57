"""Operators within transforms of `torch.func` and forward-mode derivatives.

An operator is opaque: it has its own backward pass, but no rule for batching and none for tangents,
which torch then drops silently. So within a transform the public functions run the reference's
forward pass instead: plain torch, which can be batched and differentiated in both directions, any
number of times. If only the backward pass is transformed, the reference is differentiated there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mhc_lightning.kernels.precision import full_precision


def transforming() -> bool:
    """True within a transform of `torch.func` or a level of forward-mode derivatives."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def ordinary(tensor: Tensor) -> bool:
    """True if a tensor holds numbers and nothing records or replaces the calls on it.

    Results may be cached for later calls only then. A compiler, an export, a fake or another
    dispatch mode, or a transform would put tensors of its own kind into the cache.
    """
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not transforming()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def transformable(run: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, or within a transform `plain`, which does the same in torch alone."""
    return plain if transforming() else run


def plain_gradients(
    plain: Callable, ctx: Any, operands: int, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of an operator's inputs, by differentiating `plain` in its place.

    Args:
        plain: Takes the operator's inputs, and returns what has gradients.
        ctx: The context, whose `saved_tensors` begin with the operands, and whose `constants` are
            the other inputs.
        operands: Number of inputs that are tensors (or None); they come first.
        grads: Gradients of the results of `plain`, None for a result without gradient.
    """
    inputs = ctx.saved_tensors[:operands]
    needs = ctx.needs_input_grad
    wanted = [k for k in range(operands) if needs[k]]
    given = [k for k, grad in enumerate(grads) if grad is not None]
    if not given:
        return (None,) * len(needs)

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        changed = dict(zip(wanted, tensors, strict=True))
        outputs = plain(*(changed.get(k, t) for k, t in enumerate(inputs)), *ctx.constants)
        return tuple((outputs if isinstance(outputs, tuple) else (outputs,))[k] for k in given)

    with full_precision(inputs[0]):
        pull = torch.func.vjp(results, *(inputs[k] for k in wanted))[1]
        gradients = dict(zip(wanted, pull(tuple(grads[k] for k in given)), strict=True))
    return tuple(gradients.get(k) for k in range(len(needs)))
