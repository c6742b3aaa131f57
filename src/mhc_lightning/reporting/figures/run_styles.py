"""The style of each run's lines: one colour per kind of run, one dash per seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mhc_lightning.plotting.theme import COLOURS, DASHES, RUN_COLOURS
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.settings_comparison import same_but_for_the_seed


@dataclass(frozen=True)
class RunStyle:
    """The style of a run's lines.

    Attributes:
        label: The name beside its lines.
        colour: One of `COLOURS`, by name.
        dash: Matplotlib's line style.
    """

    label: str
    colour: str
    dash: Any = "-"

    @property
    def ink(self) -> str:
        """The colour on a light page, in which figures are drawn."""
        return COLOURS[self.colour][0]


def run_styles(runs: Sequence[LoggedRun], baseline: LoggedRun | None) -> dict[str, RunStyle]:
    """A style for each run, by its name.

    The baseline is grey. Runs that differ in their seed alone share a colour, not the dash.
    """
    groups: list[list[LoggedRun]] = [[baseline]] if baseline is not None else [[]]
    for run in runs:
        if run is baseline:
            continue
        for group in groups:
            if group and same_but_for_the_seed(group[0], run):
                group.append(run)
                break
        else:
            groups.append([run])
    styles = {}
    num_colours = len(RUN_COLOURS) - 1  # beside the baseline's
    for g, group in enumerate(groups):
        turn, colour = divmod(g - 1, num_colours) if g else (0, -1)
        for k, run in enumerate(group):
            dash = DASHES[(k + turn) % len(DASHES)]
            styles[run.name] = RunStyle(run.name, f"run-{1 + colour}", dash)
    return styles
