"""Experts spread over processes that are carved out of the data-parallel ones."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from mhc_lightning.modules import MixtureOfExperts
from mhc_lightning.strategies.expert_exchange import ExpertExchange


def expert_mesh(device_type: str, size: int, ranks: Tensor) -> DeviceMesh:
    """The mesh (`expert_replica`, `expert`, `pipeline`) of all processes.

    Args:
        device_type: Of the processes' devices.
        size: The processes that share the experts.
        ranks: `layout.ranks_of` the processes, [data-parallel, pipeline].
    """
    names = ("expert_replica", "expert", "pipeline")
    return DeviceMesh(device_type, ranks.unflatten(0, (-1, size)), mesh_dim_names=names)


def spread_experts(mixture: MixtureOfExperts, experts: DeviceMesh, **settings: Any) -> None:
    """Leave of a mixture the experts that this process holds, and shard all of it (FSDP2).

    Experts are sharded over the processes that hold the same ones, all else over all of them.

    Args:
        mixture: Whole; it may be on `meta`.
        experts: The mesh of `expert_mesh`.
        settings: Those of `fully_shard`, with the `mesh` of all else.
    """
    share, replicas = experts["expert"], experts["expert_replica"]
    for name in mixture.matrices:
        whole = getattr(mixture, name)
        each = whole.shape[0] // share.size()
        held: Any = whole.detach().narrow(0, share.get_local_rank() * each, each)
        held = held.clone() if held.is_meta else held.to(share.device_type, copy=True)
        part = DTensor.from_local(
            held, share, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        setattr(mixture, name, nn.Parameter(part, whole.requires_grad))
    mixture.exchange = ExpertExchange(share)
    others: list[nn.Module] = [mixture.router]
    if mixture.shared is not None:
        others.append(mixture.shared)
    fully_shard(others, **settings)
    fully_shard(mixture, **{**settings, "mesh": replicas})
