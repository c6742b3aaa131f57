"""Tensors by the mesh of processes over which they are sharded: torch's fused kernels take one."""

from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor
from torch.distributed.tensor import DTensor

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def by_mesh(tensors: Iterable[AnyTensor]) -> list[list[AnyTensor]]:
    """The tensors of each mesh, and the plain ones, in order; no empty lists.

    Experts that are spread over processes have another mesh than all else.
    """
    groups: dict[object, list[AnyTensor]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        groups.setdefault(mesh, []).append(tensor)
    return list(groups.values())
