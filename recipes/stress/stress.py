"""The largest learning rate that each connection survives: it rises until training fails.

    python recipes/stress/stress.py [size=cpu|gpu] [only=hc,mhc] [depths=8,24]
        [precisions=32-true] [rates=0.004,0.008] [output=FOLDER]
        [jobs=N | slurm.partition=NAME ...] [key=value ...]

For every connection, depth (in blocks) and precision the learning rate rises through `rates` until
a run fails; then one half way (in the logarithm) to the rate before is tried. outcome.py defines
failing. Other settings go to every `fit`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

from cell import Cell
from commands import shown
from library_text import prepare_library
from provenance import provenance, write_json
from rate_pictures import draw_largest_stable, draw_loss_by_rate
from recipe_words import chosen, of_size, read_words
from sweep import run_all

from mhc_lightning.reporting.logged_runs import LoggedRun, read_runs

HERE = Path(__file__).parent
PAPERS = ("residual", "hc", "mhc")
VARIANTS = (*PAPERS, "mhc_single_pass", "mhc_lite", "krom", "identity")
VARIED = {
    "connection": "only=hc,mhc",
    "model.num_layers": "depths=8,24",
    "trainer.precision": "precisions=32-true",
    "optimizer.lr": "rates=0.008,0.016",
    "output_dir": "output=FOLDER",
}


@dataclass(frozen=True)
class Size:
    """The grid of one size.

    Attributes:
        depths: In blocks of two sub-layers.
        precisions: Of the trainer, with the connections that are tried in each.
        rates: Learning rates, rising.
    """

    depths: tuple[int, ...]
    precisions: dict[str, tuple[str, ...]]
    rates: tuple[float, ...]


SIZES = {
    "cpu": Size(
        (8, 24),
        {"32-true": VARIANTS, "bf16-mixed": PAPERS},
        tuple(0.008 * 4**k for k in range(6)),
    ),
    "gpu": Size(
        (12, 30, 60),
        {"32-true": VARIANTS, "bf16-mixed": VARIANTS},
        tuple(0.001 * 4**k for k in range(7)),
    ),
}


def cells_of(size: Size, only: list[str], depths: list[int], precisions: list[str]) -> list[Cell]:
    """The cells of the grid; connections given by name are tried in every precision given."""
    return [
        Cell(connection, depth, precision)
        for precision in precisions or size.precisions
        for depth in depths or size.depths
        for connection in only or size.precisions.get(precision, VARIANTS)
    ]


def numbers(name: str, value: str, kind: type[int] | type[float]) -> list[Any]:
    """Positive numbers, comma-separated, in rising order.

    Raises:
        SystemExit: One of them is not a positive number.
    """
    try:
        values = [kind(part) for part in value.split(",") if part]
    except ValueError:
        values = [0]
    if not all(0 < number < float("inf") for number in values):
        raise SystemExit(f"error: {name}={value} is not a list of positive numbers")
    return sorted(set(values))


def table(cells: list[Cell]) -> str:
    """The result as text."""
    lines = ["connection        blocks  precision    largest stable  fails at   how"]
    for cell in cells:
        last, first = cell.largest_stable, cell.first_failure
        lines.append(
            f"{cell.connection:16}  {cell.depth:6}  {cell.precision:11}"
            f"  {'none' if last is None else f'{last:g}':>14}"
            + (f"  {first:8g}   {cell.outcomes[first].state}" if first else "      none")
        )
    return "\n".join(lines)


def record(cells: list[Cell], runs: list[LoggedRun], words: list[str]) -> dict[str, Any]:
    """The result as plain values."""
    return {
        **provenance(runs, words),
        "cells": [
            {
                "connection": cell.connection,
                "blocks": cell.depth,
                "precision": cell.precision,
                "largest_stable_learning_rate": cell.largest_stable,
                "failed": cell.failed,
                "runs": [
                    {
                        "learning_rate": rate,
                        "outcome": outcome.state,
                        "last_loss": outcome.loss,
                        "lowest_loss": outcome.lowest,
                        "largest_composite_gain_forward": cell.gains[rate][0],
                        "largest_composite_gain_backward": cell.gains[rate][1],
                    }
                    for rate, outcome in sorted(cell.outcomes.items())
                ],
            }
            for cell in cells
        ],
    }


def main(words: list[str]) -> None:
    """Prepare the text, raise learning rates, write the results."""
    defaults = dict.fromkeys(("only", "depths", "precisions", "rates", "output"), "")
    read = read_words(words, {"size": "cpu", **defaults}, VARIED)
    name = read.settings["size"]
    size, config = of_size(name, SIZES), shown(HERE / f"{name}.yaml")
    only = chosen("only", read.settings["only"], VARIANTS) if read.settings["only"] else []
    depths = numbers("depths", read.settings["depths"], int)
    rates = numbers("rates", read.settings["rates"], float) or size.rates
    precisions = list(dict.fromkeys(filter(None, read.settings["precisions"].split(","))))
    cells = cells_of(size, only, depths, precisions)
    folder = Path(read.settings["output"] or f"runs/stress/{name}")
    prepare_library(config, read.overrides)
    logged_runs: list[LoggedRun] = []

    def try_out(tried: list[tuple[Cell, float]]) -> None:
        runs = [cell.run(rate, config, read.overrides) for cell, rate in tried]
        ended = run_all(runs, folder, read.slurm, read.jobs)
        for (cell, rate), one in zip(tried, runs, strict=True):
            own = ended[one.name].folder
            logged = read_runs([str(own)]) if (own / "metrics.csv").is_file() else []
            cell.add(rate, next(iter(logged), None), ended[one.name].diverged)
            logged_runs.extend(logged)

    for rate in rates:
        try_out([(cell, rate) for cell in cells if not cell.failed])
    try_out([(cell, rate) for cell in cells if (rate := cell.half_way) is not None])
    results = folder / "results"
    write_json(record(cells, logged_runs, words), results / "stress.json")
    draw_loss_by_rate(cells, results / "loss_by_learning_rate.png")
    draw_largest_stable(cells, results / "largest_stable_learning_rate.png")
    print(f"\n{table(cells)}\n\nwrote {results}")


if __name__ == "__main__":
    main(sys.argv[1:])
