"""A run whose memory of n-grams lies in one place or another: bytes, and the time of a step."""

from dataclasses import dataclass, replace
from typing import Any

from mhc_lightning.modules import Transformer
from mhc_lightning.planning.data_parallel import PLACEMENTS
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.memory import DeviceMemory
from mhc_lightning.planning.planned_run import PlannedRun, run_forecast, run_memory
from mhc_lightning.planning.roofline import StepTime, step_time
from mhc_lightning.planning.row_memory import RowMemory, row_memory
from mhc_lightning.planning.row_traffic import RowTraffic, row_traffic


@dataclass(frozen=True)
class PlacedRows:
    """The prediction for one placement.

    Attributes:
        memory: Bytes of the fullest device.
        rows: The tables' part in them, and in the memory of the host.
        traffic: Bytes per token that go over the network and over PCIe.
        step_seconds: Seconds of an optimizer step.
        fits: Whether device and host have the memory.
    """

    memory: DeviceMemory
    rows: RowMemory
    traffic: RowTraffic
    step_seconds: StepTime
    fits: bool

    def seconds(self, *, hidden: bool) -> float:
        """Seconds of a step whose rows move while the device computes, or while it waits."""
        return replace(self.step_seconds, rows_hidden=hidden).total

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = self.rows
        return {
            "fits": self.fits,
            "memory_bytes_per_device": {
                "weights": rows.weights,
                "gradients": rows.gradients,
                "optimizer": rows.optimizer,
                "fetched": rows.fetched,
            },
            "total_bytes_per_device": self.memory.total,
            "host_bytes_per_machine": rows.host,
            "pcie_bytes_per_token": self.traffic.pcie,
            "network_bytes_per_token": self.traffic.network,
            "row_seconds": self.step_seconds.rows,
            "rows_hidden": self.step_seconds.rows_hidden,
            "step_seconds": {
                "hidden": self.seconds(hidden=True),
                "not_hidden": self.seconds(hidden=False),
            },
        }


def placements_of(model: Transformer, run: PlannedRun, machine: Machine) -> dict[str, PlacedRows]:
    """The run with tables in each place that differs from the others."""
    found = {}
    batch, passes = run.micro_batch(machine), run.micro_batches
    for name in PLACEMENTS:
        placed = replace(run, rows=replace(run.rows, placement=name))
        sharing = placed.sharing
        if sharing.placement in found:
            continue
        whole = row_memory(model, batch, sharing)
        if run.pipeline is None:
            memory, rows = run_memory(model, placed, machine), whole
            seconds = step_time(model, batch, sharing, memory, machine, passes)
        else:
            pipeline = run_forecast(model, placed, machine)
            memory, rows = pipeline.fullest.memory, pipeline.fullest.rows
            seconds = pipeline.step_seconds
        found[sharing.placement] = PlacedRows(
            memory,
            rows._replace(host=whole.host),
            row_traffic(model, run.precision, sharing, machine),
            seconds,
            fits=machine.holds(memory.total, whole.host),
        )
    return found
