"""What the rows of a memory move: over the network, over PCIe, and in a device's own memory.

Every count is an upper bound: a row that several tokens name is counted for each of them.
"""

from typing import NamedTuple

from mhc_lightning.modules import NgramTable, Transformer
from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.precision import Precision
from mhc_lightning.planning.tables import ngram_tables, rows_per_token

_NUMBER = 8  # bytes of the number of a row, int64


class RowTraffic(NamedTuple):
    """Bytes per token of the device that reads it.

    Attributes:
        network: Sent to other devices: numbers of rows, rows, and gradients of rows.
        pcie: Between the device and the memory of its host, in both directions.
        device: Read and written in the device's memory: rows, gradients, and their sum.
    """

    network: float = 0.0
    pcie: float = 0.0
    device: float = 0.0

    def seconds(self, tokens: int, link: float, machine: Machine) -> float:
        """Seconds in which the rows of some tokens go over network and PCIe.

        Args:
            tokens: Tokens of one device.
            link: Bytes per second to other devices.
            machine: The machine.
        """
        kind = machine.kind
        moved = self.network / link + self.pcie / kind.pcie
        return tokens * moved / kind.link_share


def row_traffic(
    part: Transformer, precision: Precision, replicas: DataParallel, machine: Machine
) -> RowTraffic:
    """Count what the tables of a network, or of a part of one, move.

    Args:
        part: The network; it may be on the meta device.
        precision: Sizes of values.
        replicas: The devices, and where the rows are.
        machine: The devices; with `host`, each node of them has a copy of the tables.
    """
    found = [_of_table(each, precision, replicas, machine.nodes) for each in ngram_tables(part)]
    return RowTraffic(*(sum(sizes) for sizes in zip(RowTraffic(), *found, strict=True)))


def _of_table(
    table: NgramTable, precision: Precision, replicas: DataParallel, nodes: int
) -> RowTraffic:
    heads, row = rows_per_token(table), table.width * precision.coefficient
    gradient, devices = row + _NUMBER, replicas.devices
    # Rows are read and handed on; gradients are written, sorted, added up, and change the rows.
    device = heads * (2 * row + 3 * gradient + 7 * row)
    if replicas.placement == "host":
        network = (nodes - 1) * heads * gradient
        return RowTraffic(network, heads * (_NUMBER + row + gradient), heads * 2 * row)
    if replicas.placement == "sharded":
        others = (devices - 1) / devices
        # Asked for and sent in each pass; gradients go to the owners once in a step.
        return RowTraffic(others * heads * (_NUMBER + row + gradient), device=device)
    return RowTraffic((devices - 1) * heads * gradient, device=device)
