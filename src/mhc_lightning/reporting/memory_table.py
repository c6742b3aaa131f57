"""The table of the page on memories of n-grams."""

from collections.abc import Callable, Mapping

from mhc_lightning.formatting import format_number
from mhc_lightning.reporting.memory_summary import MemorySummary
from mhc_lightning.reporting.report import Report
from mhc_lightning.reporting.tables import NOT_LOGGED, Cell, Heading, Table

_MOST_LINES = 4  # in a cell: of more blocks the smallest and the largest are named


def memory_table(report: Report) -> Table | None:
    """One row per run that logged a memory; None where none did."""
    columns: list[tuple[Heading, Callable[[MemorySummary], Cell]]] = [
        (Heading("Gate", "mean of blocks"), lambda memory: _by_block(memory.gates)),
        (Heading("Added norm", "against the streams"), _added),
        (Heading("Rows touched", "by a micro-batch"), _rows),
        (Heading("Collisions", "share of n-grams"), _collisions),
    ]
    rows = [
        (Heading(summary.run.name, run=summary.run), [cell(summary.ngrams) for _, cell in columns])
        for summary in report.summaries
        if summary.ngrams is not None
    ]
    if not rows:
        return None
    headings = [heading for heading, _ in columns]
    return Table("Memories of n-grams", "numbers", "Memory of", headings, rows)


def _by_block(values: Mapping[int, float]) -> Cell:
    if not values:
        return NOT_LOGGED
    mean = sum(values.values()) / len(values)
    named = list(values)
    if len(values) > _MOST_LINES:
        named = [min(values, key=values.__getitem__), max(values, key=values.__getitem__)]
    notes = tuple(f"block {block}: {format_number(values[block])}" for block in named)
    return Cell(format_number(mean), notes)


def _added(memory: MemorySummary) -> Cell:
    if memory.added_at_input is None:
        return _by_block(memory.added)
    return Cell(format_number(memory.added_at_input), ("at the embedding",))


def _rows(memory: MemorySummary) -> Cell:
    return NOT_LOGGED if memory.rows_touched is None else Cell(f"{memory.rows_touched:,.0f}")


def _collisions(memory: MemorySummary) -> Cell:
    return NOT_LOGGED if memory.collisions is None else Cell(f"{memory.collisions:.1%}")
