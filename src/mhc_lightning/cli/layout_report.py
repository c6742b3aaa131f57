"""`plan search=true`: the best layouts of a run on a machine, and why the first is the best."""

import json
from dataclasses import replace
from textwrap import indent
from typing import TYPE_CHECKING

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.cli.planned_experiment import planned_run
from mhc_lightning.cli.text_table import text_table
from mhc_lightning.errors import UserError
from mhc_lightning.formatting import format_bytes, format_seconds

if TYPE_CHECKING:
    from mhc_lightning.planning import Machine
    from mhc_lightning.planning.layout_search import Found

_COLUMNS = (
    *("", "pp", "ep", "dp", "schedule", "micro-batch", "recompute", "memory", "bubble"),
    *("communication", "exposed", "step", "tokens/s"),
)


def search(experiment: Experiment, arguments: Arguments, machine: "Machine") -> None:
    """Print the best layouts of an experiment on a machine.

    Raises:
        UserError: A setting does not go with a search, or no layout runs.
    """
    from mhc_lightning.planning import ExpertParallel
    from mhc_lightning.planning.layout_search import search_layouts

    values = experiment.values()
    for key in ("picture", "times"):
        if values[key] is not None:
            raise UserError(f"{key}={values[key]} is for one layout; leave out search=true")
    experts = ExpertParallel(imbalance=values["routing_imbalance"])
    model, run = planned_run(experiment)
    run = replace(run, replicas=replace(run.replicas, experts=experts))
    found = search_layouts(model, run, machine, split_backward=not values["compile"])
    if arguments.json:
        print(json.dumps({"machine": machine.name, **found.record()}))
    else:
        print(layouts_report(experiment.file.stem, found, machine))


def layouts_report(name: str, found: "Found", machine: "Machine") -> str:
    """The layouts as a table, why the first is the best, and its settings.

    Args:
        name: The experiment's.
        found: The result of the search.
        machine: The machine.
    """
    from mhc_lightning.planning.layout_search import why_first

    rows = [_COLUMNS]
    for number, layout in enumerate(found.layouts, start=1):
        parts = layout.run.micro_batch_size // layout.micro_batch
        rows.append(
            (
                str(number),
                str(layout.pipeline_size),
                str(layout.run.replicas.experts.size),
                str(layout.run.replicas.devices),
                layout.name,
                f"{layout.micro_batch} × {parts}" if layout.pipeline_size > 1 else
                str(layout.micro_batch),
                layout.recompute,
                format_bytes(layout.memory),
                f"{layout.bubble:.1%}",
                format_seconds(layout.sent),
                format_seconds(layout.exposed),
                format_seconds(layout.seconds),
                f"{layout.tokens_per_second:,.0f}",
            )
        )  # fmt: skip
    heading = (
        f"{name} on {machine.name}: the best {len(found.layouts)} of {found.tried} layouts"
        f" ({found.simulated} simulated, the others cannot be as fast)\n"
        "  pp: devices of a pipeline, ep: those that share experts, dp: those that share a batch\n"
        "  times by the simulator, with communication overlapped as far as a schedule allows"
    )
    table = indent(text_table(rows, "lrrrlrlrrrrrr"), "  ")
    first = f"with: {found.layouts[0].settings}"
    return "\n".join((heading, table, why_first(found.layouts), first))
