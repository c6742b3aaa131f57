"""The loader of held-out sequences, for validation, test and prediction."""

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mhc_lightning.data.batch_loader import BatchLoader
from mhc_lightning.data.validation_sequences import ValidationSequences, validation_batches
from mhc_lightning.errors import UserError


def held_out_loader(
    trainer: L.Trainer,
    sequences: ValidationSequences,
    micro_batch_size: int,
    share: tuple[int, int],
    *,
    limited_by: str,
    folders: str,
    remedy: str,
) -> BatchLoader | list[Any]:
    """The held-out batches of a rank; an empty list if nothing was held out.

    Args:
        trainer: The trainer that runs over them.
        sequences: The held-out sequences.
        micro_batch_size: Sequences per batch.
        share: Data-parallel rank, and the number of data-parallel ranks.
        limited_by: The trainer's setting that limits the number of batches.
        folders: The data's folders, for messages.
        remedy: How text would come to be held out, for messages.

    Raises:
        UserError: Nothing else is run, and no text was held out.
    """
    batches = validation_batches(len(sequences), micro_batch_size, *share)
    if not batches:
        message = f"{folders} has no held-out text to validate on; {remedy}"
        if trainer.state.fn != TrainerFn.FITTING:
            raise UserError(message)
        rank_zero_warn(f"no validation: {message}")
        return []
    limit = getattr(trainer, limited_by, 1.0)
    if limit not in (0, 1.0) or (limit == 1 and isinstance(limit, int) and len(batches) > 1):
        rank_zero_warn(
            f"trainer.{limited_by}={limit} counts batches of a device, so that the result"
            " depends on data.micro_batch_size and the devices; data.validation_sequences=N"
            " takes the same N sequences under every layout"
        )
    pin = trainer.strategy.root_device.type == "cuda"
    return BatchLoader(sequences, batches, len(batches), pin_memory=pin)
