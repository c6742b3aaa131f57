"""The text of a plan."""

from textwrap import indent
from typing import TYPE_CHECKING

from mhc_lightning.cli.pipeline_report import (
    devices_table,
    pipeline_heading,
    schedules_table,
    spread_experts,
)
from mhc_lightning.cli.rows_report import rows_table
from mhc_lightning.cli.text_table import text_table
from mhc_lightning.formatting import format_bytes, format_count, format_duration, format_seconds

if TYPE_CHECKING:
    from mhc_lightning.planning import Plan

_ABOUT = {
    "weights": "parameters and buffers",
    "gradients": "of the step so far",
    "optimizer": "its state",
    "activations": "saved by a forward pass for its backward pass",
    "logits": "for a moment, a chunk of tokens at a time",
    "rebuilt": "for a moment in backward, where it is more than the logits were",
    "communication": "gathered parameters and buffers of collectives",
    "row_update": "for a moment, while tables are updated",
}

_RECEIVED = "buffers to receive in, and gathered parameters and gradients"


def report(name: str, plan: "Plan") -> str:
    """The whole plan as text.

    Args:
        name: The experiment's.
        plan: What is known of it.
    """
    parts = [_heading(name, plan), _parameters(plan), _memory(plan), _work(plan), _time(plan)]
    if plan.pipeline is not None:
        parts[3:3] = [devices_table(plan.pipeline)]
        parts += [schedules_table(plan)]
    if plan.placements:
        parts += [rows_table(plan)]
    return "\n\n".join(parts)


def _heading(name: str, plan: "Plan") -> str:
    run = plan.run
    if plan.pipeline is not None:
        return pipeline_heading(name, plan)
    held = "a share of" if run.replicas.sharded else "all of"
    sharing = f", each with {held} the weights" if run.replicas.devices > 1 else ""
    return (
        f"{name} on {plan.machine.name}{sharing}{spread_experts(plan)}\n"
        f"  {run.batch_size} sequences of {run.sequence_length} tokens per step, as"
        f" {run.micro_batches} micro-batches of {run.micro_batch_size} per device"
    )


def _parameters(plan: "Plan") -> str:
    counts = plan.parameters
    rows = [
        ("total", format_count(counts.total), "both vocabulary matrices included"),
        ("active", format_count(counts.active), "per token: no embedding, chosen experts only"),
        ("connections", format_count(counts.connections), ""),
        ("vocabulary", format_count(counts.vocabulary), "embedding and head"),
    ]
    if counts.memory:
        rows.append(("memory", format_count(counts.memory), "rows that n-grams can name"))
    return _table("parameters", rows)


def _memory(plan: "Plan") -> str:
    memory, kind = plan.memory, plan.machine.kind
    meanings = _ABOUT if plan.pipeline is None else _ABOUT | {"communication": _RECEIVED}
    rows = [
        (name, format_bytes(size), meanings[name])
        for name, size in vars(memory).items()
        if size or name not in ("rebuilt", "row_update")
    ]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    pipeline = plan.pipeline
    whose = (
        "per device" if pipeline is None else f"of the fullest device, {pipeline.fullest.device}"
    )
    rows.append(("total", format_bytes(memory.total), f"{verdict} in {format_bytes(kind.memory)}"))
    parts = [(name, format_bytes(size), "") for name, size in plan.activations.items() if size]
    parts.append(("together", format_bytes(memory.activations), ""))
    if block := plan.recompute_block:
        without, within = plan.activations_without_recompute, plan.activations_with_recompute
        on, off = ("this run", "") if plan.run.recompute_block else ("predicted", "this run")
        about = f"{on}: streams rebuilt in blocks of {block} sub-layers, one block included"
        parts += [
            ("recompute=off", format_bytes(without), off),
            (f"recompute={block}", format_bytes(within), about),
        ]
    return "\n".join(
        (
            _table(f"memory {whose}, at the fullest moment of a step", rows),
            _table("activations by what saves them", parts),
        )
    )


def _work(plan: "Plan") -> str:
    streams = plan.stream_bytes_per_token
    return _table(
        "work per token",
        [
            ("arithmetic", f"{plan.flops_per_token / 1e9:.3g} GFLOP", "forward and backward"),
            (
                "streams",
                format_bytes(streams.training_fused),
                "moved forward and backward, each operation one kernel",
            ),
            ("", format_bytes(streams.forward_fused), "of it forward"),
            (
                "",
                format_bytes(streams.forward_unfused),
                "forward, one operation at a time (Table 2)",
            ),
        ],
    )


def _time(plan: "Plan") -> str:
    step, kind = plan.step_seconds, plan.machine.kind
    rows = [
        ("arithmetic", format_seconds(step.compute), f"at {kind.flops_share:.0%} of the peak"),
        ("memory", format_seconds(step.traffic), f"at {kind.bandwidth_share:.0%} of the bandwidth"),
        ("collectives", format_seconds(step.communication), "beside both"),
        ("all-to-all", format_seconds(step.exchange), "of experts, which nothing hides"),
        ("waiting", format_seconds(step.waiting), "of devices for other stages, and transfers"),
        ("step", format_seconds(step.total), ""),
        ("tokens/s", f"{plan.tokens_per_second:,.0f}", "over all devices"),
        (
            "to finish",
            format_duration(86400 * plan.days),
            f"{plan.run.max_steps:,} steps, {_tokens(plan)}",
        ),
    ]
    if plan.placements:
        about = "beside all of this" if step.rows_hidden else "which nothing hides"
        rows.insert(5, ("rows", format_seconds(step.rows), f"of the memory's tables, {about}"))
    if plan.pipeline is None:
        del rows[4]
    if plan.run.replicas.experts.size == 1:
        del rows[3]
    title = "time per step, by a roofline (real steps take longer: launches, waiting, imbalance)"
    if plan.pipeline is not None and plan.pipeline.pipeline.measured is not None:
        title = f"time per step, from {plan.pipeline.pipeline.measured.file}"
        rows[:2] = [
            ("passes", format_seconds(step.compute), "mean over devices"),
            ("optimizer", format_seconds(step.traffic), ""),
        ]
    return _table(title, rows)


def _tokens(plan: "Plan") -> str:
    return f"{format_count(plan.tokens)} tokens"


def _table(title: str, rows: list[tuple[str, str, str]]) -> str:
    return f"{title}\n{indent(text_table(rows, 'lrl', first_width=13), '  ')}"
