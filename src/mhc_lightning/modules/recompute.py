"""Recomputing streams in backward, a block of sub-layers at a time (arXiv 2512.24880, section 4.3).

In forward, a handle replaces each tensor that autograd saves of a sub-layer's streams, input and
normalised input. In backward, the first handle that is opened repeats the stream operations of its
block. These operations need the streams that entered the block, the outputs of its sub-layers and
their mappings, which are kept anyway. Attention, feed-forward, projections and Sinkhorn-Knopp do
not run again. `replay.py` rebuilds tensors; this file records them.

Autograd calls the innermost saved-tensor hooks only. So this file passes tensors that are kept to
the hooks that surround `recomputing`. Handles identify tensors by storage: views cost nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mhc_lightning.kernels import StreamMappings
from mhc_lightning.kernels.transforms import transforming
from mhc_lightning.modules.precision import autocast_dtype
from mhc_lightning.modules.replay import (
    NORMED,
    READ,
    STREAMS,
    Handle,
    Key,
    NormHandle,
    NormReplay,
    ReplayBlock,
)


@contextmanager
def recomputing(size: int) -> Iterator[None]:
    """Within, keep streams only every `size` sub-layers, where gradients are recorded.

    Transforms of `torch.func` do not call saved-tensor hooks: under them everything is kept.

    Args:
        size: Sub-layers per block; 0 keeps everything. No block reaches beyond the context.
    """
    if size == 0 or not torch.is_grad_enabled() or transforming():
        yield
        return
    global _recordings
    recording = _Recording(size)
    token = _active.set(recording)
    _recordings += 1
    try:
        with saved_tensors_hooks(recording.pack, _unpack):
            yield
            recording.settle()
    finally:
        _recordings -= 1
        _active.reset(token)
        recording.forget()


def note_read(streams: Tensor, read: Tensor, mappings: StreamMappings | None) -> None:
    """Report to a surrounding `recomputing` what a sub-layer has read.

    Args:
        streams: [..., n, C], merged.
        read: The sub-layer's input [..., C].
        mappings: The mappings with which `aggregate_streams` and `merge_streams` repeat this
            sub-layer; None if they cannot, and its streams have to be kept.
    """
    recording = _recording()
    if recording is not None:
        recording.read(streams, read, mappings)


def note_output(output: Tensor) -> None:
    """Report to a surrounding `recomputing` the output of a sub-layer, before it is merged."""
    recording = _recording()
    if recording is not None:
        recording.returned(output)


def note_entry() -> None:
    """Report to a surrounding `recomputing` that streams are changed outside of a sub-layer.

    The next sub-layer begins a new recompute block.
    """
    recording = _recording()
    if recording is not None:
        recording.interrupt()


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)`; within `recomputing`, its saved tensors and output are rebuilt if `x` is."""
    if torch.compiler.is_compiling():
        return norm(x)
    recording = _active.get()
    return norm(x) if recording is None else recording.normalise(norm, x)


class _Pending:
    """A saved tensor of which it is not yet known whether it can be rebuilt."""

    __slots__ = ("content",)

    def __init__(self, tensor: Tensor) -> None:
        self.content: Any = tensor


class _Kept(NamedTuple):
    """A tensor that cannot be rebuilt. `open` checks its version, because autograd does not."""

    tensor: Tensor
    version: int

    def open(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor that backward needs was changed in place: a"
                f" {str(self.tensor.dtype).removeprefix('torch.')} {list(self.tensor.shape)} is at"
                f" version {self.tensor._version}, but was kept at version {self.version}"
            )
        return self.tensor


class _Foreign(NamedTuple):
    """A tensor that the surrounding saved-tensor hooks keep."""

    packed: Any
    unpack: Callable[[Any], Tensor]

    def open(self) -> Tensor:
        return self.unpack(self.packed)


class _Known(NamedTuple):
    tensor: Tensor  # kept alive, so that its address is its own
    version: int
    block: ReplayBlock
    key: Key


class _Recording:
    """The saved tensors of one forward pass through consecutive sub-layers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._block: ReplayBlock | None = None
        self._known: dict[int, _Known] = {}
        self._pending: list[_Pending] = []
        self._reading = True  # False while a sub-layer is running
        self._output: Tensor | None = None
        # The norm that is running: its block, its sub-layer, and the elements of its input.
        self._norm: tuple[ReplayBlock, int, int] | None = None
        self._norm_packs = 0

    def pack(self, tensor: Tensor) -> Any:
        """The object that autograd keeps in place of a tensor."""
        # An operator's output holds the operator, which would hold the output: a cycle.
        tensor = tensor.detach()
        number = self._norm_packs
        self._norm_packs += 1
        handle = self._handle(tensor)
        if handle is not None:
            return handle
        if self._norm is not None:
            block, index, elements = self._norm
            if tensor.numel() >= elements:
                block.count((index, NORMED))
                return NormHandle(block, (index, NORMED), number)
        if self._reading:
            # Merge and read may be one operator: its streams are known once it has returned.
            pending = _Pending(tensor)
            self._pending.append(pending)
            return pending
        return self._keep(tensor)

    def read(self, streams: Tensor, read: Tensor, mappings: StreamMappings | None) -> None:
        """Record what a sub-layer has read: its streams and its input can be rebuilt."""
        streams, before = streams.detach(), self._known
        if mappings is None:
            self._block, self._known = None, {}
        elif self._block is None or len(self._block) == self._size:
            self._block, self._known = ReplayBlock(streams), {}
            self._block.add(mappings, None)
        else:
            self._known = {}
            self._know(streams, self._block, (len(self._block), STREAMS))
            self._block.add(mappings, self._output)
        if self._block is not None:
            self._know(read.detach(), self._block, (len(self._block) - 1, READ))
        self._output, now = None, self._known
        self._known = before | now
        self.settle()
        self._known, self._reading = now, False

    def interrupt(self) -> None:
        """Let the next sub-layer begin a new block, from streams that no replay gives."""
        self._block = None

    def returned(self, output: Tensor) -> None:
        """Record a sub-layer's output; of its known tensors, the merge saves only the streams."""
        self._output, self._reading = output, True
        self._known = {at: known for at, known in self._known.items() if known.key[1] == STREAMS}

    def normalise(self, norm: nn.Module, x: Tensor) -> Tensor:
        """`norm(x)`, to be rebuilt if `x` is the input of the running sub-layer."""
        known = self._known.get(_address(x))
        if known is None or known.key[1] != READ or not _same(x, known):
            return norm(x)
        block, (index, _) = known.block, known.key
        # Modules within a norm, such as an adapter, may be random or have hooks of their own.
        if block.has_norm(index) or norm._forward_pre_hooks or any(norm.children()):
            return norm(x)
        returned: list[Any] = []

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            returned.append(output)
            self._norm = None  # other hooks may save tensors that no norm rebuilds

        first = norm.register_forward_hook(note, prepend=True)
        self._norm, self._norm_packs = (block, index, x.numel()), 0
        try:
            output = norm(x)
        finally:
            self._norm = None
            first.remove()
        block.add_norm(index, NormReplay(norm.forward, x.requires_grad, autocast_dtype(x)))
        if output is returned[0]:  # no hook has replaced it
            self._know(output.detach(), block, (index, NORMED))
        return output

    def settle(self) -> None:
        """Replace the pending tensors that can be rebuilt by handles, and keep the others."""
        for pending in self._pending:
            tensor = pending.content
            pending.content = self._handle(tensor) or self._keep(tensor)
        self._pending.clear()

    def forget(self) -> None:
        """Drop all references; autograd holds the objects that it keeps."""
        self._block = self._output = None
        self._known.clear()
        self._pending.clear()

    def _know(self, tensor: Tensor, block: ReplayBlock, key: Key) -> None:
        address = _address(tensor)
        whole = tensor.is_contiguous() and tensor.storage_offset() == 0
        if whole and tensor.numel() > 0 and address not in self._known:
            self._known[address] = _Known(tensor, tensor._version, block, key)

    def _handle(self, tensor: Tensor) -> Handle | None:
        known = self._known.get(_address(tensor))
        if known is None or known.tensor.dtype != tensor.dtype:
            return None
        if known.version != tensor._version:
            return None  # changed in place: no replay gives that value
        known.block.count(known.key)
        size, stride, offset = tensor.size(), tensor.stride(), int(tensor.storage_offset())
        return Handle(known.block, known.key, size, stride, offset)

    def _keep(self, tensor: Tensor) -> Any:
        if self._outer is None:
            return _Kept(tensor, tensor._version)
        pack, unpack = self._outer
        return _Foreign(pack(tensor), unpack)


_active: ContextVar[_Recording | None] = ContextVar("recording", default=None)
# The number of recordings in all threads: a compiler can read it, but no context variable.
_recordings = 0


def _recording() -> _Recording | None:
    return _active.get() if _recordings else None


def _unpack(packed: Any) -> Tensor:
    return (packed.content if isinstance(packed, _Pending) else packed).open()


def _same(tensor: Tensor, known: _Known) -> bool:
    """True if a tensor of the same storage is the same tensor, unchanged."""
    like = known.tensor
    return (
        (tensor.dtype, tensor.shape, tensor.stride()) == (like.dtype, like.shape, like.stride())
        and tensor.storage_offset() == 0
        and tensor._version == known.version
    )


def _address(tensor: Tensor) -> int:
    # The address of the storage object, not of its memory: meta tensors have no memory.
    return tensor.untyped_storage()._cdata
