"""FSDP2 sharding of a Transformer: what is gathered together, and in which precision."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

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
    ``meta`` gets memory and initial values shard by shard, so it never has to fit one device.

    Args:
        model: The network.
        mesh: One-dimensional.
        device: Where a model on ``meta`` comes to life.
        param_dtype: What parameters are gathered in; None keeps theirs. Gradients are reduced in
            float32 either way.
    """
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, Connection) and next(module.parameters(), None) is not None:
                if on_meta:
                    module.to_empty(device=device)
                    module.reset_parameters()
                fully_shard(module, mesh=mesh)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in ("loss", "token_losses", "forward_cached"):
        register_fsdp_forward_method(model, method)
    if on_meta:
        for module in model.modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if any(tensor.is_meta for tensor in own):
                module.to_empty(device=device, recurse=False)
        model.reset_parameters()
