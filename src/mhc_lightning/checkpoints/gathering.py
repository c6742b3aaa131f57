"""Tensors whose rows lie on several processes, made whole in the first of these."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mhc_lightning.modules.initialisation import held_rows


def whole_tensors(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Tensors by name, one after another; all processes that share them call this.

    A DTensor that is sharded by rows is whole on the CPU of the first of its processes. The others
    send their rows, and get these again.
    """
    for name, tensor in tensors.items():
        yield name, _whole(tensor) if isinstance(tensor, DTensor) else tensor.detach()


def _whole(tensor: DTensor) -> Tensor:
    part, first = held_rows(tensor.detach())
    split = [k for k, place in enumerate(tensor.placements) if place.is_shard()]
    if not split or tensor.device_mesh.size(split[0]) == 1:
        return part
    group = tensor.device_mesh.get_group(split[0])
    if dist.get_rank(group) > 0:
        dist.send(torch.tensor([first, len(part)], device=part.device), group=group, group_dst=0)
        if len(part):
            dist.send(part.contiguous(), group=group, group_dst=0)
        return part
    whole = torch.empty(tensor.shape, dtype=part.dtype, device="cpu")
    whole[first : first + len(part)] = part
    for source in range(1, dist.get_world_size(group)):
        place = torch.empty(2, dtype=torch.int64, device=part.device)
        dist.recv(place, group=group, group_src=source)
        start, count = place.tolist()
        if count:
            rows = torch.empty((count, *tensor.shape[1:]), dtype=part.dtype, device=part.device)
            dist.recv(rows, group=group, group_src=source)
            whole[start : start + count] = rows
    return whole
