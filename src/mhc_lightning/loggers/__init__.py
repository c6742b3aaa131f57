"""What a run logs, and where: `metrics.csv` and TensorBoard; both resume exactly."""

from mhc_lightning.loggers.metrics_csv import MetricsCSV
from mhc_lightning.loggers.tensorboard import TensorBoard

__all__ = ["MetricsCSV", "TensorBoard"]
