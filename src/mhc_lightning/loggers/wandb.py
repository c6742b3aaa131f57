"""Weights & Biases' logger, with one line if its package is missing."""

from typing import Any

from lightning.pytorch.loggers import WandbLogger

from mhc_lightning.errors import UserError


class WandB(WandbLogger):
    """Lightning's `WandbLogger`.

    Args:
        settings: Arguments of `WandbLogger`.

    Raises:
        UserError: The package `wandb` is not installed.
    """

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ModuleNotFoundError as error:
            raise UserError(
                'logging to Weights & Biases needs its package; pip install "mhc-lightning[wandb]"'
            ) from error
