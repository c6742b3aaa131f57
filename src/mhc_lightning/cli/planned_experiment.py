"""What planning needs of an experiment: its network on meta, and the settings of its run."""

from typing import TYPE_CHECKING

from mhc_lightning.cli.composition import Experiment

if TYPE_CHECKING:
    from mhc_lightning.modules import Transformer
    from mhc_lightning.planning import PlannedRun


def planned_run(experiment: Experiment) -> "tuple[Transformer, PlannedRun]":
    """The network, and the run of it on one device with one sequence at a time.

    Raises:
        NotPlannableError: A part of the experiment is not known.
        UserError: Settings cannot be used.
    """
    from mhc_lightning.cli.instantiation import build, target_of
    from mhc_lightning.modules import Transformer
    from mhc_lightning.planning import (
        DataParallel,
        NotPlannableError,
        PlannedRun,
        RowTraining,
        ShapesOnly,
        precision_of,
    )

    values = experiment.values()
    data, trainer = values["data"], values["trainer"]
    network = target_of(experiment, "model")
    if not getattr(network, "builds_on_meta", True):
        raise NotPlannableError(
            f"model: what {network.__name__} needs is not known before its files are read; a short"
            " fit measures it (trainer.max_steps=2)"
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
    assert isinstance(model, Transformer)
    return model, PlannedRun(
        batch_size=data["batch_size"],
        micro_batch_size=1,
        sequence_length=data["sequence_length"],
        max_steps=trainer["max_steps"],
        precision=precision_of(trainer.get("precision")),
        replicas=DataParallel(),
        state_per_value=optimizer.state_per_value,
        rows=RowTraining(model.memory.placement, getattr(optimizer, "memory_update", "adam")),
    )
