"""Panels of a memory of n-grams: gates and norms by block and step, rows touched, collisions."""

from collections.abc import Iterator, Mapping, Sequence

from mhc_lightning.reporting.figures.line_panels import Panel, panel_by_layer, panel_by_step
from mhc_lightning.reporting.figures.run_styles import RunStyle
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.memory_summary import ADDED, COLLISIONS, GATE, INPUT, ROWS
from mhc_lightning.reporting.metric_series import layer_matrix

_MOST_BLOCKS = 4  # drawn by step; of more the first, the last and some between


def memory_panels(runs: Sequence[LoggedRun], styles: Mapping[str, RunStyle]) -> Iterator[Panel]:
    """Everything that runs have logged of their memories."""
    yield from _by_block(runs, styles, GATE, "Gate", "mean of positions and streams")
    against = "norm against that of what it adds to"
    yield from _by_block(runs, styles, ADDED, "Added norm", against)
    yield from panel_by_step(
        runs, styles, f"{ADDED}/{INPUT}", "memory_added_norm_input",
        "Added norm, at the embedding", against, may_be_logarithmic=False,
    )  # fmt: skip
    yield from panel_by_step(
        runs, styles, ROWS, "memory_rows_touched", "Rows touched", "by a micro-batch",
        may_be_logarithmic=False,
    )  # fmt: skip
    yield from panel_by_step(
        runs, styles, COLLISIONS, "memory_collisions", "Collisions",
        "share of a micro-batch's n-grams", may_be_logarithmic=False,
    )  # fmt: skip


def _by_block(
    runs: Sequence[LoggedRun], styles: Mapping[str, RunStyle], tag: str, title: str, ylabel: str
) -> Iterator[Panel]:
    name = tag.replace("/", "_")
    blocks = sorted({block for run in runs for block in layer_matrix(run.scalars, tag)[0]})
    shown = min(len(blocks), _MOST_BLOCKS)
    for block in [blocks[round(k * (len(blocks) - 1) / max(1, shown - 1))] for k in range(shown)]:
        yield from panel_by_step(
            runs, styles, f"{tag}/layer_{block}", f"{name}_block_{block}",
            f"{title}, block {block}", ylabel, may_be_logarithmic=False,
        )  # fmt: skip
    if len(blocks) > _MOST_BLOCKS:
        yield from panel_by_layer(
            runs, styles, tag, f"{name}_by_block", f"{title}, by block", None, each="block"
        )
