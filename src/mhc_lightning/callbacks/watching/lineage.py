"""Whose output a sub-layer reads: told by the tensors themselves, without keeping any of them."""

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


class _End(NamedTuple):
    """Streams that a sub-layer left. While the reference lives, no other storage is where it is."""

    storage: StorageWeakRef
    elements: int
    number: int


class _Seen(NamedTuple):
    name: str
    after: int | None
    grad: bool  # whether gradients were recorded
    traced: bool  # whether the residual mapping is in autograd's graph
    elements: int  # of its streams, 0 if they are not known


class Lineage:
    """Links the sub-layers that are seen in a step into chains, between `open` and `close`.

    A sub-layer continues the one whose streams it reads: the very tensor that was left, a view of
    all of it or, where gradients are recorded, what autograd's graph leads back from without a
    broadcast in between (a copy on another device or in another dtype, a slice, a norm). Streams
    that are expanded anew, from whatever network's output, begin a new chain.

    Nothing is kept alive: storages are held weakly, and nodes of autograd's graph carry their
    marks themselves.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._key = object()  # of the marks on autograd's nodes
        self._seen: dict[int, _Seen] = {}
        self._ends: dict[int, _End] = {}
        self._read: dict[int, StorageWeakRef] = {}
        self._by_residual: dict[int, int] = {}
        self._left: set[int] = set()  # sub-layers whose merged streams were seen

    def open(self) -> None:
        """Begin, and listen to merges."""
        self.close()
        merge_observers.append(self._merge)

    def close(self) -> None:
        """Forget everything."""
        if self._merge in merge_observers:
            merge_observers.remove(self._merge)
        self._forget()

    def arrive(
        self, number: int, name: str, args: tuple[Any, ...], mappings: StreamMappings
    ) -> int | None:
        """A sub-layer has read.

        Args:
            number: Its own, larger than those before.
            name: Of the module that yielded its record.
            args: That module's arguments.
            mappings: The record, which the caller keeps until `close`.

        Returns:
            The number of the sub-layer whose output it reads, or None.
        """
        streams = streams_in_arguments(mappings, args)
        tensors = floating_tensors(args[:1]) if streams is None else [streams]
        after = self.find(tensors)
        if after is None:
            after = self._guess(name, streams, mappings)
        self._note_read(tensors)
        self._by_residual[id(mappings.residual)] = number
        self._enter(number, name, after, [mappings], 0 if streams is None else streams.numel())
        return after

    def leave(self, name: str, output: Any) -> None:
        """A module has returned; if it holds the last sub-layer, that may be its streams."""
        last = next(reversed(self._seen), None)
        if last is None:
            return
        inside = self._seen[last].name
        if name in ("", inside) or inside.startswith(f"{name}."):
            self._note_left(output, last)

    def leave_program(self, number: int, name: str, args: tuple[Any, ...], output: Any) -> None:
        """A compiled program has returned, whose last sub-layer is `number`."""
        leaves = tree_leaves(output, is_leaf=_is_record)
        records = [leaf for leaf in leaves if isinstance(leaf, StreamMappings)]
        self._note_read(floating_tensors(args))
        self._enter(number, name, None, records)
        self._note_left(output, number)
        if not records:
            self._left.add(number)  # where else should they be?

    def _enter(
        self,
        number: int,
        name: str,
        after: int | None,
        records: list[StreamMappings],
        elements: int = 0,
    ) -> None:
        traced = any(record.residual.grad_fn is not None for record in records)
        self._seen[number] = _Seen(name, after, torch.is_grad_enabled(), traced, elements)
        for record in records:
            self._mark(record.residual, number)
            self._mark(record.post, number)

    def _note_read(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            reference = _reference(tensor)
            if reference is not None:
                self._read[reference.cdata] = reference

    def _note_left(self, output: Any, number: int) -> None:
        for tensor in floating_tensors(output):
            reference = _reference(tensor)
            if reference is not None and reference.cdata not in self._read:
                self._ends[reference.cdata] = _End(reference, tensor.numel(), number)
                self._mark(tensor, number)
                if tensor.numel() == self._seen[number].elements:
                    self._left.add(number)

    def find(self, tensors: Iterable[Tensor]) -> int | None:
        """The sub-layer that left one of these tensors, if that can be told."""
        tensors = list(tensors)
        for tensor in tensors:
            reference = _reference(tensor)
            end = None if reference is None else self._ends.get(reference.cdata)
            if end is not None and end.elements == tensor.numel() and not _repeats(tensor):
                return end.number
        for tensor in tensors:
            number = self._find_in_graph(tensor)
            if number is not None:
                return number
        return None

    def _merge(self, residual: Tensor, merged: Tensor) -> None:
        number = self._by_residual.get(id(residual))
        reference = _reference(merged)
        if number is not None and reference is not None:
            self._ends[reference.cdata] = _End(reference, merged.numel(), number)
            self._left.add(number)

    def _mark(self, tensor: Tensor, number: int) -> None:
        if tensor.grad_fn is not None:
            marks = _notes_on(tensor.grad_fn).setdefault(self._key, {})
            marks[tensor.output_nr] = number

    def _find_in_graph(self, tensor: Tensor) -> int | None:
        """The nearest mark behind a tensor that is not beyond a broadcast."""
        ahead: deque[tuple[Node | None, int]] = deque([(tensor.grad_fn, tensor.output_nr)])
        visited: set[tuple[Node, int]] = set()
        while ahead:
            node, output = ahead.popleft()
            if node is None or (node, output) in visited:
                continue
            visited.add((node, output))
            number = _notes_on(node).get(self._key, {}).get(output)
            if number is not None:
                return number
            if not _broadcasts(node, output):
                ahead.extend(node.next_functions)
        return None

    def _guess(self, name: str, streams: Tensor | None, mappings: StreamMappings) -> int | None:
        """For a module of which tensors do not tell: the last, unless it was met in that chain."""
        last = next(reversed(self._seen), None)
        if last is None or last in self._left:
            return None
        seen = self._seen[last]
        if seen.grad != torch.is_grad_enabled():
            return None
        if streams is not None and seen.traced:
            tells = streams.grad_fn is not None
            if tells or not mappings.residual.requires_grad:
                return None
        chain: int | None = last
        while chain is not None:
            if self._seen[chain].name == name:
                return None
            chain = self._seen[chain].after
        return last


def streams_in_arguments(mappings: StreamMappings, args: tuple[Any, ...]) -> Tensor | None:
    """The first argument that has the shape [..., n, C] of streams with these mappings."""
    wanted = mappings.residual.shape[:-1]
    for argument in args:
        floating = isinstance(argument, Tensor) and argument.is_floating_point()
        if floating and argument.dim() >= 2 and argument.shape[:-1] == wanted:
            return argument
    return None


def floating_tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested arguments or outputs, those of records left out."""
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
    """Whether elements stand for several, as in an expanded tensor."""
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _notes_on(node: Node) -> dict[Any, dict[int, int]]:
    """A dictionary that lives as long as the node."""
    return node.metadata  # type: ignore[return-value]  # a property, declared as a method


def _broadcasts(node: Node, output: int) -> bool:
    """Whether an output has more elements than all that it was made of, parameters left out."""
    whole, made_of = _elements(node, output), 0
    for source, number in set(node.next_functions):
        size = _elements(source, number)
        if source is None or size is None or whole is None:
            return False
        made_of += 0 if _is_parameter(source) else size
    return whole is not None and made_of < whole


def _is_parameter(node: Node) -> bool:
    """Whether a node stands for a parameter, or for one that is transposed (a linear layer's)."""
    source: Node | None = node
    if node.name() == "TBackward0":
        source = node.next_functions[0][0]
    return isinstance(getattr(source, "variable", None), nn.Parameter)


def _elements(node: Node | None, output: int) -> int | None:
    """How many elements an output of a node has; None if nothing tells."""
    try:
        return None if node is None else math.prod(node._input_metadata[output].shape)
    except (AttributeError, IndexError, RuntimeError):
        return None
