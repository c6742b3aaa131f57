"""FSDP2 sharding of a Transformer: what is gathered together, in which precision, from where."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from mhc_lightning.modules import Connection, Transformer


def shard(
    model: Transformer,
    mesh: DeviceMesh,
    device: torch.device,
    param_dtype: torch.dtype | None = None,
) -> None:
    """Shard parameters, gradients and optimizer state over the devices of ``mesh``, in place.

    Each block is gathered for its own forward and backward pass only. Connections form groups of
    their own, because they compute in float32 whatever the rest is gathered in. A model built on
    ``meta`` gets memory and initial values shard by shard, so it never has to fit one device or
    process. The values are those of a model that was built whole from the same ``init_seed``.

    Args:
        model: The network.
        mesh: One-dimensional.
        device: Where a model on ``meta`` comes to life.
        param_dtype: What parameters are gathered in; None keeps theirs. Gradients are reduced in
            float32 either way.
    """
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    # Blocks hand float32 mappings to each other: nothing that enters them may be cast.
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, Connection) and next(module.parameters(), None) is not None:
                if on_meta:
                    module.to_empty(device=device)
                    module.reset_parameters()
                fully_shard(module, mesh=mesh)
                for method in ("read", "follow"):
                    register_fsdp_forward_method(module, method)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in ("loss", "token_losses", "forward_cached"):
        register_fsdp_forward_method(model, method)
    if on_meta:
        for module in model.modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if any(tensor.is_meta for tensor in own):
                module.to_empty(device=device, recurse=False)
        model.reset_parameters(held_rows)


def held_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that this process holds, in place, and the number of the first."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    # FSDP2 gives every process but the last ones equally many rows, as torch.chunk does.
    each = -(-tensor.shape[0] // tensor.device_mesh.size())
    first = min(each * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return tensor.to_local(), first


@torch.no_grad()
def load_rows(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a sharded module; each process reads the rows that it holds.

    Args:
        module: A module that was sharded.
        weights: A whole state dict of it, which may be mapped from a file.
    """
    for name, tensor in module.state_dict().items():
        rows, first = held_rows(tensor)
        rows.copy_(weights[name][first : first + len(rows)])
