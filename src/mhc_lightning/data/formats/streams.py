"""Streams of bytes that are made block by block."""

import io
from abc import abstractmethod
from typing import Any, BinaryIO

from mhc_lightning.errors import UserError

BUFFER_BYTES = 1 << 16
_SMALL = 1 << 26  # what any file may unpack to, whatever its size


class BlockStream(io.RawIOBase):
    """A stream whose bytes come in blocks of any size."""

    def __init__(self) -> None:
        self._block = memoryview(b"")  # bytes not handed out yet

    @abstractmethod
    def next_block(self) -> bytes | None:
        """Some bytes, perhaps none; None at the end."""

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        while not self._block:
            block = self.next_block()
            if block is None:
                return 0
            self._block = memoryview(block)
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count


class Rewound(BlockStream):
    """A stream with the bytes before it that were read already.

    Args:
        beginning: These bytes.
        stream: The rest.
    """

    def __init__(self, beginning: bytes, stream: BinaryIO) -> None:
        super().__init__()
        self._block = memoryview(beginning)
        self._stream = stream

    def next_block(self) -> bytes | None:
        """See `BlockStream`."""
        return self._stream.read(BUFFER_BYTES) or None


class Bounded(BlockStream):
    """A stream of unpacked bytes that refuses to become too long.

    Args:
        stream: The unpacked stream; only `read` is needed.
        name: Name of the input, for the error message.
        size: Bytes of the packed stream.
        max_expansion: The stream may have so many times this size; below 64 MiB, any.

    Raises:
        UserError: On reading: it has more.
    """

    def __init__(self, stream: Any, name: str, size: int, max_expansion: float) -> None:
        super().__init__()
        self._stream = stream
        self._name = name
        self._ratio = max_expansion
        self._left = max(float(_SMALL), size * max_expansion)

    def next_block(self) -> bytes | None:
        """See `BlockStream`."""
        block: bytes = self._stream.read(BUFFER_BYTES)
        self._left -= len(block)
        if self._left < 0:
            raise UserError(
                f"input {self._name} unpacks to more than {self._ratio:g} times its size, as a"
                " decompression bomb does; leave it out, or allow more with max_expansion=…"
            )
        return block or None
