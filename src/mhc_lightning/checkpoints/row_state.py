"""The optimizer's state of a table's rows in checkpoint folders: pieces by ranges of rows.

The state of the touched rows of a table (`RowState`) is saved in pieces, each of so few rows that
any process can hold it. The rows of a piece ascend, and its name says from where to where:
`exp_avg@4096-8191.blocks.1.memory.table.weight`. Processes that update other rows of a table write
other pieces. A process reads the pieces that overlap with the rows it updates, whatever the number
of processes before and now.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mhc_lightning.checkpoints.saved_tensors import SavedTensors
from mhc_lightning.modules.memory.row_store import updated_rows
from mhc_lightning.optimizers.row_updates import ROWS, RowState

_PIECE = 2**20  # rows


class Piece(NamedTuple):
    """The name of a piece of one entry.

    Attributes:
        entry: The entry of the state.
        name: The table's weight.
        first: The first row.
        last: The last row.
    """

    entry: str
    name: str
    first: int
    last: int


def pieces(state: RowState, name: str) -> dict[str, Tensor]:
    """The pieces of a settled state, views of its tensors, by their names in a folder.

    Args:
        state: The state.
        name: The table's weight.
    """
    ranges = [(int(part[0]), int(part[-1])) for part in state[ROWS].split(_PIECE) if len(part)]
    return {
        f"{entry}@{first}-{last}.{name}": part
        for entry, tensor in state.items()
        for (first, last), part in zip(ranges, tensor.split(_PIECE), strict=False)
    }


def parse_piece(key: str) -> Piece | None:
    """The piece that a name in a folder names; None for another tensor of the optimizer."""
    entry, name = key.split(".", 1)
    entry, _, span = entry.partition("@")
    if not span:
        return None
    first, last = span.split("-")
    return Piece(entry, name, int(first), int(last))


def overlapping(saved: SavedTensors, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Read the pieces that overlap with the rows that this process updates, whole, in CPU memory.

    Args:
        saved: The optimizer's tensors in a folder.
        weights: The tables by name.

    Returns:
        The entries [T, ...] by the names of the tables, which may have no state.
    """
    wanted: dict[str, Tensor] = {}
    for key, like in saved.on_meta.items():
        piece = parse_piece(key)
        if piece is not None and piece.name in weights:
            part, first = updated_rows(weights[piece.name])
            if piece.first < first + len(part) and piece.last >= first:
                wanted[key] = torch.empty_like(like, device="cpu")
    saved.load_into(wanted)
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in joined(wanted).items():
        entry, name = key.split(".", 1)
        states.setdefault(name, {})[entry] = tensor
    return states


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by `<entry>.<name>`, where pieces [T, ...] of one entry are put together."""
    whole: dict[str, Tensor] = {}
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for key, tensor in tensors.items():
        piece = parse_piece(key)
        if piece is None:
            whole[key] = tensor
        else:
            parts.setdefault(f"{piece.entry}.{piece.name}", []).append((piece.first, tensor))
    for key, found in parts.items():
        ordered = sorted(found, key=lambda part: part[0])
        whole[key] = torch.cat([tensor for _, tensor in ordered])
    return whole


def gathered(state: RowState, shards: DeviceMesh, device: torch.device) -> dict[str, Tensor]:
    """The whole state of a table of which each process updates other rows.

    Args:
        state: This process's settled state.
        shards: The processes, in the order of their rows.
        device: The device from which this process sends, and on which it receives.

    Returns:
        The entries [T, ...] in CPU memory, in the first process; elsewhere nothing.
    """
    group = shards.get_group()
    count = torch.tensor([len(state[ROWS])], device=device)
    counts = [torch.empty_like(count) for _ in range(shards.size())]
    dist.all_gather(counts, count, group=group)
    sizes = torch.cat(counts).tolist()
    whole: dict[str, Tensor] = {}
    for entry, tensor in state.items():
        if shards.get_local_rank() > 0:
            if len(tensor):
                dist.send(tensor.to(device).contiguous(), group=group, group_dst=0)
            continue
        whole[entry] = torch.empty(sum(sizes), *tensor.shape[1:], dtype=tensor.dtype, device="cpu")
        own, *others = whole[entry].split(sizes)
        own.copy_(tensor)
        for source, part in enumerate(others, start=1):
            if len(part):
                received = torch.empty_like(part, device=device)
                dist.recv(received, group=group, group_src=source)
                part.copy_(received)
    return whole
