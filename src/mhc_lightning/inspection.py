"""What the residual mappings of a network are: gains, sums and matrices, by sub-layer."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mhc_lightning.callbacks.gains import GAIN_TAGS, amax_gains, chains, mean_products
from mhc_lightning.callbacks.stream_diversity import sum_residuals
from mhc_lightning.callbacks.watching.stream_watcher import StreamWatcher
from mhc_lightning.kernels import StreamMappings
from mhc_lightning.modules import Connection, Transformer


class SublayerMappings(NamedTuple):
    """The mappings of one sub-layer: pre and post [..., n], residual [..., n, n]."""

    name: str
    mappings: StreamMappings


@dataclass(frozen=True)
class Inspection:
    """Numbers and matrices of a network's sub-layers, L of them.

    Attributes:
        names: Of the sub-layers [L].
        gains: Amax gains by tag (`GAIN_TAGS`), each [L], averaged over tokens.
        row_error: The largest ``|row sum - 1|`` of any token [L].
        column_error: The largest ``|column sum - 1|`` of any token [L]: for mHC, what the finitely
            many Sinkhorn iterations leave.
        diagonal: Mean of the matrix's diagonal [L].
        read: Mean pre mapping of each sub-layer, [n].
        write: Mean post mapping, [n].
        matrices: Residual matrix averaged over tokens, [n, n].
        composites: Over each stretch of sub-layers of one shape, their product (multiplied token by
            token, then averaged), [n, n].
    """

    names: list[str]
    gains: dict[str, list[float]]
    row_error: list[float]
    column_error: list[float]
    diagonal: list[float]
    read: list[Tensor]
    write: list[Tensor]
    matrices: list[Tensor]
    composites: dict[range, Tensor]


def inspect_mappings(layers: Sequence[SublayerMappings]) -> Inspection:
    """Measure mappings, given in the order in which they are applied."""
    residuals = [layer.mappings.residual for layer in layers]
    gains = amax_gains(residuals).tolist()
    errors = torch.stack([sum_residuals(residual) for residual in residuals])
    spans = [range(chain[0], chain[-1] + 1) for chain in chains(residuals)]
    singles = mean_products(residuals, [range(k, k + 1) for k in range(len(layers))])

    def mean(mapping: Tensor) -> Tensor:
        return mapping.reshape(-1, mapping.shape[-1]).mean(0)

    return Inspection(
        names=[layer.name for layer in layers],
        gains=dict(zip(GAIN_TAGS, gains, strict=True)),
        row_error=errors[:, 0].tolist(),
        column_error=errors[:, 1].tolist(),
        diagonal=[float(matrix.diagonal().mean()) for matrix in singles],
        read=[mean(layer.mappings.pre) for layer in layers],
        write=[mean(layer.mappings.post) for layer in layers],
        matrices=singles,
        composites=dict(zip(spans, mean_products(residuals, spans), strict=True)),
    )


def connections_of(network: nn.Module) -> dict[str, Connection]:
    """A network's connections by name, in the order of its sub-layers."""
    named = [(n, m) for n, m in network.named_modules() if isinstance(m, Connection)]
    return dict(sorted(named, key=lambda pair: pair[1].layer_index))


def static_mappings_of(
    network: nn.Module, tensors: Mapping[str, Tensor]
) -> Iterator[SublayerMappings]:
    """The mappings of a network from its biases alone, one sub-layer after the other.

    They are those of a token whose streams are all zero: whatever depends on the token is then
    nothing.

    Args:
        network: On ``meta``, or anywhere.
        tensors: Its state dict; only the tensors of connections are asked for, each once, and
            those of a connection are let go before the next one's.
    """
    carry = None
    for name, connection in connections_of(network).items():
        mappings, carry = _static_mappings(connection, name, tensors, carry)
        yield SublayerMappings(name.removesuffix("_connection"), mappings)


@torch.no_grad()
def _static_mappings(
    connection: Connection, name: str, tensors: Mapping[str, Tensor], carry: Tensor | None
) -> tuple[StreamMappings, Tensor | None]:
    """A connection's mappings as observers see them, and what it hands to the next one."""
    one = copy.deepcopy(connection)
    own = {key: tensors[f"{name}.{key}"] for key in one.state_dict()}
    one.load_state_dict(own, assign=True)
    seen: list[StreamMappings] = []
    one.window.register_forward_hook(lambda _module, _args, mappings: seen.append(mappings))
    streams = torch.zeros(1, one.num_streams, one.dim)
    aggregated, state = one.read(streams, carry)
    _, carry = one.write(streams, torch.zeros_like(aggregated), state)
    return StreamMappings(*(mapping.clone() for mapping in seen[0])), carry


@torch.no_grad()
def mappings_on(network: Transformer, tokens: Tensor) -> list[SublayerMappings]:
    """The mappings of a network at tokens [B, S], in the order of its sub-layers."""
    watcher = StreamWatcher()
    watcher.open(network)
    try:
        network(tokens)
    finally:
        seen = watcher.close()
    names = [name.removesuffix(".window").removesuffix("_connection") for name, *_ in seen]
    return [SublayerMappings(n, o.mappings) for n, o in zip(names, seen, strict=True)]
