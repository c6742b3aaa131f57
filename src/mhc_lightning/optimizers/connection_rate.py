"""A learning rate of their own for connections: new ones beside a pretrained network, say."""

from torch import nn
from torch.optim import Optimizer

from mhc_lightning.modules import Connection


def scale_connections(optimizer: Optimizer, module: nn.Module, factor: float) -> None:
    """Multiply the learning rate of the connections' parameters, in place.

    They move to groups of their own, behind the others, with the other settings that they had. With
    a factor of 1 the groups stay as they are, and with them what older checkpoints hold.

    Args:
        optimizer: A new optimizer, without state, whose groups have an `lr`.
        module: The module that it trains.
        factor: What the learning rate is multiplied by.
    """
    if factor == 1:
        return
    own = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, Connection)
        for parameter in part.parameters()
    }
    for group in list(optimizer.param_groups):
        taken = [p for p in group["params"] if id(p) in own]
        if not taken:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in own]
        optimizer.add_param_group({**group, "params": taken, "lr": factor * group["lr"]})
