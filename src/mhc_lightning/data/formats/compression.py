"""Decompression of streams: gzip, zstd, bzip2 and xz, in bounded memory and to a bounded size."""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from mhc_lightning.data.formats.streams import BUFFER_BYTES, BlockStream, Bounded
from mhc_lightning.errors import UserError

COMPRESSION_GUESS = 4  # times the size of a compressed file: bytes of its text, roughly
_LARGEST_ZSTD_WINDOW = 1 << 31  # of `zstd --long=31`, which large public archives use
_LARGEST_XZ_MEMORY = 1 << 30  # the largest preset, -9, needs 65 MiB

# By ending: the ending of the compression, and what the name is without it.
_ENDINGS = {
    **{ending: (ending, "") for ending in (".gz", ".zst", ".bz2", ".xz")},
    ".tgz": (".gz", ".tar"),
    ".tbz2": (".bz2", ".tar"),
    ".tbz": (".bz2", ".tar"),
    ".txz": (".xz", ".tar"),
    ".tzst": (".zst", ".tar"),
}
_SIGNATURES = (
    (".gz", 0, b"\x1f\x8b\x08"),
    (".zst", 0, b"\x28\xb5\x2f\xfd"),
    (".bz2", 4, b"1AY&SY"),
    (".xz", 0, b"\xfd7zXZ\0"),
)


def compression_of(name: str, beginning: bytes = b"") -> str:
    """`.gz`, `.zst`, `.bz2`, `.xz` or an empty string, by a file's name, else its first bytes."""
    compression = _ending(name)[1]
    if compression:
        return compression
    for compression, offset, signature in _SIGNATURES:
        if beginning.startswith(signature, offset):
            return compression
    return ""


def stem_of(name: str) -> str:
    """A file name without the ending of a compression; `.tar` for `.tgz`."""
    ending, _, rest = _ending(name)
    return name[: len(name) - len(ending)] + rest


def ending_of(name: str) -> str:
    """The ending of a file name, with that of a compression: `.txt.gz`, `.tgz`."""
    ending, _, rest = _ending(name)
    stem = name[: len(name) - len(ending)]
    return ("" if rest else os.path.splitext(stem)[1]) + ending


def _ending(name: str) -> tuple[str, str, str]:
    for ending, (compression, rest) in _ENDINGS.items():
        if name.lower().endswith(ending):
            return name[-len(ending) :], compression, rest
    return "", "", ""


@contextmanager
def damage_named(name: str) -> Iterator[None]:
    """Turn what a decompressor or an archive says of damage into a `UserError`."""
    import tarfile
    import zipfile

    import zstandard

    damages: tuple[type[Exception], ...] = (
        *(gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError),
        *(zipfile.BadZipFile, tarfile.TarError),
    )
    try:
        yield
    except damages as error:
        raise _damaged(name, error) from error
    except OSError as error:
        if error.errno is None:  # of bz2: no error of the system
            raise _damaged(name, error) from error
        raise UserError(f"input {name} cannot be read: {error.strerror or error}") from error


def _damaged(name: str, error: Exception) -> UserError:
    return UserError(f"input {name} is damaged: {error}; repair it or leave it out")


def decompressed(
    raw: BinaryIO, compression: str, name: str, size: int, max_expansion: float
) -> io.BufferedReader:
    """A stream, decompressed.

    Args:
        raw: The compressed stream.
        compression: See `compression_of`; an empty string for none.
        name: Name of the input, for error messages.
        size: Bytes of the compressed stream.
        max_expansion: The stream may unpack to so many times its size; below 64 MiB, to anything.

    Raises:
        UserError: On reading: the stream unpacks to more. Damage raises what `damage_named` knows.
    """
    opened: Any
    if compression == ".gz":
        opened = gzip.GzipFile(fileobj=raw)
    elif compression == ".zst":
        opened = _Frames(raw, _new_zstd)
    elif compression == ".bz2":
        opened = _Frames(raw, bz2.BZ2Decompressor)
    elif compression == ".xz":
        opened = _Frames(raw, _new_xz)
    else:
        return cast(io.BufferedReader, raw)
    return io.BufferedReader(Bounded(opened, name, size, max_expansion), BUFFER_BYTES)


def _new_zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_LARGEST_ZSTD_WINDOW).decompressobj()


def _new_xz() -> Any:
    return lzma.LZMADecompressor(memlimit=_LARGEST_XZ_MEMORY)


class _Frames(BlockStream):
    """All frames of a compressed file; a frame that is cut short is an error.

    zstandard's own reader misses a frame that is cut short, and those of bz2 and lzma take what is
    no frame after the first for the end of the file.
    """

    # Four bytes of zstd may stand for 128 KiB, and all output of a piece is there at once.
    _PIECE_BYTES = 1 << 8
    _PADDING = b"\0\0\0\0"  # may follow a frame of xz

    def __init__(self, raw: BinaryIO, new_frame: Callable[[], Any]) -> None:
        super().__init__()
        self._raw = raw
        self._new_frame = new_frame
        self._frame: Any = None  # the decompressor of the current frame
        self._input = memoryview(b"")  # compressed bytes that no frame has taken yet

    def next_block(self) -> bytes | None:
        """See `BlockStream`."""
        # With a largest size of the output, a decompressor keeps what is left of its input.
        has_input = self._frame is not None and not getattr(self._frame, "needs_input", True)
        if not has_input and not self._input:
            self._input = memoryview(self._raw.read(BUFFER_BYTES))
            if not self._input:
                if self._frame is not None:
                    raise EOFError("compressed file ended before its last frame did")
                return None
        if self._frame is None:
            if self._new_frame is _new_xz and self._input[: len(self._PADDING)] == self._PADDING:
                self._input = self._input[len(self._PADDING) :]
                return b""
            self._frame = self._new_frame()
        block: bytes
        if not hasattr(self._frame, "needs_input"):
            block = self._frame.decompress(self._input[: self._PIECE_BYTES])
            self._input = self._input[self._PIECE_BYTES :]
        elif has_input:
            block = self._frame.decompress(b"", BUFFER_BYTES)
        else:
            block = self._frame.decompress(self._input, BUFFER_BYTES)
            self._input = memoryview(b"")
        if self._frame.eof:
            self._input = memoryview(self._frame.unused_data + bytes(self._input))
            self._frame = None
        return block
