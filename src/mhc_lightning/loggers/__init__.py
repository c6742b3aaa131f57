"""The loggers of a run, `metrics.csv` and TensorBoard; after resuming, each step is there once."""

from mhc_lightning.loggers.metrics_csv import MetricsCSV
from mhc_lightning.loggers.tensorboard import TensorBoard

__all__ = ["MetricsCSV", "TensorBoard"]
