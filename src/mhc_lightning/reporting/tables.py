"""The tables of the page: numbers of each run, gaps over seeds, and differences between runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mhc_lightning.formatting import (
    format_bytes,
    format_difference,
    format_gain,
    format_interval,
    format_list,
    format_number,
    format_steps,
)
from mhc_lightning.reporting.gain_extremes import DIRECTIONS, KINDS, gain_tag
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.report import Report
from mhc_lightning.reporting.run_description import INCOMPLETE, UNKNOWN, describe_run
from mhc_lightning.reporting.settings_comparison import differing_settings
from mhc_lightning.reporting.summary import AT_ONE, LIMIT, Summary

# Settings that `describe_run` names already.
_DESCRIBED = frozenset(
    {
        *(
            "memory._target_",
            "connection._target_",
            "model.num_streams",
            "model.dim",
            "model.num_layers",
        ),
        *("data.path", "trainer.max_steps", "optimizer.lr", "trainer.precision"),
        *("seed", "data.seed"),
    }
)


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: Its text.
        notes: Small lines below it.
        missing: True if the text stands for a missing value.
    """

    text: str
    notes: tuple[str, ...] = ()
    missing: bool = False


@dataclass(frozen=True)
class Heading:
    """The heading of a row or column.

    Attributes:
        text: Its text.
        note: A small line below it.
        run: The run that it names, which has a colour; None where it names something else.
        is_setting: True for the key of a setting.
    """

    text: str
    note: str = ""
    run: LoggedRun | None = None
    is_setting: bool = False


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        label: Its content in words, for readers who do not see it.
        kind: A CSS class.
        corner: The heading above the rows' headings.
        columns: The columns' headings.
        rows: Each row's heading and cells.
    """

    label: str
    kind: str
    corner: str
    columns: list[Heading]
    rows: list[tuple[Heading, list[Cell]]] = field(default_factory=list)


NOT_LOGGED = Cell("not logged", missing=True)


def numbers_table(report: Report) -> Table:
    """One row of numbers per run."""
    columns: list[tuple[Heading, Callable[[Summary], Cell]]] = [
        (Heading("Training loss", "at the end"), _loss),
        (Heading("Validation loss", "the last"), _validation),
    ]
    baselines = {s.gap.baseline for s in report.summaries if s.gap is not None}
    if baselines:
        several = len(baselines) > 1
        baseline = "the baseline of its seed" if several else baselines.pop()
        gap_cell = _gap_with_baseline if several else _gap
        columns.append((Heading("Loss gap", f"to {baseline}, 95%"), gap_cell))
    for kind in KINDS:
        for direction in DIRECTIONS:
            name = "Composite" if kind == "composite" else "Single-layer"
            heading = Heading(f"{name} gain", f"{direction}, largest")
            columns.append((heading, _gain(gain_tag(kind, direction))))
    columns += [
        (Heading("Gradient norm", "median, largest"), _gradient_norm),
        (Heading("Tokens/s", "median"), _speed),
        (Heading("Memory", "peak"), _memory),
    ]
    rows = [
        (Heading(summary.run.name, run=summary.run), [cell(summary) for _, cell in columns])
        for summary in report.summaries
    ]
    return Table("Numbers of each run", "numbers", "Run", [heading for heading, _ in columns], rows)


def _loss(summary: Summary) -> Cell:
    loss = summary.loss
    if loss is None:
        return NOT_LOGGED
    return Cell(f"{loss.value:.4f}", (format_steps(loss.first_step, loss.last_step),))


def _validation(summary: Summary) -> Cell:
    if summary.validation is None:
        return NOT_LOGGED
    step, value = summary.validation
    return Cell(format_number(value, 5), (f"step {step:,}",))


def _gap(summary: Summary) -> Cell:
    gap = summary.gap
    if gap is None:
        return Cell("baseline", missing=True)
    lines = []
    if gap.loss is not None:
        lines += [format_difference(gap.loss.value), gap.loss.interval or "no interval"]
        steps = gap.loss.first_step, gap.loss.last_step
        if summary.loss is None or steps != (summary.loss.first_step, summary.loss.last_step):
            lines.append(format_steps(*steps))
    if gap.validation is not None:
        step, value = gap.validation
        is_last = summary.validation is not None and summary.validation[0] == step
        lines.append(
            f"validation {format_difference(value)}{'' if is_last else f', step {step:,}'}"
        )
    return Cell(lines[0], tuple(lines[1:])) if lines else NOT_LOGGED


def _gap_with_baseline(summary: Summary) -> Cell:
    cell = _gap(summary)
    if summary.gap is None or cell.missing:
        return cell
    return Cell(cell.text, (*cell.notes, summary.gap.baseline))


def _gain(tag: str) -> Callable[[Summary], Cell]:
    def cell(summary: Summary) -> Cell:
        gains = summary.gains.get(tag)
        if gains is None:
            return NOT_LOGGED
        if gains.distance <= AT_ONE:
            return Cell("1", ("always" if gains.distance == 0 else f"to {AT_ONE:g}",))
        largest = gains.largest
        notes = [f"step {largest.step:,}"]
        if largest.value > LIMIT and largest.sub_layers:
            notes.append(largest.sub_layers)
        return Cell(format_gain(largest.value), tuple(notes))

    return cell


def _gradient_norm(summary: Summary) -> Cell:
    norm = summary.gradient
    if norm is None:
        return NOT_LOGGED
    text = f"{format_number(norm.median)}, {format_number(norm.largest)}"
    return Cell(text, (f"step {norm.step:,}",))


def _speed(summary: Summary) -> Cell:
    return NOT_LOGGED if summary.speed is None else Cell(f"{summary.speed:,.0f}")


def _memory(summary: Summary) -> Cell:
    return NOT_LOGGED if summary.memory is None else Cell(format_bytes(summary.memory))


def seeds_table(report: Report) -> Table | None:
    """Gaps over seeds; None where no run has several seeds."""
    if not report.over_seeds:
        return None
    columns = [Heading("Seeds"), Heading("Mean loss gap"), Heading("95% over seeds")]
    rows = [
        (
            Heading(format_list(gap.runs)),
            [
                Cell(str(len(gap.runs))),
                Cell(format_difference(gap.value)),
                Cell(format_interval(gap.low, gap.high)),
            ],
        )
        for gap in report.over_seeds
    ]
    return Table("Gaps over seeds", "numbers", "Runs", columns, rows)


def caveats(report: Report) -> list[str]:
    """Sentences on the limits of the comparison."""
    sentences = []
    for summary in report.summaries:
        gap, name = summary.gap, summary.run.name
        if gap is None:
            continue
        if gap.same_batches is False:
            sentences.append(
                f"{name} and {gap.baseline} did not see the same batches (data, batch or seed"
                " differ): their gap holds the noise of both."
            )
        elif gap.same_batches is None:
            sentences.append(
                f"Whether {name} and {gap.baseline} saw the same batches is not known: their"
                " settings are not recorded."
            )
    incomplete = [s.run.name for s in report.summaries if s.ending.state == INCOMPLETE]
    if incomplete:
        verb = "is" if len(incomplete) == 1 else "are"
        sentences.append(
            f"{format_list(incomplete)} {verb} incomplete: final values are those of the last"
            " logged steps, gaps those of the last steps in common."
        )
    return sentences


def is_described(run: LoggedRun) -> bool:
    """True if the run has a configuration or an environment."""
    return run.config is not None or run.environment is not None


def shared_facts(report: Report) -> dict[str, str]:
    """The facts that all described runs have in common."""
    facts = [describe_run(run) for run in report.runs if is_described(run)]
    if not facts:
        return {}
    return {
        key: value for key, value in facts[0].items() if all(other[key] == value for other in facts)
    }


def differences_table(report: Report) -> Table | None:
    """Facts and settings in which the described runs differ, with a column per run."""
    runs = [run for run in report.runs if is_described(run)]
    if not runs:
        return None
    facts = [describe_run(run) for run in runs]
    shared = shared_facts(report)
    rows = [
        (Heading(key), [Cell(of_run[key]) for of_run in facts])
        for key in facts[0]
        if key not in shared
    ]
    for key, values in differing_settings(runs).items():
        if key not in _DESCRIBED:
            cells = [Cell(_setting(run, value)) for run, value in zip(runs, values, strict=True)]
            rows.append((Heading(key, is_setting=True), cells))
    if not rows:
        return None
    columns = [Heading(run.name, run=run) for run in runs]
    return Table("Where the runs differ", "facts", "Where they differ", columns, rows)


def _setting(run: LoggedRun, value: Any) -> str:
    if run.config is None:
        return UNKNOWN
    return "–" if value is None else str(value)
