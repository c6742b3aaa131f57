"""The kept tensors of a recompute block, and how backward rebuilds the others from them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mhc_lightning.kernels import StreamMappings, replay_streams

STREAMS, READ, NORMED = "streams", "read", "normed"

Key = tuple[int, str]
"""The number of a sub-layer in its block, from 0, and the kind of tensor."""


class NormReplay(NamedTuple):
    """Repeats the norm of a sub-layer's input."""

    forward: Callable[[Tensor], Tensor]
    requires_grad: bool
    autocast: torch.dtype | None

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output, and the tensors that autograd saves for it, in order."""
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> None:
            saved.append(tensor.detach())

        x = x.detach().requires_grad_(self.requires_grad)
        # Autograd's thread may be in another autocast mode than the forward pass was.
        autocast = nullcontext() if x.is_meta else _autocast(x.device.type, self.autocast)
        with torch.enable_grad(), autocast, saved_tensors_hooks(pack, _discarded):
            return self.forward(x).detach(), saved


@contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast`, or none, that does not clear the cache of cast weights.

    `torch.autocast` would, at its exit in autograd's thread, drop copies that forward passes share.
    """
    enabled, before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype is not None)
    torch.set_autocast_dtype(device, dtype or before)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, before)


class ReplayBlock:
    """A recompute block: its kept tensors, and rebuilt ones that backward still needs."""

    def __init__(self, entry: Tensor) -> None:
        self._entry = entry
        self._mappings: list[StreamMappings] = []
        self._outputs: list[Tensor] = []
        self._norms: dict[int, NormReplay] = {}
        # For each key: the number of handles, and the number of handles that were opened.
        self._handles: dict[Key, int] = {}
        self._opened: dict[Key, int] = {}
        self._rebuilt: dict[Key, Any] = {}

    def __len__(self) -> int:
        return len(self._mappings)

    def add(self, mappings: StreamMappings, output_before: Tensor | None) -> None:
        """Add a sub-layer, and the output of the sub-layer that precedes it in this block."""
        if output_before is not None:
            self._outputs.append(output_before.detach())
        self._mappings.append(StreamMappings(*(mapping.detach() for mapping in mappings)))

    def add_norm(self, index: int, norm: NormReplay) -> None:
        """Add the norm of a sub-layer's input."""
        self._norms[index] = norm

    def has_norm(self, index: int) -> bool:
        """True if the norm of a sub-layer's input has been added."""
        return index in self._norms

    def count(self, key: Key) -> None:
        """Count a further handle of a tensor."""
        self._handles[key] = self._handles.get(key, 0) + 1

    def open(self, key: Key) -> Any:
        """The tensor of a handle; opening the last handle drops the block's reference."""
        if key not in self._rebuilt:
            self._rebuild(key)
        tensor = self._rebuilt[key]
        opened = self._opened.get(key, 0) + 1
        if opened >= self._handles[key]:
            # A retained graph may run backward again, and then rebuilds its streams again.
            del self._rebuilt[key]
            opened = 0
        self._opened[key] = opened
        return tensor

    def _rebuild(self, key: Key) -> None:
        index, kind = key
        if kind == NORMED:
            # Norms are rebuilt singly: sharded parameters are whole only while their layer runs.
            read = (index, READ)
            if read not in self._rebuilt:
                self._replay(also=read)
            self._rebuilt[key] = self._norms[index](self._rebuilt[read])
            if read not in self._handles:
                del self._rebuilt[read]
        else:
            self._replay(also=key)

    def _replay(self, also: Key) -> None:
        # Backward starts at the last sub-layer: it has used all tensors after a missing one.
        until = also[0] if self._rebuilt else len(self)

        def wanted(kind: str) -> list[bool]:
            keys = [(index, kind) for index in range(len(self))]
            return [key == also or (key[0] <= until and self._waits_for(key)) for key in keys]

        streams, reads = replay_streams(
            self._entry, self._outputs, self._mappings, wanted(STREAMS), wanted(READ)
        )
        for kind, tensors in ((STREAMS, streams), (READ, reads)):
            for index, tensor in enumerate(tensors):
                if tensor is not None:
                    self._rebuilt[index, kind] = tensor

    def _waits_for(self, key: Key) -> bool:
        """True if backward will need a tensor that a replay can rebuild along the way."""
        index, kind = key
        for_norm = kind == READ and (index, NORMED) in self._handles
        return key not in self._rebuilt and (key in self._handles or for_norm)


class Handle(NamedTuple):
    """Stands for a view of a tensor that can be rebuilt.

    Attributes:
        block: The block that rebuilds the tensor.
        key: The tensor's key in the block.
        size: The view's size.
        stride: The view's stride.
        offset: The view's offset, in elements.
    """

    block: ReplayBlock
    key: Key
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def open(self) -> Tensor:
        """The view."""
        rebuilt = self.block.open(self.key)
        whole = rebuilt[0] if self.key[1] == NORMED else rebuilt
        return whole.as_strided(self.size, self.stride, self.offset)


class NormHandle(NamedTuple):
    """Stands for one of the tensors that autograd saves for a norm.

    Attributes:
        block: The block that rebuilds the tensor.
        key: The key of the norm's output, with which the tensor is rebuilt.
        number: The tensor's position among the norm's saved tensors.
    """

    block: ReplayBlock
    key: Key
    number: int

    def open(self) -> Tensor:
        """The tensor."""
        return self.block.open(self.key)[1][self.number]


def _discarded(packed: None) -> Tensor:
    raise AssertionError("a rebuilt norm has no backward pass of its own")
