"""`fit`: train a model, or resume a run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mhc_lightning.checkpoints.names import LAST
from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.cli.fewer_collections import fewer_collections, set_aside
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

    from mhc_lightning import LanguageModel, TextDataModule


def fit(experiment: Experiment, arguments: Arguments) -> None:
    """Train from the start or from `ckpt_path`, writing everything to `output_dir`.

    Raises:
        UserError: the settings, the data, the folder or the checkpoint cannot be used.
        NonFiniteLossError: the loss became NaN or infinite.
        RunFaultError: a process of the run died, hung, failed or ran out of memory.
        SIGTERMException: stopped by SIGTERM, after saving.
    """
    values, record = experiment.values(), experiment.record()
    folder = Path(values["output_dir"])
    claim(folder, resumes=values["ckpt_path"] is not None, overwrite=values["overwrite"])

    from mhc_lightning.cli.run_faults import named_faults

    trainer, module, data, checkpoint, resumes = _ready(experiment, folder)
    if not resumes:
        delete_run(folder)  # only now: every mistake in the settings has been found before
    write_records(
        folder,
        record,
        arguments.words,
        processes=trainer.world_size,
        parameters={"total": sum(parameter.numel() for parameter in module.parameters())},
        data={
            "content": [source.content for source in data.sources],
            "kind": [source.kind for source in data.sources],
        },
    )
    try:
        with recorded_end(folder, trainer), named_faults(trainer), set_aside():
            # `_restore` has read it safely; what other callbacks keep in it may be any object.
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    finally:
        data.teardown("fit")  # Lightning leaves it out where an exception ends the run


@fewer_collections()
def _ready(
    experiment: Experiment, folder: Path
) -> "tuple[pl.Trainer, LanguageModel, TextDataModule, Path | None, bool]":
    """What `_build` makes, the checkpoint to resume from, and whether it is this folder's run's."""
    experiment = _with_resolved_strategy(experiment)
    checkpoint = _checkpoint(experiment)
    resumes = checkpoint is not None and _is_in(checkpoint, folder)
    if checkpoint is not None and not resumes:
        # Another run's state: this folder's own run, if it holds one, would be lost.
        claim(folder, resumes=False, overwrite=experiment.values()["overwrite"])
    trainer, module, data = _build(experiment)
    if checkpoint is not None:
        checkpoint = _restore(checkpoint, experiment, trainer, module)
    return trainer, module, data, checkpoint, resumes


def _with_resolved_strategy(experiment: Experiment) -> Experiment:
    from mhc_lightning.cli.strategy_choice import resolve_strategy

    experiment, choice = resolve_strategy(experiment)
    if choice is not None and is_first_process():
        print(choice, file=sys.stderr)
    return experiment


def _checkpoint(experiment: Experiment) -> Path | None:
    """The checkpoint to resume from; None to start at step 0."""
    from mhc_lightning.cli.checkpoints import find_checkpoint

    values = experiment.values()
    checkpoint = find_checkpoint(experiment)
    if checkpoint is None and values["ckpt_path"] not in (None, "auto"):
        folder = values["output_dir"]
        print(f"warning: the run in {folder} had not saved yet; starting over", file=sys.stderr)
    return checkpoint


def _is_in(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.parent.resolve() == (folder / CHECKPOINTS).resolve()


def _build(experiment: Experiment) -> "tuple[pl.Trainer, LanguageModel, TextDataModule]":
    """The trainer, the model and the data, checked against each other and the memory there is."""
    from mhc_lightning.checkpoints.saved_memory import memory_in
    from mhc_lightning.cli.components import (
        build_data,
        build_model_for,
        build_trainer,
        check_layout,
        count_optimizer_steps,
        describe_token_data,
        replicas,
    )
    from mhc_lightning.cli.instantiation import build, build_members
    from mhc_lightning.cli.plan import check_room
    from mhc_lightning.data.document_mask import keep_documents_apart
    from mhc_lightning.data.token_classes import bind_tokenizer

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
    data.validate_against(module.model.vocab_size, getattr(module.model, "pretrained", None))
    describe_token_data(data)
    if data.tokenizer is not None:
        bind_tokenizer(memory_in(module.model), data.tokenizer)
    keep_documents_apart(module.model, data.document_boundary)
    return trainer, module, data


def _restore(
    checkpoint: Path, experiment: Experiment, trainer: "pl.Trainer", module: "LanguageModel"
) -> Path | None:
    """Check that a checkpoint fits the model, and load one that holds weights alone.

    Returns:
        The checkpoint, for the trainer to resume from; None if the run begins with its weights.
    """
    from mhc_lightning.cli.checkpoints import adds_memory, holds_weights_alone, load_fitting

    saved = load_fitting(checkpoint, module, experiment, may_add_memory=True)
    if holds_weights_alone(saved):
        if is_first_process() and adds_memory(module, saved):
            print(
                "the memory begins with its initial values: the weights have none", file=sys.stderr
            )
        module.start_from(saved["state_dict"])
        _begin_at_step_0(experiment, checkpoint, trainer)
        return None
    if is_first_process():
        step = saved["global_step"]
        print(f"going on from step {step}: {checkpoint}", file=sys.stderr)
        if step >= trainer.max_steps:
            print(f"the run is complete: trainer.max_steps={trainer.max_steps}", file=sys.stderr)
    return checkpoint


def _begin_at_step_0(experiment: Experiment, weights: Path, trainer: "pl.Trainer") -> None:
    """Make the run folder that of a run which begins at step 0 with the weights of a file."""
    from mhc_lightning.files.atomic import point_link

    values = experiment.values()
    folder, weights = Path(values["output_dir"]), weights.resolve()
    if _is_in(weights, folder):
        for logger in trainer.loggers:
            if hasattr(logger, "resume_from"):
                logger.resume_from(0)
        if is_first_process():
            point_link(weights.parent / LAST, weights.name)
    if is_first_process():
        print(f"starting at step 0 with the weights of {weights}", file=sys.stderr)
