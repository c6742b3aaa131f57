"""Everything that is to be said of some runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from mhc_lightning.reporting.drawing import Look
from mhc_lightning.reporting.figures import draw_all
from mhc_lightning.reporting.panels import Section, looks
from mhc_lightning.reporting.reading import Run, read_runs
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
    baseline: Run | None
    looks: dict[str, Look]
    sections: list[Section]

    @property
    def runs(self) -> list[Run]:
        """The runs."""
        return [summary.run for summary in self.summaries]


def make_report(paths: Sequence[str], baseline: str | None = None) -> Report:
    """Read runs and work out all that is to be said of them.

    Args:
        paths: Run folders, or folders that hold some.
        baseline: The one to compare with; see `choose_baseline`.

    Raises:
        UserError: A folder is no good, the baseline is not among the runs, or two runs to be
            compared have no step in common.
    """
    runs = read_runs(paths)
    chosen = choose_baseline(runs, baseline)
    summaries = summarise(runs, chosen)
    return Report(
        summaries=summaries,
        verdicts=[judge(summary) for summary in summaries],
        seeds=over_seeds(summaries),
        baseline=chosen,
        looks=looks(runs, chosen),
        sections=draw_all(runs, chosen),
    )
