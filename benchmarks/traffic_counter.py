"""Counts the bytes that the Triton kernels load and store, access by access, without a GPU.

Triton's interpreter runs a kernel's loads and stores on the CPU with their masks; each access is
noted here under the argument whose memory it touches. Operations of torch between the launches
count too, when they touch a tensor of the streams' size (or larger): its bytes, at every access.

A *stream-sized* tensor (at least C elements per token, whatever its dtype) counts at every access.
Anything smaller (coefficients, parameters, partial sums) counts once per launch that touches it;
accesses beyond that, which caches serve, are listed apart as repeated.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from mhc_lightning.kernels.triton_support.launch import Launch, intercept

# Operations that touch no data, although their output is new.
_FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "set_",
    "resize_",
)
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# Operations that only write the tensor they change.
_OVERWRITING = ("copy_", "fill_", "zero_", "normal_", "uniform_")


@dataclass
class Row:
    """The bytes of one argument that one kernel (or operation of torch) moved.

    Attributes:
        where: The kernel's or the operation's name.
        argument: The argument's name.
        stream_sized: Whether every access counts.
        loaded: Bytes of all loads.
        stored: Bytes of all stores.
        loaded_once: Bytes of the elements that were loaded at least once, launch by launch.
        stored_once: Bytes of the elements that were stored at least once, launch by launch.
    """

    where: str
    argument: str
    stream_sized: bool
    loaded: int = 0
    stored: int = 0
    loaded_once: int = 0
    stored_once: int = 0

    @property
    def counted(self) -> int:
        """Bytes that count as traffic."""
        if self.stream_sized:
            return self.loaded + self.stored
        return self.loaded_once + self.stored_once

    @property
    def repeated(self) -> int:
        """Bytes of repeated accesses that do not count."""
        return self.loaded + self.stored - self.counted


class TrafficCounter:
    """Context manager that counts what the code inside moves.

    Args:
        tokens: Tokens that the code works on.
        width: C, elements per stream. Tensors of at least ``tokens · width`` elements are
            stream-sized.
        glue: Whether to count torch's operations between the launches as well.
    """

    def __init__(self, tokens: int, width: int, glue: bool = True) -> None:
        self.tokens = tokens
        self.rows: dict[tuple[str, str], Row] = {}
        self.launches = 0
        self._large = tokens * width
        self._glue = glue
        self._regions: list[_Region] = []
        self._busy = False

    @property
    def stream_bytes(self) -> float:
        """Bytes per token moved of stream-sized tensors."""
        return sum(row.counted for row in self.rows.values() if row.stream_sized) / self.tokens

    @property
    def other_bytes(self) -> float:
        """Bytes per token moved of anything smaller, each element once per launch."""
        return sum(row.counted for row in self.rows.values() if not row.stream_sized) / self.tokens

    @property
    def repeated_bytes(self) -> float:
        """Bytes per token of further accesses to anything smaller."""
        return sum(row.repeated for row in self.rows.values()) / self.tokens

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token that count."""
        return self.stream_bytes + self.other_bytes

    def table(self) -> str:
        """All rows as a Markdown table, in bytes per token."""
        lines = [
            "| kernel | argument | stream-sized | loaded | stored | counted | repeated |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows.values():
            numbers = (row.loaded, row.stored, row.counted, row.repeated)
            cells = " | ".join(f"{number / self.tokens:,.1f}" for number in numbers)
            sized = "yes" if row.stream_sized else ""
            lines.append(f"| {row.where} | {row.argument} | {sized} | {cells} |")
        return "\n".join(lines)

    def __enter__(self) -> "TrafficCounter":
        self._stack = ExitStack()
        self._stack.enter_context(_watched_memory(self._note))
        self._stack.enter_context(intercept(self._run))
        if self._glue:
            self._stack.enter_context(_GlueMode(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _run(self, launch: Launch) -> None:
        self.launches += 1
        names = launch.kernel.arg_names
        arguments = dict(zip(names, launch.args, strict=False)) | launch.constants
        self._regions = []
        for name, value in arguments.items():
            for tensor in tree_leaves(getattr(value, "base", value)):  # a descriptor has a base
                if isinstance(tensor, Tensor) and tensor.numel():
                    self._add_region(launch.kernel.__name__, name, tensor)
        self._busy = True
        try:
            launch.run()
        finally:
            self._busy = False
        for region in self._regions:
            region.finish()

    def _add_region(self, where: str, name: str, tensor: Tensor) -> None:
        start, end = _extent(tensor)
        for region in self._regions:
            if region.start < end and start < region.end:  # views of one memory: the first's row
                region.widen(min(start, region.start), max(end, region.end))
                return
        self._regions.append(
            _Region(self._row(where, name, tensor), start, end, tensor.element_size())
        )

    def _row(self, where: str, argument: str, tensor: Tensor) -> Row:
        sized = tensor.numel() >= self._large
        return self.rows.setdefault((where, argument), Row(where, argument, sized))

    def _note(self, addresses: np.ndarray, itemsize: int, stored: bool) -> None:
        if addresses.size == 0 or not self._busy:  # a kernel that is no operation: the toolchain's
            return
        first, last = int(addresses.min()), int(addresses.max())
        for region in self._regions:
            if region.start <= first and last < region.end:
                region.note(addresses, itemsize, stored)
                return
        raise RuntimeError(f"no argument holds the addresses {first:#x} to {last:#x} of an access")

    def note_operation(self, name: str, argument: str, tensor: Tensor, stored: bool) -> None:
        """Count one stream-sized operand of an operation of torch."""
        if self._busy or tensor.numel() < self._large:
            return
        row = self._row(name, argument, tensor)
        held = [s for s, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        size = int(np.prod(held, dtype=np.int64)) * tensor.element_size()
        if stored:
            row.stored += size
        else:
            row.loaded += size


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((s - 1) * d for s, d in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class _Region:
    """The memory behind an argument of a launch."""

    def __init__(self, row: Row, start: int, end: int, itemsize: int) -> None:
        self.row = row
        self.itemsize = itemsize
        self.widen(start, end)

    def widen(self, start: int, end: int) -> None:
        """Set the addresses it holds, before the launch."""
        self.start, self.end = start, end
        elements = (end - start) // self.itemsize
        self.seen = {stored: np.zeros(elements, dtype=bool) for stored in (False, True)}

    def note(self, addresses: np.ndarray, itemsize: int, stored: bool) -> None:
        """Count an access to elements at ``addresses``."""
        if stored:
            self.row.stored += addresses.size * itemsize
        else:
            self.row.loaded += addresses.size * itemsize
        index = (addresses - np.uint64(self.start)) // np.uint64(self.itemsize)
        self.seen[stored][index.astype(np.int64)] = True

    def finish(self) -> None:
        """Count the elements touched, after the launch."""
        self.row.loaded_once += int(self.seen[False].sum()) * self.itemsize
        self.row.stored_once += int(self.seen[True].sum()) * self.itemsize


@contextmanager
def _watched_memory(note: Callable[[np.ndarray, int, bool], None]) -> Iterator[None]:
    """Tell ``note`` of the addresses of every masked load and store of the interpreter."""
    builder = type(interpreter.interpreter_builder)
    load, store = builder.create_masked_load, builder.create_masked_store

    def touched(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
        selected = np.broadcast_to(mask.data, pointers.data.shape)
        return pointers.data[selected], pointers.get_element_ty().primitive_bitwidth // 8

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *policies: Any, **named: Any):
        note(*touched(ptrs, mask), False)
        return load(self, ptrs, mask, other, *policies, **named)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *policies: Any, **named: Any):
        note(*touched(ptrs, mask), True)
        return store(self, ptrs, value, mask, *policies, **named)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


class _GlueMode(TorchDispatchMode):
    """Counts the stream-sized operands of torch's own operations, inside our operators too."""

    def __init__(self, counter: TrafficCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "mhc_lightning":
            with self:  # what the operator's own code does counts
                return func.redispatch(_CPU, *args, **kwargs)
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        schema = func._schema
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if is_view or name in _FREE:
            return result
        named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        for argument in schema.arguments:
            changed = argument.alias_info is not None and argument.alias_info.is_write
            written_only = changed and (name in _OVERWRITING or argument.kwarg_only)
            for tensor in tree_leaves(named.get(argument.name)):
                if isinstance(tensor, Tensor):
                    if not written_only and not name.endswith("_like"):
                        self.counter.note_operation(name, argument.name, tensor, False)
                    if changed:
                        self.counter.note_operation(name, argument.name, tensor, True)
        if not any(r.alias_info for r in schema.returns):
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.counter.note_operation(name, "result", tensor, True)
        return result
