"""This package's own `Transformer`: its blocks have connections already, which are replaced."""

from collections.abc import Callable, Sequence

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Connection, ResidualConnection, Transformer
from mhc_lightning.modules.block import Block
from mhc_lightning.upcycling.starting import started

_SLOTS = ("attention_connection", "feed_forward_connection")


def upcycle_transformer(
    models: Sequence[Transformer], connection: Callable[..., Connection], num_streams: int
) -> None:
    """Replace the residual connections of the only network in `models`, in place.

    Raises:
        UserError: There are several, or it has other connections or a memory, or it does not fit.
    """
    if len(models) > 1:
        raise UserError(f"there are {len(models)} Transformers here; upcycle them one by one")
    (model,) = models
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    present = [getattr(block, slot) for block in blocks for slot in _SLOTS]
    if len(blocks) < len(model.blocks):
        raise UserError("blocks of this Transformer are wrapped; upcycle it before that")
    other = next((c for c in present if type(c) is not ResidualConnection), None)
    if other is not None:
        raise UserError(
            f"this Transformer has {type(other).__name__}s already; upcycle one that was trained"
            " with connection=residual"
        )
    if model.memory.hash is not None:
        raise UserError(
            "this Transformer has a memory, whose parts were built for one stream; upcycle one"
            " without a memory, and add the memory afterwards"
        )
    new = [
        started(connection, old.dim, num_streams, k, like=blocks[k // 2])
        for k, old in enumerate(present)
    ]
    for k, built in enumerate(new):
        setattr(blocks[k // 2], _SLOTS[k % 2], built)
    model.num_streams = new[0].num_streams
    model.set_recompute(model.recompute)
