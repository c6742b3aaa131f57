"""The lineage of streams: which sub-layer's output a sub-layer reads, without keeping tensors."""

import math
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from mhc_lightning.kernels import StreamMappings, merge_observers


class _Output(NamedTuple):
    """Streams that a sub-layer has returned.

    While the weak reference lives, no other storage has its address.
    """

    storage: StorageWeakRef
    elements: int
    number: int


class _SubLayer(NamedTuple):
    name: str
    after: int | None
    grad_enabled: bool  # whether gradients were recorded
    in_graph: bool  # whether the residual mapping is in autograd's graph
    elements: int  # of its streams, 0 if they are not known


class Lineage:
    """Links the sub-layers of a step into chains, between `open` and `close`.

    A sub-layer continues the one whose streams it reads: the returned tensor itself, a view of all
    of it or, where gradients are recorded, a tensor from which autograd's graph leads back to it
    without a broadcast in between (a copy on another device or in another dtype, a slice, a norm).
    Streams that are expanded anew, from the output of any network, begin a new chain.

    No tensor is kept alive: storages are held weakly, and the marks on nodes of autograd's graph
    are held by the nodes.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._key = object()  # of the marks on autograd's nodes
        self._sub_layers: dict[int, _SubLayer] = {}  # by number
        self._outputs: dict[int, _Output] = {}  # by the address of their storage
        self._inputs: dict[int, StorageWeakRef] = {}  # by their address
        self._by_residual: dict[int, int] = {}  # numbers, by the id of the residual mapping
        self._output_known: set[int] = set()  # numbers of sub-layers whose merged streams were seen

    def open(self) -> None:
        """Begin, and listen to merges of the kernels."""
        self.close()
        merge_observers.append(self._merge)

    def close(self) -> None:
        """Stop, and forget everything."""
        if self._merge in merge_observers:
            merge_observers.remove(self._merge)
        self._forget()

    def arrive(
        self, number: int, name: str, args: tuple[Any, ...], mappings: StreamMappings
    ) -> int | None:
        """Add a sub-layer that has read its streams.

        Args:
            number: The sub-layer's number, larger than those before.
            name: Name of the module that yielded the record.
            args: That module's arguments.
            mappings: The record, which the caller keeps until `close`.

        Returns:
            The number of the sub-layer whose output this one reads, or None.
        """
        streams = streams_in_arguments(mappings, args)
        tensors = floating_tensors(args[:1]) if streams is None else [streams]
        after = self.find(tensors)
        if after is None:
            after = self._guess(name, streams, mappings)
        self._note_inputs(tensors)
        self._by_residual[id(mappings.residual)] = number
        self._add(number, name, after, [mappings], 0 if streams is None else streams.numel())
        return after

    def leave(self, name: str, output: Any) -> None:
        """Note a module's output, which may be the streams of the last sub-layer inside it."""
        last = next(reversed(self._sub_layers), None)
        if last is None:
            return
        inner = self._sub_layers[last].name
        if name in ("", inner) or inner.startswith(f"{name}."):
            self._note_output(output, last)

    def continue_streams(self, streams: Any, output: Any) -> None:
        """Note that a module between two sub-layers has changed streams, as a memory does."""
        number = self.find(floating_tensors(streams))
        if number is not None:
            self._note_output(output, number)

    def leave_program(self, number: int, name: str, args: tuple[Any, ...], output: Any) -> None:
        """Note the output of a compiled program, whose last sub-layer is `number`."""
        leaves = tree_leaves(output, is_leaf=_is_record)
        records = [leaf for leaf in leaves if isinstance(leaf, StreamMappings)]
        self._note_inputs(floating_tensors(args))
        self._add(number, name, None, records)
        self._note_output(output, number)
        if not records:
            self._output_known.add(number)  # without records, the output is streams

    def find(self, tensors: Iterable[Tensor]) -> int | None:
        """The sub-layer that returned one of these tensors; None if it cannot be found."""
        tensors = list(tensors)
        for tensor in tensors:
            reference = _reference(tensor)
            output = None if reference is None else self._outputs.get(reference.cdata)
            if output is not None and output.elements == tensor.numel() and not _repeats(tensor):
                return output.number
        for tensor in tensors:
            number = self._find_in_graph(tensor)
            if number is not None:
                return number
        return None

    def _add(
        self,
        number: int,
        name: str,
        after: int | None,
        records: list[StreamMappings],
        elements: int = 0,
    ) -> None:
        in_graph = any(record.residual.grad_fn is not None for record in records)
        self._sub_layers[number] = _SubLayer(
            name, after, torch.is_grad_enabled(), in_graph, elements
        )
        for record in records:
            self._mark(record.residual, number)
            self._mark(record.post, number)

    def _note_inputs(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            reference = _reference(tensor)
            if reference is not None:
                self._inputs[reference.cdata] = reference

    def _note_output(self, output: Any, number: int) -> None:
        for tensor in floating_tensors(output):
            reference = _reference(tensor)
            if reference is not None and reference.cdata not in self._inputs:
                self._outputs[reference.cdata] = _Output(reference, tensor.numel(), number)
                self._mark(tensor, number)
                if tensor.numel() == self._sub_layers[number].elements:
                    self._output_known.add(number)

    def _merge(self, residual: Tensor, merged: Tensor) -> None:
        """Note the output of a merge by the kernels; called as one of `merge_observers`."""
        number = self._by_residual.get(id(residual))
        reference = _reference(merged)
        if number is not None and reference is not None:
            self._outputs[reference.cdata] = _Output(reference, merged.numel(), number)
            self._output_known.add(number)

    def _mark(self, tensor: Tensor, number: int) -> None:
        if tensor.grad_fn is not None:
            marks = _metadata(tensor.grad_fn).setdefault(self._key, {})
            marks[tensor.output_nr] = number

    def _find_in_graph(self, tensor: Tensor) -> int | None:
        """The nearest mark in the graph behind a tensor that is not beyond a broadcast."""
        queue: deque[tuple[Node | None, int]] = deque([(tensor.grad_fn, tensor.output_nr)])
        visited: set[tuple[Node, int]] = set()
        while queue:
            node, output = queue.popleft()
            if node is None or (node, output) in visited:
                continue
            visited.add((node, output))
            number = _metadata(node).get(self._key, {}).get(output)
            if number is not None:
                return number
            if not _broadcasts(node, output):
                queue.extend(node.next_functions)
        return None

    def _guess(self, name: str, streams: Tensor | None, mappings: StreamMappings) -> int | None:
        """The last sub-layer, if no tensor can show the link; None if `name` is in its chain."""
        last = next(reversed(self._sub_layers), None)
        if last is None or last in self._output_known:
            return None
        sub_layer = self._sub_layers[last]
        if sub_layer.grad_enabled != torch.is_grad_enabled():
            return None
        if streams is not None and sub_layer.in_graph:
            graph_would_show = streams.grad_fn is not None
            if graph_would_show or not mappings.residual.requires_grad:
                return None
        chain: int | None = last
        while chain is not None:
            if self._sub_layers[chain].name == name:
                return None
            chain = self._sub_layers[chain].after
        return last


def streams_in_arguments(mappings: StreamMappings, args: tuple[Any, ...]) -> Tensor | None:
    """The first argument that has the shape [..., n, C] of streams with these mappings."""
    stream_shape = mappings.residual.shape[:-1]  # [..., n]
    for argument in args:
        floating = isinstance(argument, Tensor) and argument.is_floating_point()
        if floating and argument.dim() >= 2 and argument.shape[:-1] == stream_shape:
            return argument
    return None


def floating_tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested arguments or outputs, without those of records."""
    leaves = tree_leaves(value, is_leaf=_is_record)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _is_record(value: Any) -> bool:
    return isinstance(value, StreamMappings)


def _reference(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # a tensor without a storage of its own
        return None


def _repeats(tensor: Tensor) -> bool:
    """True if one element in memory stands for several, as in an expanded tensor."""
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _metadata(node: Node) -> dict[Any, dict[int, int]]:
    """A dictionary that lives as long as the node."""
    return node.metadata  # type: ignore[return-value]  # a property, declared as a method


def _broadcasts(node: Node, output: int) -> bool:
    """True if an output has more elements than all its inputs together, parameters left out."""
    output_elements, input_elements = _elements(node, output), 0
    for source, number in set(node.next_functions):
        size = _elements(source, number)
        if source is None or size is None or output_elements is None:
            return False
        input_elements += 0 if _is_parameter(source) else size
    return output_elements is not None and input_elements < output_elements


def _is_parameter(node: Node) -> bool:
    """True if a node stands for a parameter, or for a transposed one (of a linear layer)."""
    source: Node | None = node
    if node.name() == "TBackward0":
        source = node.next_functions[0][0]
    return isinstance(getattr(source, "variable", None), nn.Parameter)


def _elements(node: Node | None, output: int) -> int | None:
    """The number of elements of a node's output; None if it is not recorded."""
    try:
        return None if node is None else math.prod(node._input_metadata[output].shape)
    except (AttributeError, IndexError, RuntimeError):
        return None
