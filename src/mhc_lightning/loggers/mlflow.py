"""MLflow's logger, with pictures and a store in a folder."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mhc_lightning.errors import UserError


class MLflow(MLFlowLogger):
    """Lightning's `MLFlowLogger` with pictures, to a server or to a folder.

    The package `mlflow-skinny` is enough. For a folder (`file:…`), which later versions of MLflow
    open on request only, this sets `MLFLOW_ALLOW_FILE_STORE`. There a tag is a path, and none may
    go on below another one: slashes behind the first become dots.

    Args:
        tracking_uri: The server's address, or `file:FOLDER`.
        experiment_name: The experiment that the run belongs to.
        settings: Further arguments of `MLFlowLogger`.

    Raises:
        UserError: MLflow is not installed.
    """

    def __init__(self, tracking_uri: str, experiment_name: str, **settings: Any) -> None:
        self._in_folder = tracking_uri.startswith("file:")
        if self._in_folder:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            super().__init__(experiment_name, tracking_uri=tracking_uri, **settings)
        except ModuleNotFoundError as error:
            raise UserError(
                'logging to MLflow needs its package; pip install "mhc-lightning[mlflow]"'
            ) from error

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars at a step."""
        names = {tag: _below_one_folder(tag) if self._in_folder else tag for tag in metrics}
        super().log_metrics({names[tag]: value for tag, value in metrics.items()}, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[np.ndarray], step: int | None = None) -> None:
        """Log uint8 images [height, width, 3] at a step."""
        for image in images:
            self.experiment.log_image(self.run_id, image, key=key, step=step)


def _below_one_folder(tag: str) -> str:
    group, slash, rest = tag.partition("/")
    return f"{group}{slash}{rest.replace('/', '.')}"
