"""`plan`: what a run will need and how long it should take; `fit`'s refusal of what cannot fit."""

import json
import sys
from typing import TYPE_CHECKING, Any

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.cli.plan_report import in_units, report
from mhc_lightning.errors import UserError

if TYPE_CHECKING:
    import torch

    from mhc_lightning.modules import Transformer
    from mhc_lightning.planning import Layout, Machine, Plan

_OTHERWISE = (
    "a smaller model, or a larger machine (`plan` with machine=8xh200, say, tells its needs)"
)


def plan(experiment: Experiment, arguments: Arguments) -> None:
    """Print what a run needs; nothing of it is allocated.

    Raises:
        UserError: the settings are no good, or the machine that was asked for is too small.
    """
    from mhc_lightning.planning import machine_of, this_machine

    values = experiment.values()
    named = values.get("machine")
    if named is not None:
        machine = machine_of(str(named))
    else:
        device = _device(values["trainer"])
        machine = this_machine(_configured_devices(values["trainer"], device), device)
    _note_choice(experiment, machine)
    model, planned = _planned(experiment, machine)
    if arguments.json:
        print(json.dumps(planned.record()))
    else:
        print(report(experiment.file.stem, planned))
    if named is not None:
        _require_room(model, planned)


def _note_choice(experiment: Experiment, machine: "Machine") -> None:
    """Say what `strategy=pipeline_or_fsdp` will be, if that is not what is planned here."""
    from mhc_lightning.cli.strategy_choice import settled

    nodes = experiment.values()["trainer"].get("num_nodes", 1)
    found, choice = settled(experiment, machine.devices, machine.devices // nodes)
    if choice is not None and _strategy_name(found.values()["strategy"]) == "pipelinestrategy":
        print(f"{choice}; planned as strategy=fsdp, with its sums", file=sys.stderr)


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
    from mhc_lightning.cli.building import build
    from mhc_lightning.modules import Transformer
    from mhc_lightning.planning import (
        NotPlannableError,
        Run,
        ShapesOnly,
        make_plan,
        precision_of,
    )

    values = experiment.values()
    data, trainer = values["data"], values["trainer"]
    if _strategy_name(values["strategy"]) == "pipelinestrategy":
        raise NotPlannableError(
            "strategy=pipeline: what each stage needs is not predicted; plan with strategy=fsdp for"
            " the sums over all devices"
        )
    with ShapesOnly():
        model = build(experiment, "model")
    optimizer = build(experiment, "optimizer")
    for section, part, known in (
        ("model", model, isinstance(model, Transformer)),
        ("optimizer", optimizer, hasattr(optimizer, "state_per_value")),
    ):
        if not known:
            raise NotPlannableError(f"{section}: what {type(part).__name__} needs is not known")
    run = Run(
        batch_size=data["batch_size"],
        micro_batch_size=_micro_batch_size(experiment, machine.devices),
        sequence_length=data["sequence_length"],
        max_steps=trainer["max_steps"],
        precision=precision_of(trainer.get("precision")),
        layout=_layout(values["strategy"], machine.devices),
        state_per_value=optimizer.state_per_value,
        recompute_block=model.set_recompute(values["recompute"]),
    )
    return model, make_plan(model, run, machine)


def _micro_batch_size(experiment: Experiment, devices: int) -> int:
    """Sequences per forward pass and device.

    Raises:
        UserError: the data module's own, for a batch that cannot be shared evenly.
    """
    data = experiment.values()["data"]
    size, micro = data["batch_size"], data["micro_batch_size"]
    if micro is None and size % devices == 0:
        micro = size // devices
    if not micro or micro < 1 or size < 1 or size % (micro * devices):
        from mhc_lightning.cli.building import build_data

        build_data(experiment, devices).accumulation(devices)
    return micro


def _layout(strategy: dict[str, Any], devices: int) -> "Layout":
    """What each device holds under a strategy; by its name, so that Lightning is not imported."""
    from mhc_lightning.planning import Layout

    name = _strategy_name(strategy)
    sharded = any(word in name for word in ("shard", "fsdp", "modelparallel"))
    views = bool(strategy.get("gradient_as_bucket_view", False))
    return Layout(devices, sharded=sharded, copies_gradients=not sharded and not views)


def _strategy_name(strategy: dict[str, Any]) -> str:
    return str(strategy.get("name") or strategy.get("_target_")).rpartition(".")[2].lower()


def _configured_devices(trainer: dict[str, Any], device: "torch.device") -> int:
    """How many devices the trainer will use on this machine."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices).isdigit() and int(devices) > 0:
        count = int(devices)
    else:  # auto, or -1 for all
        import torch

        count = torch.cuda.device_count() if device.type == "cuda" else 1
    return count * trainer.get("num_nodes", 1)


def _device(trainer: dict[str, Any]) -> "torch.device":
    """Of the kind that the trainer will use on this machine."""
    import torch

    on_gpu = trainer.get("accelerator") != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _require_room(model: "Transformer", planned: "Plan") -> None:
    if planned.fits:
        return
    from mhc_lightning.planning import remedies

    kinds = ", ".join(
        f"{kind} {in_units(size)}" for kind, size in vars(planned.memory).items() if size
    )
    changes = remedies(model, planned.run, planned.machine)
    raise UserError(
        f"a device needs {in_units(planned.memory.total)} of memory ({kinds}) but has"
        f" {in_units(planned.machine.kind.memory)} ({planned.machine.name});"
        f" what would make it fit: {'; or '.join(changes) or _OTHERWISE}"
    )
