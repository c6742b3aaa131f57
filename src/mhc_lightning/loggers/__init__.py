"""The loggers of a run: `metrics.csv`, TensorBoard, and on request W&B and MLflow.

Resuming leaves each step once in `metrics.csv` and TensorBoard's files.
"""

from mhc_lightning.loggers.metrics_csv import MetricsCSV
from mhc_lightning.loggers.mlflow import MLflow
from mhc_lightning.loggers.tensorboard import TensorBoard
from mhc_lightning.loggers.wandb import WandB

__all__ = ["MLflow", "MetricsCSV", "TensorBoard", "WandB"]
