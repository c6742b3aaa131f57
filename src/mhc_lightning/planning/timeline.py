"""The spans of time in which the devices of a pipeline are busy, and what they add up to."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from mhc_lightning.planning.schedule_order import Action


class Lane(StrEnum):
    """A part of a device that works independently of the other parts."""

    COMPUTE = "compute"
    COMMUNICATION = "communication"
    PRIORITY = "priority"


class Activity(StrEnum):
    """The activity of a device in a span of time."""

    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_INPUT = "backward_input"
    BACKWARD_WEIGHT = "backward_weight"
    REPLAY = "replay"
    SEND = "send"
    EXCHANGE = "exchange"
    MERGE = "merge"


class Span(NamedTuple):
    """A span of time in which a device is busy.

    Attributes:
        device: Number of the device, from 0.
        lane: The part of the device that is busy.
        work: The activity.
        action: The action; for a transfer, the action whose result is sent.
        start: Beginning, in seconds after the first action begins.
        end: End, in seconds after the first action begins.
    """

    device: int
    lane: Lane
    work: Activity
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One pass of a schedule.

    Attributes:
        spans: All spans, in no particular order.
        devices: Number of devices.
        overlapped: True if transfers run beside computing.
        exposed: Seconds for which each device waits for its own all-to-alls.
    """

    spans: tuple[Span, ...]
    devices: int
    overlapped: bool
    exposed: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Seconds from the first action to the end of the last."""
        return max(span.end for span in self.spans)

    def busy(self, device: int) -> float:
        """Seconds that a device computes, rebuilding included."""
        return sum(
            span.end - span.start
            for span in self.spans
            if span.device == device and span.lane is Lane.COMPUTE
        )

    def sending(self, device: int) -> float:
        """Seconds for which transfers keep a device from computing: none if they are overlapped."""
        if self.overlapped:
            return 0.0
        return sum(
            span.end - span.start
            for span in self.spans
            if span.device == device and span.work is Activity.SEND
        )

    @property
    def bubble(self) -> float:
        """Share of all devices' time in which they neither compute nor wait for own transfers."""
        used = sum(self.busy(d) + self.sending(d) + self.exposed[d] for d in range(self.devices))
        return 1 - used / (self.devices * self.seconds)
