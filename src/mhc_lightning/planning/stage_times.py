"""The times of a pipeline's stages: the roofline of a step, divided into passes.

Matrix products take an equal share of forward, gradients of inputs and gradients of weights; the
products of attention have no weights. The head takes its gradients in its forward pass. Kept
activations are written forward, and read half for either kind of gradient. Stream operations move
bytes forward and for gradients of inputs. As in the step's roofline, bytes are moved after
arithmetic, and launches, waiting and imbalance cost nothing.
"""

from mhc_lightning.modules import ResidualConnection, Transformer
from mhc_lightning.planning.activations import MicroBatch, saved_for_backward
from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.expert_parallel import (
    added_flops,
    exchange,
    on_the_busiest,
    routed_flops,
    routed_values,
    values_on_device,
)
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.memory import copies_weights
from mhc_lightning.planning.pipeline_memory import boundary_bytes
from mhc_lightning.planning.recompute import replayed_bytes
from mhc_lightning.planning.roofline import ring_link
from mhc_lightning.planning.row_traffic import row_traffic
from mhc_lightning.planning.simulation import StageTimes
from mhc_lightning.planning.stage_part import has_embedding, has_head, part_of
from mhc_lightning.planning.stages import StagePlan
from mhc_lightning.planning.sub_layers import sub_layers
from mhc_lightning.planning.tables import dense_values
from mhc_lightning.planning.traffic import stream_traffic


def stage_times(
    model: Transformer,
    plan: StagePlan,
    batch: MicroBatch,
    replicas: DataParallel,
    machine: Machine,
) -> list[StageTimes]:
    """Predict the times of each stage.

    Args:
        model: The whole model; it may be on the meta device.
        plan: The stages.
        batch: A micro-batch.
        replicas: The pipelines that share the stages' state.
        machine: The devices.
    """
    splits = plan.kind.splits_backward
    parts = (part_of(model, blocks) for blocks in plan.blocks)
    return [times_of_part(part, batch, replicas, machine, splits=splits) for part in parts]


def transfer_times(
    model: Transformer,
    plan: StagePlan,
    batch: MicroBatch,
    replicas: DataParallel,
    machine: Machine,
) -> list[float]:
    """Seconds to send a micro-batch's streams from each stage but the last.

    Args:
        model: The whole model; it may be on the meta device.
        plan: The stages.
        batch: A micro-batch.
        replicas: The pipelines.
        machine: Devices and their links; the slowest of the pipelines counts.
    """
    kind, size = machine.kind, boundary_bytes(model, batch)

    def node(device: int, pipeline: int) -> int:
        return replicas.rank(pipeline, device) // kind.per_node

    seconds = []
    for stage in range(len(plan.blocks) - 1):
        a, b = plan.device_of(stage), plan.device_of(stage + 1)
        near = all(node(a, other) == node(b, other) for other in range(replicas.devices))
        link = kind.link if near else min(kind.link, kind.network)
        seconds.append(size / (link * kind.link_share))
    return seconds


def row_times(
    model: Transformer,
    plan: StagePlan,
    batch: MicroBatch,
    replicas: DataParallel,
    machine: Machine,
) -> list[float]:
    """Seconds in which the rows of a memory's tables move for a micro-batch, in each stage.

    Args:
        model: The whole model; it may be on the meta device.
        plan: The stages.
        batch: A micro-batch.
        replicas: The pipelines that share the stages' state, and where the rows are.
        machine: The devices.
    """
    parts = (part_of(model, blocks) for blocks in plan.blocks)
    moved = (row_traffic(part, batch.precision, replicas, machine) for part in parts)
    return [each.seconds(batch.tokens, ring_link(machine, replicas), machine) for each in moved]


def times_of_part(
    part: Transformer,
    batch: MicroBatch,
    replicas: DataParallel,
    machine: Machine,
    *,
    splits: bool,
) -> StageTimes:
    """Predict the times of one stage.

    Args:
        part: The part of the model that the stage holds.
        batch: A micro-batch.
        replicas: The pipelines that share the stages' state.
        machine: The devices.
        splits: Whether gradients of inputs and of weights are computed at different times.
    """
    kind, value, tokens = machine.kind, batch.precision.activation, batch.tokens
    peak = (kind.low_flops if value < 4 else kind.full_flops) * kind.flops_share
    bandwidth = kind.bandwidth * kind.bandwidth_share

    more = added_flops(part, replicas.experts) * tokens
    without_attention = part.flops_per_token(0) * tokens + more
    attention = part.flops_per_token(batch.length) * tokens + more - without_attention
    head_parameters = part.output.weight.numel() if has_head(part) else 0
    head = 6 * head_parameters * tokens
    products = (without_attention - head) / 3

    saved = saved_for_backward(part, batch, copies_weights(batch, replicas))
    saved = on_the_busiest(saved, part, replicas.experts)
    kept = sum(saved.values()) - saved["connections"] - saved["weight_copies"]
    weights = (values_on_device(part, replicas.experts) - head_parameters) * value
    rows = row_traffic(part, batch.precision, replicas, machine).device * tokens
    streams = stream_traffic(part, batch.precision)
    streams_back = streams.training_fused - streams.forward_fused
    merge, merge_back = _feed_forward_merges(part, batch)

    def seconds(flops: float, moved: float) -> float:
        return flops / peak + moved / bandwidth

    forward = seconds(
        products + head + attention / 3,
        kept + weights + 3 * head_parameters * value + streams.forward_fused * tokens + rows / 3,
    )
    to_input = seconds(products + attention * 2 / 3, kept / 2 + weights + streams_back * tokens)
    to_weight = seconds(products, kept / 2 + weights + rows * 2 / 3)
    # Tokens have no gradient: torch runs this stage's whole backward pass in the second half.
    first = splits and has_embedding(part)
    sent = exchange(part, batch, replicas, machine)
    return StageTimes(
        forward=forward,
        backward=to_input + to_weight,
        backward_weight=to_input + to_weight if first else to_weight,
        replay=replayed_bytes(part, batch) / bandwidth,
        merge_forward=merge / bandwidth,
        merge_backward=merge_back / bandwidth,
        dispatch=sent.dispatch,
        combine=sent.combine,
        expert_layers=max(1, sent.layers),
        feed_forward=_feed_forward_flops(part, replicas) * tokens / (without_attention + attention),
    )


def _feed_forward_flops(part: Transformer, replicas: DataParallel) -> float:
    """FLOPs of feed-forward sub-layers for one token, forward and backward."""
    bodies = [each.body for each in sub_layers(part)[1::2]]
    others = sum(dense_values(body) - routed_values(body) for body in bodies)
    return 6 * others + replicas.experts.busiest * sum(map(routed_flops, bodies))


def _feed_forward_merges(part: Transformer, batch: MicroBatch) -> tuple[int, int]:
    """Bytes that merging the outputs of feed-forward sub-layers moves, forward and backward."""
    forward = backward = 0
    for connection, _ in sub_layers(part)[1::2]:
        if not isinstance(connection, ResidualConnection):
            vector = connection.dim * batch.precision.activation * batch.tokens
            # Reads n streams and an output, writes n; backward, as `stream_traffic` counts.
            forward += (2 * connection.num_streams + 1) * vector
            backward += (3 * connection.num_streams + 2) * vector
    return forward, backward
