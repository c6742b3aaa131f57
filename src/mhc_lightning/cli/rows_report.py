"""The text of a plan's memory of n-grams: where its rows may be, and what each place costs."""

from textwrap import indent
from typing import TYPE_CHECKING

from mhc_lightning.cli.text_table import text_table
from mhc_lightning.formatting import format_bytes, format_seconds

if TYPE_CHECKING:
    from mhc_lightning.planning import Plan

_HEADING = (
    "placement",
    *("on a device", "in all", "on a host", "PCIe/token", "network/token"),
    *("step", "rows hidden", "fits"),
)


def rows_table(plan: "Plan") -> str:
    """Each placement's bytes, on a device and its host and per token, and the time of a step.

    The run's own placement has a star.
    """
    own = plan.run.sharing.placement
    rows: list[tuple[str, ...]] = [_HEADING]
    for name, placed in plan.placements.items():
        held, traffic = placed.rows, placed.traffic
        rows.append(
            (
                f"{name}{'*' * (name == own)}",
                format_bytes(held.weights + held.gradients + held.optimizer + held.fetched),
                format_bytes(placed.memory.total),
                format_bytes(held.host),
                format_bytes(round(traffic.pcie)),
                format_bytes(round(traffic.network)),
                format_seconds(placed.seconds(hidden=False)),
                format_seconds(placed.seconds(hidden=True)),
                "yes" if placed.fits else "NO",
            )
        )
    return (
        "rows of the memory by placement: with optimizer state of all rows the run may touch\n"
        + indent(text_table(rows, "lrrrrrrrl"), "  ")
    )
