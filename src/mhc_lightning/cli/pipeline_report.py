"""The text of a pipeline's plan."""

from collections.abc import Sequence
from textwrap import indent
from typing import TYPE_CHECKING

from mhc_lightning.cli.text_table import text_table
from mhc_lightning.formatting import format_bytes, format_seconds

if TYPE_CHECKING:
    from mhc_lightning.planning import Plan
    from mhc_lightning.planning.pipeline import PipelineForecast
    from mhc_lightning.planning.schedule_comparison import Comparison


def pipeline_heading(name: str, plan: "Plan") -> str:
    """The first lines: devices, schedule, and the micro-batches of a step."""
    run, pipeline = plan.run, plan.pipeline
    assert pipeline is not None
    layout = pipeline.pipeline.plan
    several = run.replicas.devices
    count = "a pipeline" if several == 1 else f"{several} pipelines that share the weights, each"
    return (
        f"{name} on {plan.machine.name}, {count} of {layout.devices} devices under"
        f" {layout.schedule}{spread_experts(plan)}\n"
        f"  {run.batch_size} sequences of {run.sequence_length} tokens per step, as"
        f" {run.micro_batches} passes of {run.micro_batch_size} per pipeline, each in"
        f" {pipeline.pipeline.micro_batches} micro-batches"
    )


def spread_experts(plan: "Plan") -> str:
    """How experts are spread over devices; nothing if they are not."""
    size = plan.run.replicas.experts.size
    return "" if size == 1 else f", the experts of a layer over {size} devices"


def devices_table(pipeline: "PipelineForecast") -> str:
    """Stages, blocks and memory of each device."""
    rows = [("device", "stages", "blocks", "in flight", "weights", "activations", "total")]
    for device in pipeline.devices:
        memory = device.memory
        rows.append(
            (
                str(device.device),
                ", ".join(map(str, device.stages)),
                str(device.blocks),
                str(device.in_flight),
                format_bytes(memory.weights),
                format_bytes(memory.activations),
                format_bytes(memory.total),
            )
        )
    return "memory of each device, and micro-batches between forward and backward\n" + _columns(
        rows
    )


def schedules_table(plan: "Plan") -> str:
    """Time, bubble, memory and overhead over a residual connection of every schedule."""
    assert plan.pipeline is not None
    chosen = plan.pipeline.pipeline.plan.schedule
    rows = [
        ("", "fullest", "step", "bubble", "", "overlapped", "bubble", ""),
    ]
    refusals = []
    for name, each in plan.schedules.items():
        if each.forecast is None:
            refusals.append(f"  {name:<16}  does not fit: {_first_clause(each.refusal)}")
            continue
        sequential, overlapped = each.forecast.sequential, each.forecast.overlapped
        rows.append(
            (
                name + ("*" if name == chosen else ""),
                format_bytes(each.forecast.fullest.memory.total),
                format_seconds(each.forecast.seconds(overlapped=False)),
                f"{sequential.bubble:.1%}",
                _overhead(each, overlapped=False),
                format_seconds(each.forecast.seconds(overlapped=True)),
                f"{overlapped.bubble:.1%}",
                _overhead(each, overlapped=True),
            )
        )
    about = "every schedule on these devices, with communication and replay overlapped as well"
    if any(each.baseline for each in plan.schedules.values()):
        about += "\n(+%: above the same network with the ordinary residual connection)"
    return "\n".join((about, _columns(rows), *refusals))


def _overhead(each: "Comparison", *, overlapped: bool) -> str:
    share = each.overhead(overlapped=overlapped)
    return "" if share is None else f"{share:+.1%}"


def _first_clause(refusal: str) -> str:
    clause = refusal.split(";")[0]
    return clause if len(clause) <= 66 else f"{clause[:65]}…"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """The first column to the left, the others to the right."""
    return indent(text_table(rows, "l" + "r" * (len(rows[0]) - 1)), "  ")
