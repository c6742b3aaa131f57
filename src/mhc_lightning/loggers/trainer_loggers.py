"""Numbers, images and hyper-parameters to all loggers of a trainer."""

from collections.abc import Iterable, Mapping
from typing import TypeGuard

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from mhc_lightning.loggers.hyper_parameters import declare
from mhc_lightning.loggers.tensorboard import TensorBoard


def log_scalars(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    values: Mapping[str, float],
    step: int,
    monitored: Iterable[str] = (),
) -> None:
    """Log scalars to every logger at `step`; must be called inside a callback hook.

    The loggers get the step explicitly: for modules that log no `step` of their own, Lightning
    counts batches that stepped, from 0. Loggers write on rank zero only. So these are rank zero's
    numbers, and no rank waits for another.

    Args:
        trainer: The running trainer.
        pl_module: The module being trained.
        values: Numbers by tag.
        step: Optimizer steps completed, first 1.
        monitored: The tags of `values` that also become `trainer.callback_metrics`, for
            checkpoints and early stopping to monitor.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
    chosen = {tag: values[tag] for tag in monitored}
    if chosen:
        pl_module.log_dict(chosen, logger=False, on_step=True, on_epoch=False)


def log_image(trainer: pl.Trainer, tag: str, image: np.ndarray, step: int) -> None:
    """Log one uint8 image [height, width, 3] to every logger that takes images.

    These are TensorBoard's logger and any logger with a `log_image(key, images, step)` method.
    """
    for logger in trainer.loggers:
        if is_tensorboard(logger):
            logger.experiment.add_image(tag, image, step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[image], step=step)


def takes_images(trainer: pl.Trainer) -> bool:
    """True on rank zero with a logger that takes images: only then is drawing worth the time."""
    return trainer.is_global_zero and any(
        is_tensorboard(logger) or hasattr(logger, "log_image") for logger in trainer.loggers
    )


def declare_hyper_parameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Show a run's hyper-parameters beside its losses in Lightning's TensorBoard loggers.

    It has to be called in `setup`: TensorBoard takes the first record of a run, and the one that
    Lightning writes later names `hp_metric`, which is -1. This package's logger needs no help.
    """
    if not trainer.is_global_zero:
        return
    data = getattr(trainer, "datamodule", None)
    values = {**pl_module.hparams_initial, **(data.hparams_initial if data is not None else {})}
    for logger in trainer.loggers:
        if is_tensorboard(logger) and not isinstance(logger, TensorBoard):
            declare(logger.experiment, values)


def is_tensorboard(logger: Logger) -> TypeGuard[TensorBoardLogger]:
    """True for Lightning's TensorBoard logger, that of the namespace `pytorch_lightning` too."""
    return any(kind.__name__ == "TensorBoardLogger" for kind in type(logger).__mro__)
