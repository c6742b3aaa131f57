"""Bytes of the tables of a memory: on a device, and in the memory of its host.

Only the rows that a step looks up have gradients: each look-up brings one row, and a row that
several name is counted as often, as the gradients are added up once in an optimizer step. The
optimizer keeps state of the rows that it has updated so far. The state is counted as it is at the
end of the run, if each look-up of the run found a new row, as long as there are such.

Shapes: R rows of a table, D their width, H rows that a token reads.
"""

from collections.abc import Iterable
from typing import NamedTuple

from mhc_lightning.modules import NgramTable, Transformer
from mhc_lightning.planning.activations import MicroBatch
from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.tables import ngram_tables, rows_per_token

_NUMBER = 8  # bytes of the number of a row, int64
_PLACE = 4  # where the state of a row is, int32
_SORTING = 3 * _NUMBER  # of a row in a sum: sorted numbers, their order, and the places
# Vectors of a row's width that live at a time while rows are updated.
_UPDATING = {"adam": 3, "rowwise": 2}


class RowMemory(NamedTuple):
    """Bytes of tables.

    Attributes:
        weights: Rows on the device.
        gradients: Gradients of rows on the device.
        optimizer: State of the optimizer on the device.
        fetched: Rows on the device that come from the host: of this micro-batch and of the next.
        update: Temporary tensors of the optimizer step, on the device.
        host: Bytes in the memory of the host, which its devices share: rows, state, and the
            gradients of all devices in a step.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    fetched: int = 0
    update: int = 0
    host: int = 0


def row_memory(part: Transformer, batch: MicroBatch, replicas: DataParallel) -> RowMemory:
    """Count the tables in a network, or in a part of one.

    Args:
        part: The network; it may be on the meta device.
        batch: The micro-batch of one device.
        replicas: The devices, and where the rows are.
    """
    return together(_of_table(table, batch, replicas) for table in ngram_tables(part))


def together(tables: Iterable[RowMemory]) -> RowMemory:
    """The bytes of several tables, which are updated one after another."""
    found = [RowMemory(), *tables]
    whole = RowMemory(*(sum(sizes) for sizes in zip(*found, strict=True)))
    return whole._replace(update=max(each.update for each in found))


def _of_table(table: NgramTable, batch: MicroBatch, replicas: DataParallel) -> RowMemory:
    rows, heads, value = replicas.rows, rows_per_token(table), batch.precision.coefficient
    row = table.width * value
    gradient = row + _NUMBER
    holders = replicas.devices if replicas.placement == "sharded" else 1
    held = -(-table.num_rows // holders)
    touched = held
    if rows.run_tokens is not None:
        touched = min(held, -(-heads * rows.run_tokens // holders))
    optimizer = touched * rows.state_bytes(table.width, value) + held * _PLACE
    looked_up = heads * (rows.step_tokens or batch.tokens)
    of_all = looked_up * replicas.devices

    if replicas.placement == "host":
        of_pass = heads * batch.tokens
        host = held * row + optimizer + of_all * (gradient + _SORTING)
        return RowMemory(gradients=of_pass * gradient, fetched=2 * of_pass * row, host=host)
    shared = replicas.placement == "device" and replicas.devices > 1
    # Hashes spread the rows that all devices look up evenly over the shares.
    summed = min(held, of_all if shared else looked_up)
    adding = looked_up * (gradient + _SORTING)
    adding += of_all * (2 * gradient + _SORTING) if shared else 0
    return RowMemory(
        weights=held * row,
        gradients=max(looked_up, summed) * gradient,
        optimizer=optimizer,
        update=max(adding, _UPDATING[rows.update] * summed * row),
    )
