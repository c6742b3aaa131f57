"""`plan`: the memory and time of a run; and the check of memory that `fit` begins with."""

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.cli.fewer_collections import fewer_collections
from mhc_lightning.cli.layout_report import search
from mhc_lightning.cli.plan_report import report
from mhc_lightning.cli.planned_experiment import planned_run
from mhc_lightning.cli.strategy_choice import devices_per_node, resolve_strategy
from mhc_lightning.cli.strategy_settings import (
    PIPELINE_STRATEGY,
    PipelineSettings,
    check_pipeline_settings,
    draw,
    is_sharded,
    pipeline_of,
    read_settings,
    strategy_name,
)
from mhc_lightning.errors import UserError
from mhc_lightning.formatting import format_bytes

if TYPE_CHECKING:
    import torch

    from mhc_lightning.modules import Transformer
    from mhc_lightning.planning import DataParallel, Machine, Plan

_EXPERTS = "expert_parallel_size"
_OTHERWISE = "a smaller model, or a larger machine (see `plan` with machine=8xh200)"


@fewer_collections()
def plan(experiment: Experiment, arguments: Arguments) -> None:
    """Print the memory and time that a run needs, without allocating any of it.

    Raises:
        UserError: the settings cannot be used, or the machine that was asked for is too small.
    """
    from mhc_lightning.planning import machine_of, this_machine, with_schedules

    values = experiment.values()
    named = values.get("machine")
    if named is not None:
        machine = machine_of(str(named))
    else:
        count = devices_per_node(values["trainer"]) * values["trainer"].get("num_nodes", 1)
        if count < 1:
            raise UserError("trainer.devices and trainer.num_nodes must be at least 1")
        machine = this_machine(count, _device(values["trainer"]))
    if values["search"]:
        search(experiment, arguments, machine)
        return
    per_node = _per_node(machine, values["trainer"])
    experiment, choice = resolve_strategy(experiment, machine.devices, per_node)
    if choice is not None:
        print(choice, file=sys.stderr)
    values = experiment.values()
    check_pipeline_settings(values)
    model, planned = _planned(experiment, machine)
    if planned.pipeline is not None:
        planned = with_schedules(planned, model, _baseline(experiment, model))
    if arguments.json:
        print(json.dumps(planned.record()))
    else:
        print(report(experiment.file.stem, planned))
    if planned.pipeline is not None and values["picture"] is not None:
        draw(experiment.file.stem, planned.pipeline, values["picture"])
    if named is not None:
        _require_room(model, planned)


def _per_node(machine: "Machine", trainer: dict[str, Any]) -> int:
    """Devices of one node of a machine."""
    nodes = trainer.get("num_nodes", 1)
    if nodes > 1 or not machine.kind.is_gpu:
        return machine.devices // nodes
    return min(machine.devices, machine.kind.per_node)


def check_room(experiment: Experiment, devices: int, device: "torch.device") -> None:
    """Refuse a run that cannot fit, before anything of it is allocated.

    A run with parts or settings that are not known here is let through.

    Args:
        experiment: The run.
        devices: How many devices it has.
        device: This process's, whose free memory is looked at.

    Raises:
        UserError: It does not fit; says what it needs and what would make it fit.
    """
    from mhc_lightning.planning import Machine, NotPlannableError, machine_of, this_machine

    named = experiment.values().get("machine")
    if named is None:
        machine = this_machine(devices, device)
    else:
        machine = Machine(machine_of(str(named)).kind, devices)
    try:
        model, planned = _planned(experiment, machine)
    except NotPlannableError:
        return
    _require_room(model, planned)


def _planned(experiment: Experiment, machine: "Machine") -> "tuple[Transformer, Plan]":
    from mhc_lightning.planning import make_plan

    values = experiment.values()
    replicas, settings = _data_parallel(values, machine.devices)
    micro_batch_size = _micro_batch_size(experiment, replicas.devices)
    model, run = planned_run(experiment)
    replicas.experts.check(model, replicas.devices)
    pipeline = None
    if settings is None:
        block = model.set_recompute(values["recompute"])
    else:
        devices = machine.devices // replicas.devices
        pipeline = pipeline_of(values, settings, model, devices, micro_batch_size)
        block = pipeline.recompute_block(model)
    run = replace(
        run,
        micro_batch_size=micro_batch_size,
        replicas=replicas,
        recompute_block=block,
        pipeline=pipeline,
    )
    return model, make_plan(model, run, machine)


def _baseline(experiment: Experiment, model: "Transformer") -> "Transformer | None":
    """The model with the ordinary residual connection; None if that is what it has."""
    from mhc_lightning.cli.instantiation import build
    from mhc_lightning.modules import ResidualConnection
    from mhc_lightning.planning import ShapesOnly

    if any(isinstance(module, ResidualConnection) for module in model.modules()):
        return None
    with ShapesOnly():
        return build(experiment, "model", connection=ResidualConnection)


def _micro_batch_size(experiment: Experiment, devices: int) -> int:
    """Sequences per forward pass and device.

    Raises:
        UserError: the batch cannot be shared evenly.
    """
    data = experiment.values()["data"]
    size, micro = data["batch_size"], data["micro_batch_size"]
    if micro is None and size % devices == 0:
        micro = size // devices
    if not micro or micro < 1 or size < 1 or size % (micro * devices):
        from mhc_lightning.cli.components import build_data

        build_data(experiment, devices).accumulation(devices)
    return micro


def _data_parallel(
    values: dict[str, Any], devices: int
) -> "tuple[DataParallel, PipelineSettings | None]":
    """How devices share the batch and the model, and the settings of a pipeline, if it is one."""
    from mhc_lightning.planning import DataParallel, ExpertParallel

    strategy = values["strategy"]
    experts = ExpertParallel(strategy.get(_EXPERTS, 1), values["routing_imbalance"])
    if strategy_name(strategy) == PIPELINE_STRATEGY:
        settings = read_settings(strategy)
        count = settings.replicas(devices)
        length = devices // count
        replicas = DataParallel(count, count > 1, pipeline_size=length, experts=experts)
        return replicas, settings
    sharded = is_sharded(strategy)
    if experts.size > 1 and not sharded:
        raise UserError(
            f"strategy.{_EXPERTS}={experts.size} needs strategy=fsdp or strategy=pipeline"
        )
    views = bool(strategy.get("gradient_as_bucket_view", False))
    copies = not sharded and not views
    return DataParallel(devices, sharded=sharded, copies_gradients=copies, experts=experts), None


def _device(trainer: dict[str, Any]) -> "torch.device":
    """A device of the kind that the trainer will use on this machine."""
    import torch

    on_gpu = trainer.get("accelerator") != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _require_room(model: "Transformer", planned: "Plan") -> None:
    if planned.fits:
        return
    from mhc_lightning.planning import remedies

    machine, memory = planned.machine, planned.memory
    changes = "; or ".join(remedies(model, planned.run, machine)) or _OTHERWISE
    if machine.holds(memory.total, 0):
        raise UserError(
            f"the rows of the memory and their optimizer's state need"
            f" {format_bytes(planned.host_memory)} on each host but there are"
            f" {format_bytes(machine.kind.host_memory)} ({machine.name});"
            f" what would make it fit: {changes}"
        )
    kinds = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in vars(memory).items() if size)
    raise UserError(
        f"a device needs {format_bytes(memory.total)} of memory ({kinds}) but has"
        f" {format_bytes(machine.kind.memory)} ({machine.name});"
        f" what would make it fit: {changes}"
    )
