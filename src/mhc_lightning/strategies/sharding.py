"""FSDP2 sharding of a Transformer: groups of parameters, their precision and initial values."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from mhc_lightning.modules import Connection, Transformer
from mhc_lightning.modules.connection import Unmerged
from mhc_lightning.modules.initialisation import reset_module
from mhc_lightning.planning.expert_parallel import experts_of
from mhc_lightning.strategies.expert_parallel import spread_experts
from mhc_lightning.strategies.layout import layout_of
from mhc_lightning.strategies.placements import place_tables
from mhc_lightning.strategies.sharded_rows import store_sharded_rows, tables_of


def shard(
    model: Transformer,
    mesh: DeviceMesh,
    device: torch.device,
    param_dtype: torch.dtype | None = None,
    experts: DeviceMesh | None = None,
) -> None:
    """Shard parameters, gradients and optimizer state over the devices of `mesh`, in place.

    Each block is gathered for its own forward and backward pass only. Connections form groups of
    their own, because they compute in float32 whatever `param_dtype` is. A model built on
    `meta` gets memory and initial values shard by shard, so it never has to fit one device or
    process. The values are those of a model that was built whole from the same `init_seed`. The
    tables of a memory are never gathered: see `sharded_rows`.

    Args:
        model: The network.
        mesh: One-dimensional.
        device: The device of a model that was built on `meta`.
        param_dtype: The dtype in which parameters are gathered; None keeps theirs. Gradients are
            reduced in float32 in any case.
        experts: The mesh of `expert_mesh`, over which routed experts are spread; None to shard
            them as all else.
    """
    tables = place_tables(model, tables_of(model).values(), mesh)
    shard_parts(model, model.blocks, mesh, param_dtype, ignored=tables, experts=experts)
    for method in ("loss", "token_losses", "forward_cached"):
        register_fsdp_forward_method(model, method)
    bring_to_life([model], device)
    store_sharded_rows(model)


def shard_by_mesh(module: pl.LightningModule, network: Transformer) -> None:
    """`shard` a module's network in `configure_model`, as its trainer's strategy asks for it.

    Any strategy that gives the module a device mesh will do: this package's or Lightning's.
    """
    assert module.device_mesh is not None
    strategy = module.trainer.strategy
    param_dtype = torch.bfloat16 if "bf16" in str(module.trainer.precision) else None
    data_parallel, experts = module.device_mesh["data_parallel"], layout_of(strategy).expert_mesh
    shard(network, data_parallel, strategy.root_device, param_dtype, experts)


def shard_parts(
    root: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    param_dtype: torch.dtype | None = None,
    *,
    reshard_after_forward: bool = True,
    ignored: set[nn.Parameter] | None = None,
    experts: DeviceMesh | None = None,
) -> None:
    """Shard the parameters below `root` in groups: each connection, each block, and the rest.

    Args:
        root: The module that is called.
        blocks: The blocks below it.
        mesh: One-dimensional.
        param_dtype: The dtype in which parameters are gathered; None keeps theirs.
        reshard_after_forward: True to free gathered parameters until the backward pass.
        ignored: Parameters that are left as they are.
        experts: The mesh of `expert_mesh`, over which routed experts are spread; None to shard
            them as all else.
    """
    # Blocks hand float32 mappings to each other: nothing that enters a block may be cast.
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    keep: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "ignored_params": ignored,
    }
    for block in blocks:
        for module in block.modules():
            if isinstance(module, Connection) and next(module.parameters(), None) is not None:
                fully_shard(module, **keep)
                _gather_around_calls(module)
        if experts is not None:
            for mixture in experts_of(block):
                spread_experts(mixture, experts, mp_policy=policy, **keep)
        fully_shard(block, mp_policy=policy, **keep)
    fully_shard(root, mp_policy=policy, **keep)


def bring_to_life(roots: Iterable[nn.Module], device: torch.device) -> None:
    """Give tensors on `meta` below `roots` memory and initial values, module by module.

    Args:
        roots: Modules, sharded or not.
        device: The device of the tensors.

    Raises:
        UserError: A module on `meta` has no `reset_parameters()`.
    """
    for name, module in (named for root in roots for named in root.named_modules()):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            module.to_empty(device=device, recurse=False)
            reset_module(module, name)


def _gather_around_calls(connection: Connection) -> None:
    """Have `read` and `follow` gather the parameters, once if one calls the other.

    FSDP2 takes the end of an inner call for the end of the outer one, and would free the parameters
    too early.
    """
    plain_read, plain_follow = connection.read, connection.follow

    def follow(unmerged: Unmerged) -> Any:
        connection.read = plain_read  # type: ignore[method-assign]
        try:
            return plain_follow(unmerged)
        finally:
            connection.read = gathering_read  # type: ignore[method-assign]

    register_fsdp_forward_method(connection, "read")
    gathering_read = connection.read
    connection.follow = follow  # type: ignore[method-assign]
    register_fsdp_forward_method(connection, "follow")
