"""Callbacks for any LightningModule: instruments, speed, memory, progress, and an alarm."""

from mhc_lightning.callbacks.alarm import StabilityAlarm
from mhc_lightning.callbacks.amax_gain import AmaxGain, Peak
from mhc_lightning.callbacks.memory_use import MemoryUse
from mhc_lightning.callbacks.peak_memory import PeakMemory
from mhc_lightning.callbacks.progress_bar import ProgressBar
from mhc_lightning.callbacks.run_summary import RunSummary
from mhc_lightning.callbacks.stability_dashboard import StabilityDashboard
from mhc_lightning.callbacks.stream_diversity import StreamDiversity
from mhc_lightning.callbacks.stream_matrix_heatmap import StreamMatrixHeatmap
from mhc_lightning.callbacks.stream_sampler import StreamSampler
from mhc_lightning.callbacks.throughput import Throughput
from mhc_lightning.callbacks.watching.memory_readings import MemoryReading
from mhc_lightning.callbacks.watching.observations import Observation

__all__ = [
    "AmaxGain",
    "MemoryReading",
    "MemoryUse",
    "Observation",
    "Peak",
    "PeakMemory",
    "ProgressBar",
    "RunSummary",
    "StabilityAlarm",
    "StabilityDashboard",
    "StreamDiversity",
    "StreamMatrixHeatmap",
    "StreamSampler",
    "Throughput",
]
