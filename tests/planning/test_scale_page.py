"""The table of models and machines on docs/train/scale.md. ``WRITE_DOCS=1`` writes it."""

import os

import pytest
from scale_page import check_or_write, row_of

from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.cli.planned_experiment import planned_run
from mhc_lightning.errors import UserError
from mhc_lightning.formatting import format_bytes, format_seconds
from mhc_lightning.planning import machine_of
from mhc_lightning.planning.failures import Failures
from mhc_lightning.planning.layout_search import describe, search_layouts
from mhc_lightning.planning.layouts import Layout
from mhc_lightning.planning.memory import state_bytes
from mhc_lightning.planning.step_traffic import step_traffic

MODELS = {
    "3B": ("mhc_3b",),
    "9B": ("mhc_9b",),
    "27B": ("mhc_27b",),
    "284B": (
        *("mhc_27b", "model.dim=4096", "model.num_layers=43", "model.num_heads=64"),
        *("model.ffn_dim=2048", "model.num_experts=256", "model.num_shared_experts=1"),
        "data.batch_size=8192",
    ),
}
DEVICES = (8, 64, 512, 4096)
HEADINGS = (
    "| model | H200 | layout | limit | tokens/s | memory | node | network |",
    "|---|---|---|---|---|---|---|---|",
)
FAILING = (
    "| model | H200 | checkpoint | written in | every | failures a day | a restart costs | lost |",
    "|---|---|---|---|---|---|---|---|",
)


def limit_of(layout: Layout) -> str:
    """What takes most of a step beside computing."""
    shares = {
        "waiting for stages": layout.waiting / layout.seconds,
        "communication": layout.exposed / layout.seconds,
    }
    name, share = max(shares.items(), key=lambda item: item[1])
    return "arithmetic and memory traffic" if share < 0.1 else f"{name}, {share:.0%}"


def rows_of(name: str, devices: int) -> tuple[str, str]:
    """The rows of a model on a machine: the best of few layouts, and its failures."""
    config, *overrides = MODELS[name]
    arguments = parse_arguments(["plan", "--config", config, *overrides])
    model, run = planned_run(compose_experiment(arguments))
    machine = machine_of(f"{devices}xh200")
    start = f"| {name} | {devices:,} |"
    try:
        (layout,) = search_layouts(model, run, machine, best=1, few=True).layouts
    except UserError as error:
        limit = "memory" if "fits" in str(error) else f"batch of {run.batch_size:,} sequences"
        return f"{start} none | {limit} | | | | |", f"{start} | | | | | |"
    traffic = step_traffic(model, layout.run, machine)
    # Rings and stages use the node's links where their neighbours are, the adapters elsewhere.
    inside, outside = traffic.experts
    replicas, per_node = layout.run.replicas, machine.kind.per_node
    if replicas.devices <= replicas.in_node(per_node):
        inside += traffic.sharing
    else:
        outside += traffic.sharing
    if layout.pipeline_size * replicas.experts.size <= per_node:
        inside += traffic.stages
    else:
        outside += traffic.stages
    weights, _, optimizer = state_bytes(model, [model], layout.run.micro_batch(machine),
                                        run.state_per_value)  # fmt: skip
    failures, size = Failures(), weights + optimizer
    seconds = failures.checkpoint_seconds(size, machine.nodes)
    first = (
        f"{start} {describe(layout)} | {limit_of(layout)} | {layout.tokens_per_second:,.0f} |"
        f" {format_bytes(layout.memory)} | {format_bytes(int(inside))} |"
        f" {format_bytes(int(outside))} |"
    )
    second = (
        f"{start} {format_bytes(size)} | {format_seconds(seconds)} |"
        f" {failures.interval(devices, seconds) / 60:.0f} min | {failures.per_day(devices):.2g} |"
        f" {failures.restart(devices, seconds) / 60:.0f} min |"
        f" {failures.lost(devices, seconds):.2%} |"
    )
    return first, second


@pytest.mark.parametrize(
    ("name", "devices"), [("3B", 8), ("9B", 512), ("27B", 4096), ("284B", 4096)]
)
def test_rows_of_the_page_are_what_is_predicted(name, devices):
    if os.environ.get("WRITE_DOCS"):
        return
    for table, row in zip(("scale", "failures"), rows_of(name, devices), strict=True):
        assert row_of(table, f"| {name} | {devices:,} |") == row


def test_the_page_has_every_model_on_every_machine():
    """With WRITE_DOCS=1, all rows are computed, which takes a minute."""
    if os.environ.get("WRITE_DOCS"):
        rows = [rows_of(name, devices) for name in MODELS for devices in DEVICES]
        scale, failures = zip(*rows, strict=True)
        check_or_write("scale", "\n".join((*HEADINGS, *scale)))
        check_or_write("failures", "\n".join((*FAILING, *failures)))
    for table in ("scale", "failures"):
        for name in MODELS:
            for devices in DEVICES:
                assert row_of(table, f"| {name} | {devices:,} |")
