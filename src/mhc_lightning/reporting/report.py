"""Everything that is to be said of some runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from mhc_lightning.reporting.figures.run_styles import RunStyle, run_styles
from mhc_lightning.reporting.figures.sections import Section, figure_sections
from mhc_lightning.reporting.logged_runs import LoggedRun, read_runs
from mhc_lightning.reporting.summary import (
    OverSeeds,
    Summary,
    choose_baseline,
    over_seeds,
    summarise,
)
from mhc_lightning.reporting.verdicts import Verdict, judge


@dataclass(frozen=True)
class Report:
    """Some runs, read, compared, judged and drawn.

    Attributes:
        summaries: The runs in numbers.
        verdicts: On each of them.
        seeds: Gaps over seeds, where there are several.
        baseline: What the others are compared with.
        looks: How each run is drawn, by its name.
        sections: The figures.
    """

    summaries: list[Summary]
    verdicts: list[Verdict]
    seeds: list[OverSeeds]
    baseline: LoggedRun | None
    looks: dict[str, RunStyle]
    sections: list[Section]

    @property
    def runs(self) -> list[LoggedRun]:
        """The runs."""
        return [summary.run for summary in self.summaries]


def make_report(paths: Sequence[str], baseline: str | None = None) -> Report:
    """Read runs and work out all that is to be said of them.

    Args:
        paths: LoggedRun folders, or folders that hold some.
        baseline: The one to compare with; see `choose_baseline`.

    Raises:
        UserError: A folder is no good, the baseline is not among the runs, or two runs to be
            compared have no step in common.
    """
    runs = read_runs(paths)
    chosen = choose_baseline(runs, baseline)
    summaries = summarise(runs, chosen)
    styles = run_styles(runs, chosen)
    return Report(
        summaries=summaries,
        verdicts=[judge(summary) for summary in summaries],
        seeds=over_seeds(summaries),
        baseline=chosen,
        looks=styles,
        sections=figure_sections(runs, styles, chosen),
    )
