"""Callbacks for any LightningModule: instruments, speed, memory, progress, and an alarm."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Loaded at first use: callbacks need Lightning, which takes seconds, and gains do not.
_HOMES = {
    "AmaxGain": "amax_gain",
    "MemoryReading": "watching.memory_readings",
    "MemoryUse": "memory_use",
    "Observation": "watching.observations",
    "Peak": "amax_gain",
    "PeakMemory": "peak_memory",
    "ProgressBar": "progress_bar",
    "RunSummary": "run_summary",
    "StabilityAlarm": "alarm",
    "StabilityDashboard": "stability_dashboard",
    "StreamDiversity": "stream_diversity",
    "StreamMatrixHeatmap": "stream_matrix_heatmap",
    "StreamSampler": "stream_sampler",
    "Throughput": "throughput",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
