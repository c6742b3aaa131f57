"""Failures of many devices, and the checkpoints against them, from rates that are assumptions."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Failures:
    """How often devices fail, and what a failure costs.

    The rate is that of Llama 3's training: 419 unexpected interruptions in 54 days on 16,384 H100
    (arXiv 2407.21783, section 3.3.4). The others are assumptions.

    Attributes:
        per_device_day: Failures of a run per device and day.
        restart_seconds: From a failure to the first new step: noticing, starting, loading.
        node_storage: Bytes per second that a node writes to storage.
        storage: Bytes per second that the storage takes from all nodes.
    """

    per_device_day: float = 419 / 54 / 16384
    restart_seconds: float = 600.0
    node_storage: float = 5e9
    storage: float = 200e9

    def per_day(self, devices: int) -> float:
        """Expected failures of a run per day."""
        return devices * self.per_device_day

    def checkpoint_seconds(self, size: int, nodes: int) -> float:
        """Seconds to write a checkpoint of `size` bytes from some nodes, while training waits."""
        return size / min(nodes * self.node_storage, self.storage)

    def interval(self, devices: int, checkpoint: float) -> float:
        """Seconds between checkpoints that lose the least time: √(2 · checkpoint · mean time).

        Young (1974). The mean time is that between failures; it must be long against `checkpoint`.
        """
        return math.sqrt(2 * checkpoint * 86400 / self.per_day(devices))

    def restart(self, devices: int, checkpoint: float) -> float:
        """Mean seconds that a failure costs: the restart, and half an interval done again."""
        return self.restart_seconds + self.interval(devices, checkpoint) / 2

    def lost(self, devices: int, checkpoint: float) -> float:
        """Share of time lost to checkpoints, restarts, and steps done again."""
        saving = checkpoint / self.interval(devices, checkpoint)
        return saving + self.per_day(devices) * self.restart(devices, checkpoint) / 86400
