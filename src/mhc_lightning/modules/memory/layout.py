"""The sizes of hashed n-gram tables.

Shapes: L tables, H heads of a table (orders times heads per order), N the longest order,
V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from mhc_lightning.errors import UserError
from mhc_lightning.modules.memory.settings import whole_number, whole_numbers

ROW_MULTIPLE = 64  # heads begin at multiples of it, so that tables are cut between heads or rows
_LONGEST = 64  # order
_MOST_HEADS = 1024  # of an order
_MOST_ROWS = 2**40  # of a head
_MOST_VALUES = 2**50  # of a table
_INT64 = 2**63


class NgramLayout(NamedTuple):
    """The sizes of hashed n-gram tables; they do not depend on the tokenizer.

    Attributes:
        tables: Numbers that enter each table's seed: for Engram the blocks, from 0.
        orders: n of each n-gram, ascending, at least 2.
        num_heads: Heads (hash functions) of each order.
        moduli: Rows of each head, [L][H], order by order. No two are equal.
    """

    tables: tuple[int, ...]
    orders: tuple[int, ...]
    num_heads: int
    moduli: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """N: the hash of a position depends on its last N tokens."""
        return max(self.orders)

    @property
    def heads(self) -> int:
        """H: rows that one position reads in one table."""
        return len(self.orders) * self.num_heads

    @property
    def rows_per_head(self) -> int:
        """Rows from one head's first to the next one's: the largest modulus, rounded up."""
        largest = max(modulus for table in self.moduli for modulus in table)
        return math.ceil(largest / ROW_MULTIPLE) * ROW_MULTIPLE

    def used_rows(self, table: int) -> int:
        """Rows of a table that a hash can name: the sum of its moduli."""
        return sum(self.moduli[table])


def prime_layout(
    tables: Sequence[int], orders: Sequence[int], num_heads: int, rows: int | Sequence[int]
) -> NgramLayout:
    """Heads with distinct prime sizes (arXiv 2601.07372, released code).

    Tables, orders and heads ascend. Each order of each table starts at its `rows` and takes the
    next prime that no head before has.

    Args:
        tables: See `NgramLayout`.
        orders: See `NgramLayout`.
        num_heads: Heads of each order.
        rows: The least number of rows of a head, for all orders or for each.

    Raises:
        UserError: An argument is out of range.
    """
    from sympy import nextprime  # torch depends on it; importing it takes a while

    orders, sizes = _checked(orders, num_heads, rows)
    taken: set[int] = set()
    moduli = []
    for _ in tables:
        heads: list[int] = []
        for size in sizes:
            candidate = size - 1
            for _ in range(num_heads):
                candidate = int(nextprime(candidate))
                while candidate in taken:
                    candidate = int(nextprime(candidate))
                taken.add(candidate)
                heads.append(candidate)
        moduli.append(tuple(heads))
    return NgramLayout(tuple(tables), orders, num_heads, tuple(moduli))


def spaced_layout(orders: Sequence[int], num_heads: int, rows: int, vocab_size: int) -> NgramLayout:
    """One table whose head k has `rows + 2·k` rows (arXiv 2501.16975).

    Args:
        orders: See `NgramLayout`.
        num_heads: Heads of each order.
        rows: Rows of the first head.
        vocab_size: V.

    Raises:
        UserError: An argument is out of range, the hash would leave int64, or a head's rows are a
            multiple of V: such a head sees the last token alone, again and again.
    """
    orders, (rows, *_) = _checked(orders, num_heads, whole_number("rows", rows, 1, _MOST_ROWS))
    heads = len(orders) * num_heads
    moduli = _spaced(rows, heads)
    most = _INT64 // (vocab_size * max(orders)) - 1  # the sum of N products of an id stays in int64
    if moduli[-1] > most:
        raise UserError(
            f"memory.rows={rows} is too large to hash {vocab_size} tokens in 64 bits; use at most"
            f" memory.rows={most - 2 * heads}"
        )
    multiples = _multiples(moduli, vocab_size)
    if multiples:
        others = (rows + more for more in range(1, 2 * vocab_size))
        better = next((n for n in others if not _multiples(_spaced(n, heads), vocab_size)), None)
        raise UserError(
            f"memory.rows={rows} gives a head {multiples[0]} rows, a multiple of the"
            f" {vocab_size} tokens, and so the same row to all n-grams that end alike; use"
            f" {'fewer memory.num_heads' if better is None else f'memory.rows={better}'}"
        )
    return NgramLayout((0,), orders, num_heads, (moduli,))


def _spaced(rows: int, heads: int) -> tuple[int, ...]:
    return tuple(rows + 2 * k for k in range(heads))


def _multiples(moduli: Sequence[int], vocab_size: int) -> list[int]:
    return [modulus for modulus in moduli if modulus % vocab_size == 0]


def row_width(layout: NgramLayout, per_order: int | None, default: int) -> int:
    """Values of a row: the heads of an order share `memory.dim` evenly.

    Args:
        layout: The sizes.
        per_order: `memory.dim`.
        default: A row's values if it is None; at least 1 is taken.

    Raises:
        UserError: The heads cannot share it, or the table would be larger than any machine holds.
    """
    heads = layout.num_heads
    width = max(1, default)
    if per_order is not None:
        width, rest = divmod(whole_number("dim", per_order, 1, _MOST_VALUES), heads)
        if rest or not width:
            raise UserError(
                f"memory.dim={per_order} cannot be shared evenly by memory.num_heads={heads};"
                f" use a multiple of {heads}"
            )
    values = layout.heads * layout.rows_per_head * width
    if values > _MOST_VALUES:
        raise UserError(
            f"a table of this memory would have {values:.1e} values, more than machines hold; use"
            " smaller memory.rows, memory.dim or memory.num_heads"
        )
    return width


def _checked(
    orders: Sequence[int], num_heads: int, rows: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The orders, and the rows of a head of each order."""
    checked = whole_numbers("orders", orders, 2, _LONGEST)
    if list(checked) != sorted(set(checked)):
        raise UserError(f"memory.orders must be different and ascending, not {list(orders)}")
    whole_number("num_heads", num_heads, 1, _MOST_HEADS)
    given = rows if isinstance(rows, list | tuple) else [rows] * len(checked)
    if len(given) != len(checked):
        raise UserError(
            f"memory.rows must be one number or one for each of the {len(checked)} orders, not"
            f" {rows}"
        )
    sizes = tuple(whole_number("rows", size, 1, _MOST_ROWS) for size in given)
    least = len(checked) * num_heads
    if min(sizes) < least:
        raise UserError(
            f"memory.rows={min(sizes)} is below the {least} heads of a table, each of which needs"
            f" a number of rows of its own; use at least memory.rows={least}"
        )
    return checked, sizes
