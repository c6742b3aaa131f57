"""The report: runs read, compared, judged and drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

from mhc_lightning.reporting.baselines import GapOverSeeds, choose_baseline, gaps_over_seeds
from mhc_lightning.reporting.figures.run_styles import RunStyle, run_styles
from mhc_lightning.reporting.figures.sections import Section, figure_sections
from mhc_lightning.reporting.logged_runs import LoggedRun, read_runs
from mhc_lightning.reporting.summary import Summary, summarise
from mhc_lightning.reporting.verdicts import Verdict, judge


@dataclass(frozen=True)
class Report:
    """Everything on a report's page.

    Attributes:
        summaries: The runs in numbers.
        verdicts: One for each of them.
        over_seeds: Gaps over seeds, where runs have several.
        baseline: The run that the others are compared with.
        styles: Each run's style, by its name.
        sections: The figures.
    """

    summaries: list[Summary]
    verdicts: list[Verdict]
    over_seeds: list[GapOverSeeds]
    baseline: LoggedRun | None
    styles: dict[str, RunStyle]
    sections: list[Section]

    @property
    def runs(self) -> list[LoggedRun]:
        """The runs."""
        return [summary.run for summary in self.summaries]


def make_report(paths: Sequence[str], baseline: str | None = None) -> Report:
    """Read runs, compare them, judge them and draw them.

    Args:
        paths: Run folders, or folders that hold some.
        baseline: The run to compare with; see `choose_baseline`.

    Raises:
        UserError: A folder holds no run, the baseline is not among the runs, or two runs to be
            compared have no step in common.
    """
    runs = read_runs(paths)
    chosen = choose_baseline(runs, baseline)
    summaries = summarise(runs, chosen)
    styles = run_styles(runs, chosen)
    return Report(
        summaries=summaries,
        verdicts=[judge(summary) for summary in summaries],
        over_seeds=gaps_over_seeds([(summary.run, summary.gap) for summary in summaries]),
        baseline=chosen,
        styles=styles,
        sections=figure_sections(runs, styles, chosen),
    )
