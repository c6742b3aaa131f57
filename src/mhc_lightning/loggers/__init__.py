"""The loggers of a run, `metrics.csv` and TensorBoard; resuming leaves each step once."""

from mhc_lightning.loggers.metrics_csv import MetricsCSV
from mhc_lightning.loggers.tensorboard import TensorBoard

__all__ = ["MetricsCSV", "TensorBoard"]
