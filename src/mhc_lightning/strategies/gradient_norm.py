"""The norm of all gradients of a network that is spread over processes."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def global_norm(
    parameters: Iterable[nn.Parameter], pipeline_group: dist.ProcessGroup | None = None
) -> Tensor:
    """The Euclidean norm of all gradients, a scalar that is the same on every process.

    Args:
        parameters: This process's; sharded ones count whole.
        pipeline_group: The processes that hold the other stages, if there are any.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if pipeline_group is not None:
        square = norm.double() ** 2
        dist.all_reduce(square, group=pipeline_group)
        norm = square.sqrt().to(norm.dtype)
    return norm


def clip_by_global_norm(
    parameters: Iterable[nn.Parameter], limit: float, pipeline_group: dist.ProcessGroup
) -> None:
    """Scale gradients so that the norm of all of them, over all stages, is at most ``limit``."""
    trained = [p for p in parameters if p.grad is not None]
    norm = global_norm(trained, pipeline_group)
    torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
