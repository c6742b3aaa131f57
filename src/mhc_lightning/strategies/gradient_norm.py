"""The norm of all gradients of a network that is spread over processes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mhc_lightning.modules.memory.row_store import row_store_of
from mhc_lightning.optimizers.meshes import by_mesh

_LEAST = 1e-15  # the smallest norm for which float32 holds the squares


def global_norm(
    parameters: Iterable[nn.Parameter], pipeline_group: dist.ProcessGroup | None = None
) -> Tensor:
    """The Euclidean norm of all gradients, a scalar that is the same on every process.

    The dtype is float32, or the gradients' dtype if that is wider. The norm is right even if the
    dtype cannot hold the squares. Row gradients of tables must be finished.

    Args:
        parameters: The parameters of this process; sharded ones count whole.
        pipeline_group: The processes of the pipeline, if there is one.
    """
    return fetched_norm(parameters, torch.zeros(()), pipeline_group)[0]


def fetched_norm(
    parameters: Iterable[nn.Parameter],
    value: Tensor,
    pipeline_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, float, float]:
    """`global_norm`; and as numbers, which the host waits for once: it, and another scalar."""
    trained = list(parameters)
    norm = _norm(trained, torch.float32, pipeline_group)
    here, fetched = torch.stack([norm, value.to(norm)]).tolist()
    if not _LEAST <= here < math.inf:
        norm = _norm(trained, torch.float64, pipeline_group).to(norm.dtype)
        here = float(norm)
    return norm, here, fetched


def clip_by_global_norm(
    parameters: Iterable[nn.Parameter], limit: float, pipeline_group: dist.ProcessGroup
) -> None:
    """Scale gradients so that the norm of all of them, over all stages, is at most `limit`."""
    trained = [p for p in parameters if p.grad is not None]
    clip_to_norm(trained, limit, global_norm(trained, pipeline_group))


@torch.no_grad()
def clip_to_norm(parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients, of which `norm` is the norm, so that it is at most `limit`."""
    dense, rows = _by_kind(parameters)
    for alike in by_mesh(dense):
        torch.nn.utils.clip_grads_with_norm_(alike, limit, norm)
    factor = (limit / (norm + 1e-6)).clamp(max=1)  # as torch's
    for parameter in rows:
        values = parameter.grad._values()  # type: ignore[union-attr]
        values.mul_(factor.to(values.device, values.dtype))


@contextmanager
def rows_clipped_to_value(
    parameters: Iterable[nn.Parameter], limit: float | None
) -> Iterator[None]:
    """Clamp the values of row gradients on both sides; within, only other gradients are there.

    torch and Lightning cannot clip sparse gradients.
    """
    kept = {p: p.grad for p in _by_kind(parameters)[1]}
    for parameter, grad in kept.items():
        if limit:
            grad._values().clamp_(-limit, limit)  # type: ignore[union-attr]
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in kept.items():
            parameter.grad = grad


def _by_kind(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that have dense gradients, and those that have row gradients."""
    trained = [(p, p.grad.is_sparse) for p in parameters if p.grad is not None]
    return [p for p, rows in trained if not rows], [p for p, rows in trained if rows]


@torch.no_grad()
def _norm(
    parameters: Sequence[nn.Parameter],
    least: torch.dtype,
    pipeline_group: dist.ProcessGroup | None,
) -> Tensor:
    """`global_norm`, summed in at least the given dtype."""
    dense, rows = _by_kind(parameters)
    grads: list[Tensor] = [p.grad for p in dense]  # type: ignore[misc]
    totals = [_dense_norm(alike, least) for alike in by_mesh(grads)]
    norm = torch.zeros(())
    if len(totals) == 1:
        norm = totals[0]
    elif totals:
        wide = max((total.dtype for total in totals), key=lambda dtype: dtype.itemsize)
        norm = torch.linalg.vector_norm(torch.stack([total.to(wide) for total in totals]))
    for table in rows:
        store = row_store_of(table)
        values = table.grad._values()  # type: ignore[union-attr]
        dtype = torch.promote_types(values.dtype, least)
        own = torch.linalg.vector_norm(values, dtype=dtype) if store is None else store.norm(dtype)
        norm = torch.linalg.vector_norm(torch.stack([norm.to(own.device, own.dtype), own]))
    if pipeline_group is not None:
        square = norm.double() ** 2
        dist.all_reduce(square, group=pipeline_group)
        norm = square.sqrt().to(norm.dtype)
    return norm


def _dense_norm(grads: Sequence[Tensor], least: torch.dtype) -> Tensor:
    """The norm of gradients that are sharded over the same processes, or of plain ones."""
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(grad.dtype for grad in grads):  # one kernel for each
        alike = [grad for grad in grads if grad.dtype == dtype]
        norms += torch._foreach_norm(alike, 2, torch.promote_types(dtype, least))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
