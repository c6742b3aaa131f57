"""The page: one HTML file that needs no other, rendered from `templates/page.html`."""

import base64
from dataclasses import dataclass
from datetime import UTC, datetime

from jinja2 import Environment, PackageLoader, StrictUndefined

import mhc_lightning
from mhc_lightning.formatting import format_list
from mhc_lightning.plotting.theme import COLOURS
from mhc_lightning.reporting import tables
from mhc_lightning.reporting.figures.inline_svg import inline_svg
from mhc_lightning.reporting.figures.line_panels import Panel
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.memory_table import memory_table
from mhc_lightning.reporting.report import Report
from mhc_lightning.reporting.run_description import (
    UNKNOWN,
    commands,
    commit,
    describe_run,
    format_time,
    has_one_stream,
    run_starts,
)
from mhc_lightning.reporting.summary import AT_ONE, LIMIT
from mhc_lightning.reporting.verdicts import RISE_SHARE, SPIKE

GENERATOR = "mhc-lightning report"
_MATRICES = "stream_matrices/"
_MAX_MATRICES = 12  # of a run


def render_page(report: Report) -> str:
    """The whole HTML file."""
    names = [run.name for run in report.runs]
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(listed=format_list, svg=_svg)
    return (
        environment.get_template("page.html").render(
            report=report,
            title=format_list(names) if len(names) < 5 else f"{len(names)} runs",
            experiment=_experiment(report),
            judged=list(zip(report.summaries, report.verdicts, strict=True)),
            numbers=tables.numbers_table(report),
            seeds=tables.seeds_table(report),
            memories=memory_table(report),
            caveats=tables.caveats(report),
            undescribed=[run.name for run in report.runs if not tables.is_described(run)],
            shared_facts=tables.shared_facts(report),
            differences=tables.differences_table(report),
            matrices=[(run, shown) for run in report.runs if (shown := _matrices(run)).pictures],
            reproduction=[(run, commands(run), _notes(run)) for run in report.runs],
            colours=COLOURS,
            generator=GENERATOR,
            version=mhc_lightning.__version__,
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            limit=LIMIT,
            at_one=AT_ONE,
            rise_share=RISE_SHARE,
            spike=SPIKE,
        )
        + "\n"
    )


def _svg(panel: Panel) -> str:
    return inline_svg(panel.figure, panel.name, panel.title, panel.description)


def _experiment(report: Report) -> str | None:
    """The experiment of all runs, if they have one in common."""
    experiments = {describe_run(run)["Experiment"] for run in report.runs}
    return experiments.pop() if len(experiments) == 1 and UNKNOWN not in experiments else None


@dataclass(frozen=True)
class _Image:
    """A picture of a matrix, as the page shows it."""

    name: str
    step: int
    width: int
    height: int
    data: str  # base64


@dataclass(frozen=True)
class _Matrices:
    """Pictures of a run's matrices, and how many more were logged."""

    pictures: list[_Image]
    more: int


def _matrices(run: LoggedRun) -> _Matrices:
    """The pictures of a run's matrices: single sub-layers evenly spaced, then products."""
    if has_one_stream(run):
        return _Matrices([], 0)
    tags = sorted((t for t in run.pictures if t.startswith(_MATRICES)), key=_sub_layers)
    products = [tag for tag in tags if "composite" in tag][:_MAX_MATRICES]
    single = [tag for tag in tags if "composite" not in tag]
    room = min(_MAX_MATRICES - len(products), len(single))
    chosen = [*(single[k * len(single) // room] for k in range(room)), *products]
    pictures = []
    for tag in chosen:
        picture = run.pictures[tag]
        name = tag.removeprefix(_MATRICES).replace("_", " ")
        data = base64.b64encode(picture.png).decode()
        pictures.append(_Image(name, picture.step, picture.width, picture.height, data))
    return _Matrices(pictures, len(tags) - len(chosen))


def _sub_layers(tag: str) -> list[int]:
    """The numbers in a tag such as `stream_matrices/composite_0_to_59`."""
    return [int(part) for part in tag.split("_") if part.isdigit()]


def _notes(run: LoggedRun) -> list[str]:
    """Sentences below the commands of a run."""
    source, processes, starts = commit(run), run.fact("processes"), run_starts(run)
    notes = [f"Commit {source}."] if source else []
    if isinstance(processes, int) and processes > 1:
        notes.append(f"It ran as {processes} processes.")
    if len(starts) > 1:
        times = format_list([format_time(start.get("started")) for start in starts[1:]])
        notes.append(f"It was resumed: {times}.")
    return notes
