"""What recomputation keeps of a block of sub-layers, and how backward gets the rest again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mhc_lightning.kernels import StreamMappings, replay_streams

STREAMS, READ, NORMED = "streams", "read", "normed"

Key = tuple[int, str]
"""A sub-layer of the block, from 0, and which of its tensors."""


class NormReplay(NamedTuple):
    """How to normalise a sub-layer's input again."""

    forward: Callable[[Tensor], Tensor]
    requires_grad: bool
    autocast: torch.dtype | None

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output, and what autograd kept of it, in order."""
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> None:
            kept.append(tensor.detach())

        x = x.detach().requires_grad_(self.requires_grad)
        # Autograd's thread may be in another mode than the forward pass was.
        autocast = nullcontext() if x.is_meta else _autocast(x.device.type, self.autocast)
        with torch.enable_grad(), autocast, saved_tensors_hooks(pack, _discarded):
            return self.forward(x).detach(), kept


@contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """``torch.autocast``, or none, that leaves alone the copies of weights it finds.

    At its exit from autograd's thread torch's would drop those that forward passes still share.
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
    """A recompute block: what is kept of it, and what was rebuilt and is still needed."""

    def __init__(self, entry: Tensor) -> None:
        self._entry = entry
        self._mappings: list[StreamMappings] = []
        self._outputs: list[Tensor] = []
        self._norms: dict[int, NormReplay] = {}
        # By (sub-layer in the block, kind): handles there are, and how many were opened.
        self._handles: dict[Key, int] = {}
        self._opened: dict[Key, int] = {}
        self._rebuilt: dict[Key, Any] = {}

    def __len__(self) -> int:
        return len(self._mappings)

    def add(self, mappings: StreamMappings, output_before: Tensor | None) -> None:
        """A further sub-layer, and the output of the one before it in this block."""
        if output_before is not None:
            self._outputs.append(output_before.detach())
        self._mappings.append(StreamMappings(*(mapping.detach() for mapping in mappings)))

    def add_norm(self, index: int, norm: NormReplay) -> None:
        """How a sub-layer normalises its input."""
        self._norms[index] = norm

    def has_norm(self, index: int) -> bool:
        """Whether a sub-layer has normalised its input already."""
        return index in self._norms

    def count(self, key: Key) -> None:
        """One more handle for a tensor."""
        self._handles[key] = self._handles.get(key, 0) + 1

    def open(self, key: Key) -> Any:
        """The tensor of a handle; the last one to be opened lets it go."""
        if key not in self._rebuilt:
            self._rebuild(key)
        found = self._rebuilt[key]
        opened = self._opened.get(key, 0) + 1
        if opened >= self._handles[key]:
            # A graph that is retained may come again: its streams are then rebuilt again.
            del self._rebuilt[key]
            opened = 0
        self._opened[key] = opened
        return found

    def _rebuild(self, key: Key) -> None:
        index, kind = key
        if kind == NORMED:
            # One at a time: sharded parameters are there only while their own layer is at work.
            read = (index, READ)
            if read not in self._rebuilt:
                self._replay(also=read)
            self._rebuilt[key] = self._norms[index](self._rebuilt[read])
            if read not in self._handles:
                del self._rebuilt[read]
        else:
            self._replay(also=key)

    def _replay(self, also: Key) -> None:
        # Backward starts at the last sub-layer: what lies behind a missing tensor was used up.
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
        """Whether a replay should rebuild a tensor for what backward will ask next."""
        index, kind = key
        for_norm = kind == READ and (index, NORMED) in self._handles
        return key not in self._rebuilt and (key in self._handles or for_norm)


class Handle(NamedTuple):
    """Stands for a view of a tensor that can be rebuilt.

    Attributes:
        block: What rebuilds it.
        key: Which of the block's tensors.
        size: Of the view.
        stride: Of the view.
        offset: Of the view, in elements.
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
    """Stands for one of the tensors that a norm keeps.

    Attributes:
        block: What rebuilds it.
        key: The norm's output, with which it is rebuilt.
        number: Its place among what the norm keeps.
    """

    block: ReplayBlock
    key: Key
    number: int

    def open(self) -> Tensor:
        """The tensor."""
        return self.block.open(self.key)[1][self.number]


def _discarded(packed: None) -> Tensor:
    raise AssertionError("a rebuilt norm has no backward pass of its own")
