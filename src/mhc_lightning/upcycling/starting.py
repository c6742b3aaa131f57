"""Connections that start as residual connections, for the place of one."""

from collections.abc import Callable

import torch
from torch import nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Connection

_TOLERANCE = 1e-5  # of the sums of weights, in float32


def started(
    connection: Callable[..., Connection],
    dim: int,
    num_streams: int,
    layer_index: int,
    like: nn.Module,
) -> Connection:
    """Build a connection that starts as a residual connection.

    Args:
        connection: Builds it from `dim`, `num_streams` and `layer_index`.
        dim: Width C.
        num_streams: n.
        layer_index: The number of the sub-layer in the network.
        like: A module whose device, training mode, and float64 it gets.

    Raises:
        UserError: It does not start as a residual connection, or `connection` builds none.
    """
    tensors = [t for t in (*like.parameters(), *like.buffers()) if t.is_floating_point()]
    device = tensors[0].device if tensors else torch.device("cpu")
    with torch.device(device):
        built = connection(dim=dim, num_streams=num_streams, layer_index=layer_index)
    if not isinstance(built, Connection):
        raise UserError(
            f"connection={connection} gives a {type(built).__name__}; it has to give a"
            " mhc_lightning.modules.Connection"
        )
    if tensors and tensors[0].dtype == torch.float64:
        built.double()
    built.train(like.training)
    built.start_as_residual()
    if device.type != "meta":
        _check(built)
    return built


@torch.no_grad()
def _check(connection: Connection) -> None:
    """Raise UserError unless copies of any token stay copies."""
    like = next(connection.parameters(), torch.empty(0))
    tokens = torch.ones(1, connection.num_streams, connection.dim).to(like.device, like.dtype)
    pre, post, residual = connection.mappings(tokens)
    for what, sums in (
        ("read weights sum to", pre.sum(-1)),
        ("write weights are", post),
        ("rows of the mixing matrix sum to", residual.sum(-1)),
    ):
        if not bool(((sums - 1).abs() <= _TOLERANCE).all()):
            raise UserError(
                f"{type(connection).__name__} does not start as a residual connection: its {what}"
                f" {sums.flatten().tolist()}, not 1, after start_as_residual(); mend that method"
            )
