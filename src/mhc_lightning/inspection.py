"""Measures of a network: gains, sums and matrices of its mappings, by sub-layer; gates of n-grams.

Shapes: S sequence, n streams, N tokens of the longest n-gram of a memory.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mhc_lightning.callbacks.doubly_stochastic import sum_residuals
from mhc_lightning.callbacks.gains import GAIN_TAGS, amax_gains, chains, mean_products
from mhc_lightning.callbacks.watching.stream_watcher import StreamWatcher
from mhc_lightning.kernels import StreamMappings
from mhc_lightning.modules import Connection, Transformer
from mhc_lightning.modules.memory import BlockMemory


class SublayerMappings(NamedTuple):
    """The mappings of one sub-layer: pre and post [..., n], residual [..., n, n]."""

    name: str
    mappings: StreamMappings


@dataclass(frozen=True)
class Inspection:
    """Numbers and matrices of a network's L sub-layers.

    Attributes:
        names: Names of the sub-layers [L].
        gains: Amax gains by tag (`GAIN_TAGS`), each [L], averaged over tokens.
        row_error: The largest `|row sum - 1|` of any token [L].
        column_error: The largest `|column sum - 1|` of any token [L]: for mHC, the error that the
            finitely many Sinkhorn iterations leave.
        diagonal: Mean of the mixing matrix's diagonal [L].
        read: Mean pre mapping of each sub-layer, [n].
        write: Mean post mapping of each sub-layer, [n].
        matrices: Mixing matrix of each sub-layer, averaged over tokens, [n, n].
        composites: For each run of consecutive sub-layers with equal n, the product of their
            matrices (multiplied token by token, then averaged), [n, n].
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
    """Measure the mappings of sub-layers, in the order in which they are applied."""
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
    """The static mappings of a network (of its biases only), one sub-layer after the other.

    They are the mappings of a token whose streams are zero, where the dynamic part vanishes.

    Args:
        network: The network, on any device, `meta` included.
        tensors: Its state dict. Only tensors of connections are read, each once; those of one
            connection are released before the next.
    """
    carry = None
    for name, connection in connections_of(network).items():
        mappings, carry = _static_mappings(connection, name, tensors, carry)
        yield SublayerMappings(name.removesuffix("_connection"), mappings)


@torch.no_grad()
def _static_mappings(
    connection: Connection, name: str, tensors: Mapping[str, Tensor], carry: Tensor | None
) -> tuple[StreamMappings, Tensor | None]:
    """A connection's mappings as observers see them, and its carry."""
    connection = copy.deepcopy(connection)
    values = {key: tensors[f"{name}.{key}"] for key in connection.state_dict()}
    connection.load_state_dict(values, assign=True)
    observed: list[StreamMappings] = []
    connection.window.register_forward_hook(
        lambda _module, _args, mappings: observed.append(mappings)
    )
    streams = torch.zeros(1, connection.num_streams, connection.dim)
    aggregated, state = connection.read(streams, carry)
    _, carry = connection.write(streams, torch.zeros_like(aggregated), state)
    return StreamMappings(*(mapping.clone() for mapping in observed[0])), carry


@torch.no_grad()
def mappings_on(network: Transformer, tokens: Tensor) -> list[SublayerMappings]:
    """The mappings of a network for tokens [B, S], in the order of its sub-layers."""
    watcher = StreamWatcher()
    watcher.open(network)
    try:
        network(tokens)
    finally:
        observations = watcher.close()
    names = [name.removesuffix(".window").removesuffix("_connection") for name, *_ in observations]
    return [SublayerMappings(n, o.mappings) for n, o in zip(names, observations, strict=True)]


class NgramGate(NamedTuple):
    """How far one n-gram of a text opens a gate.

    Attributes:
        tokens: Its tokens where it stands first in the text, at most N.
        positions: The number of positions that it ends at.
        streams: The gate of each stream, the mean over these positions [n].
    """

    tokens: list[int]
    positions: int
    streams: Tensor

    @property
    def gate(self) -> float:
        """The mean over streams."""
        return float(self.streams.mean())


@contextmanager
def seen_gates(network: Transformer) -> Iterator[dict[int, Tensor]]:
    """The gates [B, S, n] of a network's memories by block, filled by its next forward pass."""
    gates: dict[int, Tensor] = {}
    parts = [part for part in network.modules() if isinstance(part, BlockMemory)]
    handles = [
        part.gate_window.register_forward_hook(
            lambda _module, _args, gate, block=part.block: gates.update({block: gate.detach()})
        )
        for part in parts
        if part.gate_window is not None
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def ngram_gates(network: Transformer, tokens: list[int], gates: Tensor) -> list[NgramGate]:
    """The different n-grams of a text, as the hash sees them, the widest open first.

    Positions count as the same n-gram if their last N tokens are of the same classes. Before the
    start of the text, or of a document, there are no tokens.

    Args:
        network: The network, which has a memory.
        tokens: The text [S].
        gates: The gates of one block for it [1, S, n].
    """
    ngram_hash = network.memory.hash
    assert ngram_hash is not None
    suffixes = torch.stack(ngram_hash.look_back(torch.tensor([tokens])), -1)[0]  # [S, N]
    _, which, counts = suffixes.unique(dim=0, return_inverse=True, return_counts=True)
    values = gates[0].to(torch.promote_types(gates.dtype, torch.float32))  # [S, n]
    sums = values.new_zeros(len(counts), values.shape[-1]).index_add_(0, which, values)
    means = sums / counts[:, None]
    first: dict[int, int] = {}
    for position, number in enumerate(which.tolist()):
        first.setdefault(number, position)
    end, before = int(ngram_hash.document_end), ngram_hash.layout.longest - 1
    found = []
    for number, position in first.items():
        start = position
        while start > max(0, position - before) and tokens[start - 1] != end:
            start -= 1
        ngram = tokens[start : position + 1]
        found.append(NgramGate(ngram, int(counts[number]), means[number]))
    return sorted(found, key=lambda ngram: -ngram.gate)
