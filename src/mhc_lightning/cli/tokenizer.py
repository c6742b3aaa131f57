"""The tokenizer that a checkpoint's tokens are of."""

from typing import Any

from mhc_lightning.cli.composition import Experiment
from mhc_lightning.data.tokenizers import Tokenizer, load_tokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.interchange.exported_model import is_exported, open_exported


def tokenizer_of(
    experiment: Experiment, checkpoint: dict[str, Any], path: Any, vocab_size: int
) -> Tokenizer:
    """The tokenizer to use a checkpoint with.

    It is the one in the exported folder, if the checkpoint is one; else what `data.tokenizer`
    names; else that of the data at `data.path`.

    Args:
        experiment: The experiment.
        checkpoint: What was loaded.
        path: Where it was loaded from.
        vocab_size: Ids that the model has.

    Raises:
        UserError: it is not the tokenizer that the checkpoint was trained with, or has more ids
            than the model.
    """
    values = experiment.values()
    told = values["data"]["tokenizer"]
    if told is not None:
        tokenizer = load_tokenizer(told, values["prepare"]["end_of_document"])
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
    """Make sure that a tokenizer is the one that a checkpoint was trained with.

    Raises:
        UserError: it is another one, or has more ids than the model.
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
