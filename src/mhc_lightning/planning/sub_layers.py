"""The sub-layers of a network, their recompute blocks, and the memories between them."""

from typing import NamedTuple

from torch import nn

from mhc_lightning.modules import Connection, Transformer
from mhc_lightning.modules.memory import BlockMemory


class SubLayer(NamedTuple):
    """One sub-layer of a network.

    Attributes:
        connection: Its residual connection.
        layer: The pre-norm and the body that the connection surrounds.
    """

    connection: Connection
    layer: nn.Module

    @property
    def body(self) -> nn.Module:
        """Attention or feed-forward."""
        return self.layer.get_submodule("body")


def sub_layers(model: Transformer) -> list[SubLayer]:
    """Every sub-layer, in order."""
    found = []
    for block in model.blocks:
        for name in ("attention", "feed_forward"):
            connection = block.get_submodule(f"{name}_connection")
            assert isinstance(connection, Connection)
            found.append(SubLayer(connection, block.get_submodule(name)))
    return found


def memories(model: Transformer) -> dict[int, BlockMemory]:
    """The memories of blocks, by the number of the sub-layer before which each stands."""
    found = {}
    for index, block in enumerate(model.blocks):
        memory = getattr(block, "memory", None)
        if memory is not None:
            assert isinstance(memory, BlockMemory)
            found[2 * index] = memory
    return found


def places_in_blocks(model: Transformer, size: int) -> list[int | None]:
    """Each sub-layer's place in its recompute block; None where nothing is recomputed.

    A sub-layer behind a memory begins a block.
    """
    places: list[int | None] = []
    changed = memories(model)
    for number, (connection, _) in enumerate(sub_layers(model)):
        before = places[-1] if places and number not in changed else None
        if size == 0 or not connection.replays:
            places.append(None)
        else:
            places.append(0 if before is None else (before + 1) % size)
    return places
