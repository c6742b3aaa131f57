"""`fit`: train, or go on with a run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mhc_lightning.checkpoints.names import LAST
from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.cli.run_folder import (
    claim,
    delete_run,
    is_first_process,
    recorded_end,
    write_records,
)
from mhc_lightning.files.run_layout import CHECKPOINTS

if TYPE_CHECKING:
    import lightning.pytorch as pl


def fit(experiment: Experiment, arguments: Arguments) -> None:
    """Train from the start or from `ckpt_path`, writing everything to `output_dir`.

    Raises:
        UserError: the settings, the data, the folder or the checkpoint are no good.
        NonFiniteLossError: the loss became NaN or infinite.
        RunFaultError: a process of the run died, hung, failed or ran out of memory.
        SIGTERMException: stopped by SIGTERM, after saving.
    """
    values, record = experiment.values(), experiment.record()
    folder = Path(values["output_dir"])
    claim(folder, resumes=values["ckpt_path"] is not None, overwrite=values["overwrite"])

    from mhc_lightning.cli.checkpoints import find_checkpoint, holds_weights_alone, load_fitting
    from mhc_lightning.cli.components import (
        build_data,
        build_model_for,
        build_trainer,
        check_layout,
        count_optimizer_steps,
        replicas,
    )
    from mhc_lightning.cli.instantiation import build, build_members
    from mhc_lightning.cli.plan import check_room
    from mhc_lightning.cli.run_faults import named_faults
    from mhc_lightning.cli.strategy_choice import resolve_strategy

    experiment, choice = resolve_strategy(experiment)
    if choice is not None and is_first_process():
        print(choice, file=sys.stderr)
    checkpoint = find_checkpoint(experiment)
    if checkpoint is None and values["ckpt_path"] is not None:
        print(f"warning: the run in {folder} had not saved yet; starting over", file=sys.stderr)
    starts_over = checkpoint is None
    if checkpoint is not None and checkpoint.parent.resolve() != (folder / CHECKPOINTS).resolve():
        # Another run's state: this folder's own run, if it holds one, would be lost.
        claim(folder, resumes=False, overwrite=values["overwrite"])
        starts_over = True
    trainer = build_trainer(
        experiment,
        logger=build_members(experiment, "logger"),
        callbacks=[*build_members(experiment, "callbacks"), build(experiment, "checkpoint")],
    )
    data = build_data(experiment, replicas(trainer))
    count_optimizer_steps(trainer, experiment, data)
    if is_first_process():  # the others start later, or end with it
        check_room(experiment, trainer.world_size, trainer.strategy.root_device)
    module = build_model_for(experiment, trainer)
    check_layout(trainer, module, data)
    data.validate_against(module.model.vocab_size)
    if checkpoint is not None:
        saved = load_fitting(checkpoint, module, experiment)
        if holds_weights_alone(saved):
            module.start_from(saved["state_dict"])
            _begin_anew(experiment, checkpoint, trainer)
            checkpoint = None
        elif is_first_process():
            step = saved["global_step"]
            print(f"going on from step {step}: {checkpoint}", file=sys.stderr)
            if step >= trainer.max_steps:
                print(
                    f"the run is complete: trainer.max_steps={trainer.max_steps}", file=sys.stderr
                )
    if starts_over:
        delete_run(folder)  # only now: whatever was wrong would have been found by here
    write_records(
        folder,
        record,
        arguments.words,
        processes=trainer.world_size,
        parameters={"total": sum(parameter.numel() for parameter in module.parameters())},
        data={"content": [source.record.content for source in data.sources]},
    )
    try:
        with recorded_end(folder, trainer), named_faults(trainer):
            # It has been looked at above; what other callbacks keep in it may be any object.
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    finally:
        data.teardown("fit")  # Lightning leaves it out where an exception ends the run


def _begin_anew(experiment: Experiment, weights: Path, trainer: "pl.Trainer") -> None:
    """Make the run folder one whose run begins, at step 0, with the weights of a file."""
    from mhc_lightning.files.atomic import point_link

    values = experiment.values()
    folder, weights = Path(values["output_dir"]), weights.resolve()
    if weights.parent == (folder / CHECKPOINTS).resolve():
        for logger in trainer.loggers:
            if hasattr(logger, "resume_from"):
                logger.resume_from(0)
        if is_first_process():
            point_link(weights.parent / LAST, weights.name)
    if is_first_process():
        print(f"starting at step 0 with the weights of {weights}", file=sys.stderr)
