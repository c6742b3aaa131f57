"""The bytes that a device sends in an optimizer step, by what they are for."""

from typing import NamedTuple

from mhc_lightning.modules import Transformer
from mhc_lightning.planning.expert_parallel import LinkBytes, exchange, routed_values
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.pipeline_memory import boundary_bytes
from mhc_lightning.planning.planned_run import PlannedRun
from mhc_lightning.planning.tables import dense_values


class StepTraffic(NamedTuple):
    """Bytes that the mean device sends in an optimizer step.

    Attributes:
        experts: Rows to experts and back, with their gradients, by link.
        sharing: Parameters gathered and gradients reduced, in rings.
        stages: Streams and their gradients, to other stages.
    """

    experts: LinkBytes
    sharing: float
    stages: float


def step_traffic(model: Transformer, run: PlannedRun, machine: Machine) -> StepTraffic:
    """Count the bytes of a step.

    Args:
        model: The model; it may be on the meta device.
        run: The run.
        machine: The devices.
    """
    batch, replicas, passes = run.micro_batch(machine), run.sharing, run.micro_batches
    pipeline, precision = run.pipeline, batch.precision
    parts, size = (1, 1) if pipeline is None else (pipeline.micro_batches, pipeline.plan.devices)
    sent = exchange(model, batch, replicas, machine).bytes
    experts = LinkBytes(*(2 * passes * parts * each / size for each in sent))

    spread, devices = replicas.experts.size, replicas.devices
    routed = routed_values(model) if spread > 1 else 0
    rest = dense_values(model) - routed
    left = devices // spread
    values = rest * (devices - 1) / devices + routed / spread * (left - 1) / left
    if not replicas.sharded:
        moved = 2 * precision.weight
    elif pipeline is None:  # gathered for forward and for backward, and reduced
        moved = passes * (2 * precision.activation + precision.coefficient)
    else:  # gathered and reduced once a pass
        moved = passes * (precision.activation + precision.coefficient)
    crossed = 0
    if pipeline is not None:
        plan = pipeline.plan
        ends = range(len(plan.blocks) - 1)
        crossed = sum(plan.device_of(stage) != plan.device_of(stage + 1) for stage in ends)
    streams = 2 * passes * parts * crossed * boundary_bytes(model, batch) / size
    return StepTraffic(experts, values * moved / size, streams)
