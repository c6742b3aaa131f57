"""Writes and prints the results of scaling recipes: JSON of points and fits, a table, a figure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gaps import BASELINE, Estimate, Line, Point, estimate, fit_line
from provenance import provenance, write_json
from scaling import Results
from scaling_figure import Panel, draw

from mhc_lightning.reporting.logged_runs import read_runs

_FIT_NOTE = (
    "Least squares for each seed; values are means over seeds with 95% intervals by Student's t."
    " These hold what seeds differ by, not that the form may be wrong. Few points make a weak fit:"
    " do not carry it beyond them."
)
_HEADER = (
    *("model", "step", "connection", "active parameters", "tokens", "FLOPs"),
    *("loss", "gap", "ratio %", "seeds"),
)
_WORDS = (0, 2, 9)  # columns that are no numbers
_MOST_ROWS = 10  # of the printed table, for each connection


def by_connection(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Points in their order, the baseline's left out."""
    found: dict[str, list[Point]] = {}
    for point in points:
        if point.connection != BASELINE:
            found.setdefault(point.connection, []).append(point)
    return found


def gap_lines(points: Iterable[Point]) -> dict[str, tuple[Line | None, Line | None]]:
    """Lines through each connection's gaps and through its ratios."""
    return {
        connection: (fit_line(own, lambda p: p.gaps), fit_line(own, lambda p: p.ratios))
        for connection, own in by_connection(points).items()
    }


def described_lines(lines: dict[str, tuple[Line | None, Line | None]]) -> list[dict[str, Any]]:
    """Those of `gap_lines` for the JSON."""
    return [
        {
            "quantity": quantity,
            "connection": connection,
            "form": "value + slope * log10(FLOPs / centre)",
            "fit": None if line is None else _without_connection(line),
        }
        for connection, pair in lines.items()
        for quantity, line in zip(("gap", "ratio_percent"), pair, strict=True)
    ]


def described_power_law(connection: str, points: Sequence[Point]) -> dict[str, Any]:
    """A power law without a floor through one connection's losses, for the JSON."""
    line = fit_line(points, lambda p: {seed: math.log10(v) for seed, v in p.losses.items()})
    described: dict[str, Any] = {
        "quantity": "loss",
        "connection": connection,
        "form": "factor * (FLOPs / centre) ** -exponent",
        "fit": None,
    }
    if line is not None:
        told = _without_connection(replace(line, value=line.value.map(lambda v: 10**v)))
        told["factor"] = told.pop("value")
        told["exponent"] = asdict(line.slope.map(lambda v: -v))
        del told["slope"]
        told["deviation_log10"] = told.pop("deviation")
        described["fit"] = told
    return described


def _without_connection(line: Line) -> dict[str, Any]:
    return {key: value for key, value in asdict(line).items() if key != "connection"}


def described_point(point: Point) -> dict[str, Any]:
    """A point for the JSON."""
    described = {
        "member": point.member,
        "connection": point.connection,
        "step": point.step,
        "parameters": point.cost.parameters,
        "tokens": point.tokens,
        "flops_per_token": point.cost.flops_per_token,
        "flops": point.flops,
        "loss": described_values(point.losses),
        "gap": described_values(point.gaps),
        "ratio_percent": described_values(point.ratios),
        "diverged_seeds": list(point.diverged),
    }
    if point.connection == BASELINE:
        del described["gap"], described["ratio_percent"]
    return described


def described_values(values: dict[int, float]) -> dict[str, Any]:
    """Values by seed for the JSON, with their mean and its interval."""
    found = estimate(values.values())
    by_seed = {str(seed): value for seed, value in values.items()}
    return {"by_seed": by_seed, **(asdict(found) if found is not None else {"mean": None})}


def write_results(
    file: Path,
    words: Sequence[str],
    results: dict[str, Results],
    points: Sequence[Point],
    fits: tuple[str, Sequence[dict[str, Any]]],
    panels: Sequence[Panel],
) -> None:
    """Write the JSON and, beside it, the PNG; print the table, and say where they are.

    Args:
        file: The JSON.
        words: What the recipe was called with.
        results: The runs by member.
        points: All points.
        fits: What they are, in words, and each for the JSON.
        panels: The figure's.
    """
    runs = {name: list(found.runs.values()) for name, found in results.items()}
    seeds = list(dict.fromkeys(seed for found in results.values() for _, seed in found.runs))
    ended = [str(r.folder) for found in runs.values() for r in found if not r.diverged and r.folder]
    record = {
        **provenance(read_runs(ended), words),
        "baseline": BASELINE,
        "seeds": seeds,
        "loss": "val/loss: nats per token on held-out text",
        "validation_tokens_at_most": {n: found[0].validation_tokens for n, found in runs.items()},
        "gap": f"loss minus that of {BASELINE} after the same tokens, in pairs of the same seed",
        "intervals": "95%, Student's t over seeds; none for a single seed",
        "flops": "plan's FLOPs per token (forward and backward) times tokens",
        "points": [described_point(point) for point in points],
        "fitted": f"{fits[0]}. {_FIT_NOTE}",
        "fits": list(fits[1]),
    }
    write_json(record, file)
    many = f"Mean and 95% interval over {len(seeds)} seeds" if len(seeds) > 1 else "A single seed"
    fitted = any(curve.line is not None for panel in panels for curve in panel.curves.values())
    lines = " Dashed: straight lines in log10(FLOPs), fitted." if fitted else ""
    picture = file.with_suffix(".png")
    draw(panels, f"{many}.{lines}", picture)
    print(f"\n{table(points)}\n\nwrote {file} and {picture}")


def table(points: Sequence[Point]) -> str:
    """Points as plain text; of many along one run, some that are evenly apart."""
    places = list(dict.fromkeys((point.member, point.step) for point in points))
    stride = math.ceil(len(places) / _MOST_ROWS)
    kept = set(places[::-1][::stride])  # counted from the last, which has to be there
    rows = [_HEADER, *(_row(p) for p in points if (p.member, p.step) in kept)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{width}}" if k in _WORDS else f"{cell:>{width}}"
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(point: Point) -> tuple[str, ...]:
    compared = point.connection != BASELINE
    seeds = str(len(point.losses))
    if compared and len(point.gaps) < len(point.losses):
        seeds += f", in pairs {len(point.gaps)}"
    if point.diverged:
        seeds += f", diverged: {', '.join(map(str, point.diverged))}"
    return (
        point.member,
        f"{point.step:,}",
        point.connection,
        f"{point.cost.parameters['active']:,}",
        f"{point.tokens:,}",
        f"{point.flops:.2e}",
        _shown(estimate(point.losses.values()), "{:.4f}"),
        _shown(estimate(point.gaps.values()), "{:+.4f}") if compared else "",
        _shown(estimate(point.ratios.values()), "{:.2f}") if compared else "",
        seeds,
    )


def _shown(found: Estimate | None, form: str) -> str:
    return "none" if found is None else found.text(form)
