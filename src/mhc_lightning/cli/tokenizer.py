"""The tokenizer of a checkpoint, and the refusal of any other one."""

from typing import Any

from mhc_lightning.cli.composition import Experiment
from mhc_lightning.data.tokenizers import Tokenizer, load_tokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.interchange.exported_model import is_exported, open_exported


def tokenizer_of(
    experiment: Experiment, checkpoint: dict[str, Any], path: Any, vocab_size: int
) -> Tokenizer:
    """The tokenizer for a checkpoint.

    It is the tokenizer that `data.tokenizer` names; else that of the exported model, if the
    checkpoint is one; else that of the data at `data.path`.

    Args:
        experiment: The experiment.
        checkpoint: The loaded checkpoint.
        path: The file or folder of the checkpoint.
        vocab_size: Number of ids of the model.

    Raises:
        UserError: The checkpoint was trained with another tokenizer, or the tokenizer has more ids
            than the model.
    """
    values = experiment.values()
    configured = values["data"]["tokenizer"]
    if configured is not None:
        tokenizer = load_tokenizer(configured, values["prepare"]["end_of_document"])
    elif is_exported(path):
        tokenizer = open_exported(path).tokenizer()
    else:
        from mhc_lightning.cli.components import build_data

        tokenizer = build_data(experiment, world_size=1).tokenizer
    check_tokenizer(tokenizer, checkpoint, path, vocab_size)
    return tokenizer


def check_tokenizer(
    tokenizer: Tokenizer, checkpoint: dict[str, Any], path: Any, vocab_size: int
) -> None:
    """Check that a checkpoint was trained with a tokenizer.

    Raises:
        UserError: It was trained with another one, or the tokenizer has more ids than the model.
    """
    recorded = checkpoint.get("tokenizer")
    if recorded is None:
        recorded = checkpoint.get("TextDataModule", {}).get("data", {}).get("tokenizer")
    if recorded is not None and recorded != tokenizer.fingerprint:
        raise UserError(
            f"tokenizer mismatch: {path} was trained with the tokenizer {recorded}, and"
            f" {tokenizer.name!r} is {tokenizer.fingerprint}; name the right one with"
            " data.tokenizer=…, or data prepared with it with data.path=…"
        )
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer mismatch: {tokenizer.name!r} has {tokenizer.vocab_size} ids but"
            f" model.vocab_size={vocab_size}"
        )
