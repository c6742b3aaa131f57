"""The sizes and shares that a data module takes, checked."""

from mhc_lightning.errors import UserError


def check_sizes(
    *,
    batch_size: int,
    micro_batch_size: int | None,
    sequence_length: int,
    shuffle_window: int,
    num_workers: int,
    validation_sequences: int | None,
    validation_fraction: float,
) -> None:
    """Check arguments of `TextDataModule`, each alone.

    Raises:
        UserError: One of them is out of its range.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("micro_batch_size", micro_batch_size, 1),
        ("sequence_length", sequence_length, 1),
        ("shuffle_window", shuffle_window, 1),
        ("num_workers", num_workers, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"data.{name} is {value}; it must be at least {least}")
    if validation_sequences is not None and validation_sequences < 1:
        raise UserError(
            f"data.validation_sequences is {validation_sequences}; it must be at least 1, or"
            " null for all (for no validation: trainer.limit_val_batches=0)"
        )
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f"data.validation_fraction is {validation_fraction}; it must be at least 0 and below 1"
        )
