"""The norm of all gradients of a network that is spread over processes."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_LEAST = 1e-15  # the smallest norm for which float32 holds the squares


def global_norm(
    parameters: Iterable[nn.Parameter], pipeline_group: dist.ProcessGroup | None = None
) -> Tensor:
    """The Euclidean norm of all gradients, a scalar that is the same on every process.

    The dtype is float32, or the gradients' dtype if that is wider. The norm is right even if the
    dtype cannot hold the squares.

    Args:
        parameters: The parameters of this process; sharded ones count whole.
        pipeline_group: The processes of the pipeline, if there is one.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = _norm(grads, torch.float32, pipeline_group)
    if not _LEAST <= float(norm) < math.inf:
        norm = _norm(grads, torch.float64, pipeline_group).to(norm.dtype)
    return norm


def clip_by_global_norm(
    parameters: Iterable[nn.Parameter], limit: float, pipeline_group: dist.ProcessGroup
) -> None:
    """Scale gradients so that the norm of all of them, over all stages, is at most `limit`."""
    trained = [p for p in parameters if p.grad is not None]
    norm = global_norm(trained, pipeline_group)
    torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)


@torch.no_grad()
def _norm(
    grads: Sequence[Tensor], least: torch.dtype, pipeline_group: dist.ProcessGroup | None
) -> Tensor:
    """`global_norm`, summed in at least the given dtype."""
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(grad.dtype for grad in grads):  # one kernel for each
        alike = [grad for grad in grads if grad.dtype == dtype]
        norms += torch._foreach_norm(alike, 2, torch.promote_types(dtype, least))
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if pipeline_group is not None:
        square = norm.double() ** 2
        dist.all_reduce(square, group=pipeline_group)
        norm = square.sqrt().to(norm.dtype)
    return norm
