"""Changes of settings that may make a pipelined run fit into memory."""

from collections.abc import Iterator
from dataclasses import replace

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Transformer
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.pipeline import Pipeline
from mhc_lightning.planning.planned_run import PlannedRun
from mhc_lightning.planning.stages import SCHEDULES, cut_network

_MOST_DEVICES = 1024

Change = tuple[str, PlannedRun]


def pipeline_changes(
    model: Transformer, run: PlannedRun, machine: Machine
) -> list[Iterator[Change]]:
    """Changes of a pipeline's layout, each kind from the smallest on; not every one suffices.

    Args:
        model: The model; it may be on the meta device.
        run: A pipelined run.
        machine: The machine on which the run does not fit.
    """
    return [
        _recomputing(run, model),
        _more_parts(run),
        _fewer_sequences(run),
        _other_schedules(run, model),
        _more_devices(run, model, machine),
        _sharded_instead(run),
    ]


def _recomputing(run: PlannedRun, model: Transformer) -> Iterator[Change]:
    assert run.pipeline is not None
    pipeline = replace(run.pipeline, recompute="auto")
    if run.recompute_block == 0 < pipeline.recompute_block(model):
        yield "recompute=auto", _with(run, pipeline, model)


def _more_parts(run: PlannedRun) -> Iterator[Change]:
    assert run.pipeline is not None
    for parts in range(run.pipeline.micro_batches + 1, run.micro_batch_size + 1):
        if run.micro_batch_size % parts == 0 and _runs(run.pipeline, parts, run.micro_batch_size):
            pipeline = replace(run.pipeline, micro_batches=parts)
            yield f"strategy.microbatches={parts}", replace(run, pipeline=pipeline)


def _fewer_sequences(run: PlannedRun) -> Iterator[Change]:
    """Fewer micro-batches of the same size."""
    assert run.pipeline is not None
    each = run.micro_batch_size // run.pipeline.micro_batches
    for parts in range(run.pipeline.micro_batches - 1, 0, -1):
        size = parts * each
        divides = run.batch_size % (size * run.replicas.devices) == 0
        if divides and _runs(run.pipeline, parts, size):
            setting = f"data.micro_batch_size={size} strategy.microbatches={parts}"
            pipeline = replace(run.pipeline, micro_batches=parts)
            yield setting, replace(run, micro_batch_size=size, pipeline=pipeline)


def _other_schedules(run: PlannedRun, model: Transformer) -> Iterator[Change]:
    assert run.pipeline is not None
    for schedule in sorted(SCHEDULES, key="gpipe".__eq__):  # last: its devices wait most
        try:
            pipeline = run.pipeline.under(schedule, model, run.micro_batch_size)
        except UserError:
            continue
        if schedule != run.pipeline.plan.schedule:
            yield f"strategy.schedule={schedule}", _with(run, pipeline, model)


def _more_devices(run: PlannedRun, model: Transformer, machine: Machine) -> Iterator[Change]:
    """Twice as many devices each time: longer pipelines, or more pipelines."""
    assert run.pipeline is not None
    plan = run.pipeline.plan
    devices = 2 * run.devices
    while devices <= _MOST_DEVICES:
        for size in (plan.devices * devices // run.devices, plan.devices):
            replicas = devices // size
            if run.batch_size % (run.micro_batch_size * replicas):
                continue
            try:
                cut = cut_network(model, schedule=plan.schedule, devices=size)
                cut.check_micro_batches(run.pipeline.micro_batches, run.micro_batch_size)
            except UserError:
                continue
            layout = replace(
                run.replicas, devices=replicas, sharded=replicas > 1, pipeline_size=size
            )
            changed = replace(run, replicas=layout)
            setting = f"{device_settings(devices, machine)} strategy.pipeline_size={size}"
            yield setting, _with(changed, replace(run.pipeline, plan=cut), model)
        devices *= 2


def _sharded_instead(run: PlannedRun) -> Iterator[Change]:
    if run.batch_size % run.devices == 0 and run.devices > 1:
        layout = replace(run.replicas, devices=run.devices, sharded=True, pipeline_size=1)
        yield (
            "strategy=fsdp data.micro_batch_size=1",
            replace(run, replicas=layout, micro_batch_size=1, pipeline=None),
        )


def device_settings(devices: int, machine: Machine) -> str:
    """`trainer.devices` and, for several nodes, `trainer.num_nodes`."""
    per_node = machine.kind.per_node
    if devices <= per_node or not machine.kind.is_gpu:
        return f"trainer.devices={devices}"
    return f"trainer.devices={per_node} trainer.num_nodes={-(-devices // per_node)}"


def _with(run: PlannedRun, pipeline: Pipeline, model: Transformer) -> PlannedRun:
    return replace(run, pipeline=pipeline, recompute_block=pipeline.recompute_block(model))


def _runs(pipeline: Pipeline, parts: int, batch: int) -> bool:
    try:
        pipeline.plan.check_micro_batches(parts, batch)
    except UserError:
        return False
    return True
