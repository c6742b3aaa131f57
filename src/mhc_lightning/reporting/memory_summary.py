"""A run's memory of n-grams in numbers: gates, rows touched, collisions, the norm that it adds."""

from collections.abc import Mapping
from dataclasses import dataclass

from mhc_lightning.reporting.metric_series import Series, layer_matrix
from mhc_lightning.reporting.statistics import final_mean

GATE, ADDED, ROWS, COLLISIONS = (
    f"memory/{name}" for name in ("gate", "added_norm", "rows_touched", "collisions")
)
INPUT = "input"


@dataclass(frozen=True)
class MemorySummary:
    """What a memory did, as means over the final window of the logged steps.

    Attributes:
        gates: The mean gate by block; empty for a memory without gates.
        streams: The gate of each stream by block.
        added: Norm of what memory adds against that of the streams, by block.
        added_at_input: The same at the embedding; None for a memory in blocks.
        rows_touched: Different rows that a micro-batch reads.
        collisions: Share of a micro-batch's n-grams that share their row with another one.
    """

    gates: dict[int, float]
    streams: dict[int, list[float]]
    added: dict[int, float]
    added_at_input: float | None
    rows_touched: float | None
    collisions: float | None


def memory_summary(scalars: Mapping[str, Series]) -> MemorySummary | None:
    """The numbers of a run's memory; None where none were logged."""
    gates = _by_block(scalars, GATE)
    summary = MemorySummary(
        gates=gates,
        streams={block: _streams(scalars, block) for block in gates},
        added=_by_block(scalars, ADDED),
        added_at_input=_final(scalars, f"{ADDED}/{INPUT}"),
        rows_touched=_final(scalars, ROWS),
        collisions=_final(scalars, COLLISIONS),
    )
    return summary if any(value not in (None, {}) for value in vars(summary).values()) else None


def _by_block(scalars: Mapping[str, Series], tag: str) -> dict[int, float]:
    blocks, _, _ = layer_matrix(scalars, tag)
    found = {block: _final(scalars, f"{tag}/layer_{block}") for block in blocks}
    return {block: value for block, value in found.items() if value is not None}


def _streams(scalars: Mapping[str, Series], block: int) -> list[float]:
    values: list[float] = []
    while (value := _final(scalars, f"{GATE}/layer_{block}/stream_{len(values)}")) is not None:
        values.append(value)
    return values


def _final(scalars: Mapping[str, Series], tag: str) -> float | None:
    estimate = final_mean(scalars[tag]) if tag in scalars else None
    return None if estimate is None else estimate.value
