"""`validate`: loss and perplexity of a checkpoint."""

import contextlib
import json
import math
import sys

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.cli.run_folder import is_first_process
from mhc_lightning.errors import UserError
from mhc_lightning.formatting import json_value


def validate(experiment: Experiment, arguments: Arguments) -> None:
    """Measure `ckpt_path` on the validation data and print the metrics.

    Raises:
        UserError: the settings, the data or the checkpoint cannot be used.
    """
    if experiment.values()["ckpt_path"] is None:
        raise UserError("validate needs ckpt_path=last, ckpt_path=best or a checkpoint")
    with contextlib.redirect_stdout(sys.stderr):
        metrics = measure(experiment)
    if not is_first_process():
        return
    if arguments.json:
        print(json.dumps(json_value(metrics)))
        return
    width = max(map(len, metrics))
    for name, value in metrics.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        print(f"{name:<{width}}  {shown}")


def measure(experiment: Experiment) -> dict[str, float | int | str]:
    """The metrics by name, with the step and the file they belong to."""
    from mhc_lightning.cli.checkpoints import load_fitting, require_checkpoint, trained_steps
    from mhc_lightning.cli.components import (
        build_data,
        build_model_for,
        build_trainer,
        check_layout,
        describe_token_data,
        replicas,
    )
    from mhc_lightning.cli.run_faults import named_faults
    from mhc_lightning.cli.strategy_choice import resolve_strategy
    from mhc_lightning.cli.tokenizer import check_tokenizer
    from mhc_lightning.data.document_mask import keeps_documents_apart

    experiment, _ = resolve_strategy(experiment)
    path = require_checkpoint(experiment)
    trainer = build_trainer(experiment, logger=False, enable_checkpointing=False)
    data = build_data(experiment, replicas(trainer))
    module = build_model_for(experiment, trainer)
    check_layout(trainer, module)
    data.validate_against(module.model.vocab_size, getattr(module.model, "pretrained", None))
    describe_token_data(data)
    checkpoint = load_fitting(path, module, experiment)
    check_tokenizer(data.tokenizer, checkpoint, path, module.model)
    trained_apart = keeps_documents_apart(checkpoint)
    if trained_apart != data.document_mask and is_first_process():
        print(
            f"warning: {path} was trained with data.document_mask={str(trained_apart).lower()}, and"
            " this loss is of the other setting",
            file=sys.stderr,
        )
    module.start_from(checkpoint["state_dict"])
    with named_faults(trainer):
        trainer.validate(module, datamodule=data, verbose=False)
    measured: dict[str, float | int | str] = {}
    for name, value in trainer.callback_metrics.items():
        measured[name] = int(value) if name == "val/tokens" else float(value)
    measured.pop("step", None)
    if not measured:
        raise UserError(
            "nothing was validated: trainer.limit_val_batches=0, or the data have no held-out text"
        )
    bytes_per_token = data.validation_bytes_per_token
    loss = measured.get("val/loss")
    if isinstance(loss, float) and bytes_per_token > 0:
        measured["val/bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return {"step": trained_steps(checkpoint), **measured, "checkpoint": str(path)}
