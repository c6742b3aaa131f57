"""The page: one HTML file that needs nothing else."""

import base64
import html
from datetime import UTC, datetime
from pathlib import Path

import mhc_lightning
from mhc_lightning.formatting import format_list
from mhc_lightning.plotting.theme import COLOURS
from mhc_lightning.reporting import run_description, tables
from mhc_lightning.reporting.figures.inline_svg import inline_svg
from mhc_lightning.reporting.figures.sections import Section
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.report import Report
from mhc_lightning.reporting.summary import AT_ONE, LIMIT
from mhc_lightning.reporting.tensorboard_events import Picture
from mhc_lightning.reporting.verdicts import RISE_SHARE, SPIKE

GENERATOR = "mhc-lightning report"
_MATRICES = "stream_matrices/"
_MOST_MATRICES = 12  # of a run


def page(report: Report) -> str:
    """The whole file."""
    names = [run.name for run in report.runs]
    title = format_list(names) if len(names) < 5 else f"{len(names)} runs"
    sections = [
        ("verdicts", "Verdicts", _verdicts(report)),
        ("numbers", "Numbers", tables.numbers(report)),
        ("what", "What was run", tables.what_was_run(report)),
        *((f"figures-{k}", part.title, _figures(part)) for k, part in enumerate(report.sections)),
        ("matrices", "Matrices", _matrices(report)),
        ("again", "How to reproduce", _again(report)),
    ]
    shown = [section for section in sections if section[-1]]
    links = [*((name, heading) for name, heading, _ in shown), ("method", _METHOD_TITLE)]
    navigation = "".join(f'<li><a href="#{n}">{html.escape(h)}</a></li>' for n, h in links)
    body = [
        '<header><p class="eyebrow">mhc-lightning report</p>',
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lede">{html.escape(_lede(report))}</p>',
        f'<nav aria-label="Contents"><ul>{navigation}</ul></nav></header>',
        "<main>",
        *(_section(*section) for section in shown),
        _method(),
        "</main>",
        f"<footer>Written by mhc-lightning {mhc_lightning.__version__} on"
        f" {datetime.now(UTC):%Y-%m-%d}. The figures are beside this page as PNG files, in"
        " figures.</footer>",
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta name="generator" content="{GENERATOR}">',
            f"<title>{html.escape(title)}: report</title>",
            f"<style>\n{_style()}</style></head>",
            "<body>",
            *body,
            "</body></html>\n",
        ]
    )


def _style() -> str:
    light = "".join(f" --{name}: {pair[0]};" for name, pair in COLOURS.items())
    dark = "".join(f" --{name}: {pair[1]};" for name, pair in COLOURS.items())
    rules = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return (
        f":root {{{light} }}\n@media (prefers-color-scheme: dark) {{ :root {{{dark} }} }}\n{rules}"
    )


def _section(name: str, heading: str, content: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-heading">'
        f'<h2 id="{name}-heading">{html.escape(heading)}</h2>\n{content}</section>'
    )


def _lede(report: Report) -> str:
    runs = report.runs
    experiments = {run_description.what_was_run(run)["Experiment"] for run in runs}
    known = len(experiments) == 1 and run_description.UNKNOWN not in experiments
    of = f" of {experiments.pop()}" if known else ""
    text = f"{'One run' if len(runs) == 1 else f'{len(runs)} runs'}{of}"
    if report.baseline is not None:
        text += f", compared with {report.baseline.name}"
    return f"{text}."


def _verdicts(report: Report) -> str:
    cards = []
    for summary, verdict in zip(report.summaries, report.verdicts, strict=True):
        run = summary.run
        word, sentence = summary.ending
        ending = "" if word in ("complete", "diverged") else (
            f'<span class="badge ending">{"length unknown" if word == "unknown" else word}</span>'
        )  # fmt: skip
        points = "".join(f"<li>{html.escape(text)}</li>" for text in verdict.sentences)
        missing = ""
        if verdict.not_judged:
            listed = html.escape(format_list(verdict.not_judged))
            missing = f'<p class="about">Not judged, because not logged: {listed}.</p>'
        told = "" if sentence in verdict.sentences else (
            f'<p class="about">{html.escape(sentence)}</p>'
        )  # fmt: skip
        cards.append(
            f'<article class="verdict" style="--run: var(--{report.looks[run.name].colour})">'
            f"<header><h3>{html.escape(run.name)}</h3>"
            f'<span class="badge {_class(verdict.state)}">{verdict.label}</span>{ending}</header>'
            f"<ul>{points}</ul>{told}{missing}</article>"
        )
    return f'<div class="verdicts">{"".join(cards)}</div>\n'


def _class(state: str) -> str:
    return "open" if " " in state else state


def _figures(section: Section) -> str:
    shown = "\n".join(
        f"<figure>{inline_svg(p.figure, p.name, p.title, p.description)}</figure>"
        for p in section.panels
    )
    pairs = " pairs" if len(section.panels) > 3 or len(section.panels) == 2 else ""
    about = f'<p class="about">{html.escape(section.about)}</p>'
    return f'{about}\n<div class="figures{pairs}">{shown}</div>\n'


def _matrices(report: Report) -> str:
    parts = []
    for run in report.runs:
        found = sorted((t for t in run.pictures if t.startswith(_MATRICES)), key=_depth)
        if not found or run_description.has_one_stream(run):
            continue
        shown = _at_most(found, _MOST_MATRICES)
        more = len(found) - len(shown)
        rest = f'<p class="about">{more} more were logged.</p>' if more else ""
        images = "".join(_matrix(run, tag, run.pictures[tag]) for tag in shown)
        name = tables.named(run, report.looks)
        parts.append(f'<h3>{name}</h3><div class="matrices">{images}</div>{rest}')
    if not parts:
        return ""
    about = (
        "Residual matrices averaged over tokens, and their products over depth, as the run drew"
        " them last: entry (i, j) is what stream j gives to stream i."
    )
    return f'<p class="about">{about}</p>\n{"".join(parts)}\n'


def _matrix(run: LoggedRun, tag: str, picture: Picture) -> str:
    what = tag.removeprefix(_MATRICES).replace("_", " ")
    about = f"Heat map of the residual matrix of {run.name}, {what}, at step {picture.step:,}"
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{picture.width}"'
        f' height="{picture.height}" loading="lazy" alt="{html.escape(about)}"></figure>'
    )


def _at_most(tags: list[str], count: int) -> list[str]:
    """Products over depth first of all, and single sub-layers evenly spaced."""
    if len(tags) <= count:
        return tags
    products = [tag for tag in tags if "composite" in tag][:count]
    single = [tag for tag in tags if "composite" not in tag]
    room = count - len(products)
    return [*(single[k * len(single) // room] for k in range(room)), *products]


def _depth(tag: str) -> tuple[bool, list[int]]:
    """Single sub-layers first, in their order."""
    numbers = [int(part) for part in tag.split("_") if part.isdigit()]
    return "composite" in tag, numbers


def _again(report: Report) -> str:
    parts = []
    for run in report.runs:
        commands = run_description.commands(run)
        text = '<p class="about">No command was recorded with this run.</p>'
        if commands:
            lines = html.escape("\n".join(commands))
            text = f'<pre tabindex="0"><code>{lines}</code></pre>'
        notes = _notes(run)
        listed = f'<p class="about">{html.escape(" ".join(notes))}</p>' if notes else ""
        parts.append(
            f'<div class="again"><h3>{tables.named(run, report.looks)}</h3>{text}{listed}</div>'
        )
    about = (
        "What was typed, with a new output_dir, to be given where the data are; every setting is in"
        " config.yaml in the run's folder."
    )
    return f'<p class="about">{about}</p>\n{"".join(parts)}\n'


def _notes(run: LoggedRun) -> list[str]:
    commit = run_description.commit(run)
    notes = [f"Commit {commit}."] if commit else []
    processes = run.fact("processes")
    if isinstance(processes, int) and processes > 1:
        notes.append(f"It ran as {processes} processes.")
    starts = run_description.starts(run)
    if len(starts) > 1:
        times = format_list([run_description.when(start.get("started")) for start in starts[1:]])
        notes.append(f"It was resumed: {times}.")
    return notes


def _method() -> str:
    return (
        f'<details id="method" open><summary>{_METHOD_TITLE}</summary>\n'
        f"{''.join(f'<p>{text}</p>' for text in _METHOD)}</details>"
    )


_METHOD_TITLE = "How this was computed"
_METHOD = (
    "<b>Final loss.</b> The mean of the training loss over the final window: the last 10% of the"
    " logged steps, but at least 20 of them where that is no more than half. Validation loss is the"
    " last that was logged.",
    "<b>Gap.</b> The same mean, of the differences between a run and its baseline at the same"
    " steps. Where both saw the same batches, what is common to these cancels. The 95% interval:"
    " the window is cut into 4 to 10 stretches of equal length, and Student's t is applied to the"
    " means of these, which allows for correlation between neighbouring steps. It covers the noise"
    " of the batches, not other seeds; where several runs differ in their seed alone, the interval"
    " over seeds is given, too.",
    f"<b>Gains.</b> The largest over sub-layers and logged steps. Sub-layers are counted from 0;"
    f" those named are neighbours with at least half of the largest value. A gain above {LIMIT:g}"
    f" or below {1 / LIMIT:g} has left 1; within {AT_ONE:g} it counts as 1.",
    "<b>Verdicts.</b> <em>Diverged</em>: the loss or its gradient was not finite."
    f" <em>Unsteady</em>: a gain left 1; or the loss rose again, by more than its interval and"
    f" {RISE_SHARE:.0%} of what it had come down; or, after the first tenth, the gradient norm"
    f" exceeded {SPIKE:g} times its median. <em>Steady</em>: loss and gains were logged and none of"
    " this. <em>Finite</em>: nothing of this, but gains were not logged. These thresholds are this"
    " program's.",
    "<b>Speed and memory.</b> The median of the logged tokens per second, and the largest peak of"
    " memory that the first process logged. Both depend on what else the machine was doing.",
)
