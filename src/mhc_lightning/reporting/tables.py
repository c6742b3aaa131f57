"""The page's tables: numbers of each run, and what was run."""

import html
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mhc_lightning.formatting import (
    format_bytes,
    format_difference,
    format_gain,
    format_list,
    format_number,
    format_steps,
    format_sub_layers,
)
from mhc_lightning.reporting import run_description
from mhc_lightning.reporting.figures.run_styles import RunStyle
from mhc_lightning.reporting.gain_extremes import DIRECTIONS, KINDS, gain_tag
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.report import Report
from mhc_lightning.reporting.settings_comparison import differing_settings
from mhc_lightning.reporting.summary import AT_ONE, LIMIT, OverSeeds, Summary

_MISSING = '<span class="missing">not logged</span>'
# Settings that the facts name already.
_NAMED = frozenset(
    {
        *("connection._target_", "model.num_streams", "model.dim", "model.num_layers"),
        *("data.path", "trainer.max_steps", "optimizer.lr", "trainer.precision"),
        *("seed", "data.seed"),
    }
)


def named(run: LoggedRun, looks: Mapping[str, RunStyle]) -> str:
    """A run's name with its colour."""
    colour = looks[run.name].colour
    return (
        f'<span class="name"><span class="swatch" style="--run: var(--{colour})"></span>'
        f"{html.escape(run.name)}</span>"
    )


def numbers(report: Report) -> str:
    """One row per run; below it, gaps over seeds and what to mind."""
    columns: list[tuple[str, str, Callable[[Summary], str]]] = [
        ("Training loss", "at the end", _loss),
        ("Validation loss", "the last", _validation),
    ]
    baselines = {s.gap.baseline for s in report.summaries if s.gap is not None}
    if baselines:
        several = len(baselines) > 1
        to = "the baseline of its seed" if several else baselines.pop()
        columns.append(("Loss gap", f"to {to}, 95%", partial(_gap, named=several)))
    for kind in KINDS:
        for direction in DIRECTIONS:
            tag = gain_tag(kind, direction)
            name = "Composite" if kind == "composite" else "Single-layer"
            columns.append((f"{name} gain", f"{direction}, largest", _gain(tag)))
    columns += [
        ("Gradient norm", "median, largest", _gradient),
        ("Tokens/s", "median", _speed),
        ("Memory", "peak", _memory),
    ]
    head = "".join(
        f'<th scope="col">{html.escape(title)}<small>{html.escape(about)}</small></th>'
        for title, about, _ in columns
    )
    rows = []
    for summary in report.summaries:
        cells = "".join(f"<td>{cell(summary)}</td>" for *_, cell in columns)
        rows.append(f'<tr><th scope="row">{named(summary.run, report.looks)}</th>{cells}</tr>')
    table = _scrolling("Numbers of each run", "numbers", "Run", head, rows)
    notes = "".join(f'<p class="about">{html.escape(text)}</p>' for text in _to_mind(report))
    return f"{table}{_seeds(report)}{notes}\n"


def _scrolling(name: str, kind: str, corner: str, head: str, rows: list[str]) -> str:
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0">'
        f'<table class="{kind}"><thead><tr><th scope="col">{corner}</th>{head}</tr></thead>\n'
        f"<tbody>{chr(10).join(rows)}</tbody></table></div>\n"
    )


def _loss(summary: Summary) -> str:
    loss = summary.loss
    if loss is None:
        return _MISSING
    where = format_steps(loss.first_step, loss.last_step)
    return f"{loss.value:.4f}<small>{where}</small>"


def _validation(summary: Summary) -> str:
    if summary.validation is None:
        return _MISSING
    step, value = summary.validation
    return f"{format_number(value, 5)}<small>step {step:,}</small>"


def _gap(summary: Summary, named: bool) -> str:
    """The gap; `named`: with the name of the baseline."""
    gap = summary.gap
    if gap is None:
        return '<span class="missing">baseline</span>'
    parts = []
    if gap.loss is not None:
        parts.append(format_difference(gap.loss.value))
        interval = gap.loss.interval or "no interval"
        parts.append(f"<small>{interval}</small>")
        steps = gap.loss.first_step, gap.loss.last_step
        if summary.loss is None or steps != (summary.loss.first_step, summary.loss.last_step):
            parts.append(f"<small>{format_steps(*steps)}</small>")
    if gap.validation is not None:
        step, value = gap.validation
        when = "" if summary.validation and summary.validation[0] == step else f", step {step:,}"
        parts.append(f"<small>validation {format_difference(value)}{when}</small>")
    if named and parts:
        parts.append(f"<small>{html.escape(gap.baseline)}</small>")
    return "".join(parts) or _MISSING


def _gain(tag: str) -> Callable[[Summary], str]:
    def cell(summary: Summary) -> str:
        found = summary.gains.get(tag)
        if found is None:
            return _MISSING
        largest = found.largest
        if found.distance <= AT_ONE:
            return f"1<small>{'always' if found.distance == 0 else f'to {AT_ONE:g}'}</small>"
        place = ""
        if largest.value > LIMIT:
            place = format_sub_layers(largest.first_layer, largest.last_layer)
        small = f"<small>{place}</small>" if place else ""
        return f"{format_gain(largest.value)}<small>step {largest.step:,}</small>{small}"

    return cell


def _gradient(summary: Summary) -> str:
    norm = summary.gradient
    if norm is None:
        return _MISSING
    return (
        f"{format_number(norm.median)}, {format_number(norm.largest)}"
        f"<small>step {norm.step:,}</small>"
    )


def _speed(summary: Summary) -> str:
    return _MISSING if summary.speed is None else f"{summary.speed:,.0f}"


def _memory(summary: Summary) -> str:
    return _MISSING if summary.memory is None else format_bytes(summary.memory)


def _seeds(report: Report) -> str:
    if not report.seeds:
        return ""
    head = "".join(
        f'<th scope="col">{text}</th>' for text in ("Seeds", "Mean loss gap", "95% over seeds")
    )
    rows = [
        f'<tr><th scope="row">{html.escape(format_list(group.runs))}</th>'
        f"<td>{len(group.runs)}</td><td>{format_difference(group.value)}</td>"
        f"<td>{_ends(group)}</td></tr>"
        for group in report.seeds
    ]
    return _scrolling("Gaps over seeds", "numbers", "Runs", head, rows)


def _ends(group: OverSeeds) -> str:
    return f"{format_difference(group.low)} to {format_difference(group.high)}"


def _to_mind(report: Report) -> list[str]:
    """What limits the comparison."""
    notes = []
    compared = [(s.run.name, s.gap) for s in report.summaries if s.gap is not None]
    for name, gap in compared:
        if gap.same_batches is False:
            notes.append(
                f"{name} and {gap.baseline} did not see the same batches (data, batch or seed"
                " differ): their gap holds the noise of both."
            )
        elif gap.same_batches is None:
            notes.append(
                f"Whether {name} and {gap.baseline} saw the same batches is not known: their"
                " settings are not recorded."
            )
    short = [s.run.name for s in report.summaries if s.ending[0] == "incomplete"]
    if short:
        verb = "is" if len(short) == 1 else "are"
        notes.append(
            f"{format_list(short)} {verb} incomplete: final values are those of the last steps"
            " there are, gaps those of the last steps in common."
        )
    return notes


def what_was_run(report: Report) -> str:
    """Facts that all runs share as a list, the others as a table with a column per run."""
    runs = [run for run in report.runs if run.config is not None or run.environment is not None]
    text = ""
    unknown = [run.name for run in report.runs if run not in runs]
    if unknown:
        text = (
            f'<p class="about">Of {html.escape(format_list(unknown))} nothing is recorded but what'
            " was logged: there is neither config.yaml nor environment.json.</p>\n"
        )
    if not runs:
        return text
    described = [run_description.what_was_run(run) for run in runs]
    shared = [key for key in described[0] if len({about[key] for about in described}) == 1]
    listed = "".join(
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(described[0][key])}</dd></div>"
        for key in shared
    )
    text = f"<dl>{listed}</dl>\n{text}" if shared else text
    rows = {key: [about[key] for about in described] for key in described[0] if key not in shared}
    settings = differing_settings(runs)
    for key, values in settings.items():
        if key not in _NAMED:
            pairs = zip(runs, values, strict=True)
            rows[key] = [_setting(run, value) for run, value in pairs]
    if not rows:
        return text
    head = "".join(f'<th scope="col">{named(run, report.looks)}</th>' for run in runs)
    lines = []
    for key, cells in rows.items():
        name = f"<code>{html.escape(key)}</code>" if key in settings else html.escape(key)
        data = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{name}</th>{data}</tr>')
    table = _scrolling("Where the runs differ", "facts", "Where they differ", head, lines)
    return f"{text}{table}"


def _setting(run: LoggedRun, value: Any) -> str:
    if run.config is None:
        return run_description.UNKNOWN
    return "–" if value is None else str(value)
