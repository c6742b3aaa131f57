"""Routed experts spread over devices: what each holds, and the bytes and time of the all-to-alls.

Experts are shared out among `size` neighbours of a data-parallel group, and sharded (FSDP) over the
`devices / size` devices that are left. For every layer of experts a token's vector goes to each of
its experts (dispatch) and back (combine); backward sends the gradients the other way, as many.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules import MixtureOfExperts, Transformer
from mhc_lightning.planning.activations import MicroBatch
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.tables import dense_values

if TYPE_CHECKING:
    from mhc_lightning.planning.data_parallel import DataParallel

KEY = "strategy.expert_parallel_size"


@dataclass(frozen=True)
class ExpertParallel:
    """How routed experts are spread, and what is assumed of their tokens.

    Attributes:
        size: Devices that share the experts of a layer; 1 if each device has them all.
        imbalance: Rows of the busiest device over those of the mean device. The others wait for it.
            Where each device has all experts, routing makes none busier.
        nodes_per_token: Nodes to which a token goes at most, each once, from where NVLink takes it
            on (arXiv 2412.19437, section 3.2.2); None sends each copy on its own.
        dispatch_bytes: Bytes of a value on the way to an expert; None for those of an activation.
            (DeepSeek-V3 dispatches float8 and combines bfloat16.)

    Raises:
        UserError: `size` or `imbalance` is out of range.
    """

    size: int = 1
    imbalance: float = 1.2
    nodes_per_token: int | None = None
    dispatch_bytes: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise UserError(f"{KEY} must be a whole number from 1 on, not {self.size!r}")
        if not 1 <= self.imbalance < math.inf:
            raise UserError(f"routing_imbalance={self.imbalance} must be 1, even routing, or more")

    @property
    def busiest(self) -> float:
        """`imbalance` if experts are spread; else 1."""
        return self.imbalance if self.size > 1 else 1.0

    def check(self, model: nn.Module, devices: int) -> None:
        """Refuse a size that shares out neither devices nor experts evenly.

        Args:
            model: The network.
            devices: Devices of the data-parallel group.

        Raises:
            UserError: The size does not fit; says which would.
        """
        layers = experts_of(model)
        if self.size == 1:
            return
        if not layers:
            raise UserError(f"{KEY}={self.size}: the model has no experts to spread; use 1")
        fitting = [
            n
            for n in range(1, devices + 1)
            if devices % n == 0 and all(layer.num_experts % n == 0 for layer in layers)
        ]
        if self.size not in fitting:
            raise UserError(
                f"{KEY}={self.size} must divide the {devices} data-parallel devices and the"
                f" {layers[0].num_experts} experts of a layer; use one of"
                f" {', '.join(map(str, fitting))}"
            )


class LinkBytes(NamedTuple):
    """Bytes that a device sends over each kind of link.

    Attributes:
        node: To devices of its node.
        network: To other nodes.
    """

    node: float
    network: float


class Exchange(NamedTuple):
    """The all-to-alls of one pass of a micro-batch, forward or backward.

    Attributes:
        layers: Layers of experts.
        dispatch: Seconds in which tokens go to their experts, over all layers.
        combine: Seconds in which results come back, over all layers.
        bytes: Bytes that a mean device sends in both, over all layers.
    """

    layers: int
    dispatch: float
    combine: float
    bytes: LinkBytes

    @property
    def seconds(self) -> float:
        """Seconds of both."""
        return self.dispatch + self.combine


def experts_of(part: nn.Module) -> list[MixtureOfExperts]:
    """The layers of experts in a network, or in a part of one."""
    return [module for module in part.modules() if isinstance(module, MixtureOfExperts)]


def routed_values(part: nn.Module) -> int:
    """Number of parameters of routed experts."""
    return sum(layer.gate_up.numel() + layer.down.numel() for layer in experts_of(part))


def routed_flops(part: nn.Module) -> float:
    """FLOPs of routed experts for one token, forward and backward."""
    return sum(
        6 * (layer.gate_up.numel() + layer.down.numel()) * layer.num_active_experts
        / layer.num_experts
        for layer in experts_of(part)
    )  # fmt: skip


def added_flops(part: nn.Module, experts: ExpertParallel) -> float:
    """FLOPs by which the busiest device's work exceeds the mean, for one token."""
    return (experts.busiest - 1) * routed_flops(part)


def values_on_device(part: nn.Module, experts: ExpertParallel) -> int:
    """Parameters, without those of tables, that a device computes with: FSDP gathers no others."""
    routed = routed_values(part)
    return dense_values(part) - routed + -(-routed // experts.size)


def on_the_busiest(
    saved: dict[str, int], part: nn.Module, experts: ExpertParallel
) -> dict[str, int]:
    """What the busiest device keeps for backward, by kind.

    Args:
        saved: The result of `saved_for_backward` for the part; the share of routed experts in what
            is kept of experts is taken to be that of their width.
        part: The network, or a part of one.
        experts: How experts are spread.
    """
    layers = experts_of(part)
    if not layers or experts.size == 1:
        return saved
    active = layers[0].num_active_experts * layers[0].down.shape[1]
    shared = 0 if layers[0].shared is None else layers[0].shared.down.in_features
    more = (experts.busiest - 1) * active / (active + shared)
    return saved | {"experts": int(saved["experts"] * (1 + more))}


def exchange_buffers(part: nn.Module, batch: MicroBatch, experts: ExpertParallel) -> int:
    """Bytes of the rows that a layer's all-to-all sends and receives; 0 without spreading."""
    layers = experts_of(part)
    if not layers or experts.size == 1:
        return 0
    rows = layers[0].num_active_experts * batch.tokens * layers[0].down.shape[2]
    return int((1 + experts.busiest) * rows * batch.precision.activation)


def exchange(
    part: Transformer, batch: MicroBatch, replicas: "DataParallel", machine: Machine
) -> Exchange:
    """The all-to-alls of a micro-batch's forward pass; backward has as many.

    Args:
        part: The network, or the part that one device holds; it may be on the meta device.
        batch: A micro-batch.
        replicas: The devices among which experts are spread.
        machine: Devices and their links.
    """
    experts = replicas.experts
    layers = experts_of(part)
    if experts.size == 1 or not layers:
        return Exchange(0, 0.0, 0.0, LinkBytes(0.0, 0.0))
    totals = [0.0, 0.0, 0.0, 0.0]
    value = batch.precision.activation
    for layer in layers:
        width = layer.down.shape[2]
        for turn, size in enumerate((experts.dispatch_bytes or value, value)):
            vectors, active = batch.tokens * width * size, layer.num_active_experts
            sent = sent_bytes(vectors, active, experts, machine)
            totals[turn] += all_to_all_seconds(sent, experts, machine)
            totals[2] += sent.node
            totals[3] += sent.network
    return Exchange(len(layers), totals[0], totals[1], LinkBytes(*totals[2:]))


def sent_bytes(vectors: float, active: int, experts: ExpertParallel, machine: Machine) -> LinkBytes:
    """Bytes that a mean device sends in one all-to-all, if every expert is as likely as any other.

    Args:
        vectors: Bytes of one vector for each token.
        active: Experts per token.
        experts: How experts are spread.
        machine: Devices and their nodes.
    """
    inside = min(experts.size, machine.kind.per_node)
    nodes = -(-experts.size // inside)
    if experts.nodes_per_token is None or nodes == 1:
        copies = vectors * active / experts.size
        return LinkBytes(copies * (inside - 1), copies * (experts.size - inside))
    visited = min(experts.nodes_per_token, nodes, active)
    # Every copy takes NVLink within the node that it has come to, unless it is there already.
    return LinkBytes(
        vectors * active * (inside - 1) / inside, vectors * visited * (nodes - 1) / nodes
    )


def all_to_all_seconds(sent: LinkBytes, experts: ExpertParallel, machine: Machine) -> float:
    """Seconds of one all-to-all, until the busiest device has what it needs.

    Each message costs a link's latency, and the bytes its bandwidth: small messages are slow. Both
    links work at the same time.

    Args:
        sent: Bytes of a mean device.
        experts: How experts are spread.
        machine: Devices and their links.
    """
    kind = machine.kind
    inside = min(experts.size, kind.per_node)
    # With a limit, a device talks to its like of every node, and to its own node.
    outside = experts.size - inside
    if experts.nodes_per_token is not None:
        outside = -(-experts.size // inside) - 1

    def over(size: float, messages: int, bandwidth: float, latency: float) -> float:
        return messages * latency + experts.busiest * size / (bandwidth * kind.link_share)

    return max(
        over(sent.node, inside - 1, kind.link, kind.link_latency),
        over(sent.network, outside, kind.network, kind.network_latency),
    )
