"""Tensors whose rows lie on several processes, made whole in the first of these."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mhc_lightning.modules.initialisation import held_range, held_rows, row_cuts


def whole_tensors(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Tensors by name, one after another; all processes that share them call this.

    A DTensor that is sharded by rows is whole on the CPU of the first of its processes. The others
    send their rows, and get these again.
    """
    for name, tensor in tensors.items():
        yield name, _whole(tensor) if isinstance(tensor, DTensor) else tensor.detach()


def _whole(tensor: DTensor) -> Tensor:
    part, first = held_rows(tensor.detach())
    cuts, device = row_cuts(tensor), part.device
    while cuts:
        dimension = cuts.pop()
        if tensor.device_mesh.size(dimension) == 1:
            continue
        group = tensor.device_mesh.get_group(dimension)
        if tensor.device_mesh.get_local_rank(dimension) > 0:
            _send(part.to(device), first, group)
            return part
        _, count = held_range(tensor, cuts)  # of all processes of the group
        part = _received(part, first, count, group, device)
    return part


def _send(part: Tensor, first: int, group: dist.ProcessGroup) -> None:
    """Send rows to the first process of a group."""
    device = part.device
    dist.send(torch.tensor([first, len(part)], device=device), group=group, group_dst=0)
    if len(part):
        dist.send(part.contiguous(), group=group, group_dst=0)


def _received(
    part: Tensor, first: int, count: int, group: dist.ProcessGroup, device: torch.device
) -> Tensor:
    """The rows of all processes of a group, `count` from `first` on, on the CPU of its first."""
    whole = torch.empty((count, *part.shape[1:]), dtype=part.dtype, device="cpu")
    whole[: len(part)] = part
    for source in range(1, dist.get_world_size(group)):
        place = torch.empty(2, dtype=torch.int64, device=device)
        dist.recv(place, group=group, group_src=source)
        start, number = place.tolist()
        if number:
            rows = torch.empty((number, *part.shape[1:]), dtype=part.dtype, device=device)
            dist.recv(rows, group=group, group_src=source)
            whole[start - first : start - first + number] = rows
    return whole
