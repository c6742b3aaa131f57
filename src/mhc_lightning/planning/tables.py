"""The tables of n-grams in a network: their rows, and the rows that a token reads."""

from typing import NamedTuple

from torch import nn

from mhc_lightning.modules import NgramTable, Transformer
from mhc_lightning.modules.memory.memory import INPUT


class Table(NamedTuple):
    """One table of a network.

    Attributes:
        table: The table.
        used_rows: Rows that an n-gram can name; the others are padding.
    """

    table: NgramTable
    used_rows: int

    @property
    def used_values(self) -> int:
        """Values of the rows that an n-gram can name."""
        return self.used_rows * self.table.width

    @property
    def padding_values(self) -> int:
        """Values of the rows that no n-gram names."""
        return (self.table.num_rows - self.used_rows) * self.table.width


def tables_of(model: Transformer) -> list[Table]:
    """The tables of a whole model, which may be on the meta device."""
    memory = model.memory
    if memory.hash is None:
        return []
    found = []
    for number, place in enumerate(memory.places):
        part = model.input_memory if place == INPUT else model.blocks[place].memory
        assert isinstance(part, nn.Module)
        (table,) = ngram_tables(part)
        found.append(Table(table, memory.hash.layout.used_rows(number)))
    return found


def ngram_tables(part: nn.Module) -> list[NgramTable]:
    """The tables in a module, such as the network that one pipeline stage holds."""
    return [module for module in part.modules() if isinstance(module, NgramTable)]


def rows_per_token(table: NgramTable) -> int:
    """Rows that one token reads: one of each head."""
    return table.num_rows // table.rows_per_head


def dense_values(part: nn.Module) -> int:
    """Number of parameters in a module, without those of tables."""
    tables = sum(table.weight.numel() for table in ngram_tables(part))
    return sum(p.numel() for p in part.parameters()) - tables
