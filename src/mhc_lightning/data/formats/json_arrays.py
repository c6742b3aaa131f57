"""The items of a JSON array, one after the other, however long the array is.

The standard library parses whole texts only. So an item is parsed from a buffer, which grows until
the item is whole.
"""

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from mhc_lightning.errors import UserError

_BLOCK_BYTES = 1 << 16
_WHITESPACE = " \t\n\r"
# Where a number, a literal or an escape may be cut off: so near to the end of the buffer, an error
# may come from the cut.
_LONGEST_CUT = 16


def array_items(stream: BinaryIO, name: str) -> Iterator[tuple[int, object]]:
    """The items of the array in a stream, numbered from 1; invalid UTF-8 in them is kept.

    Args:
        stream: UTF-8, with or without a byte-order mark.
        name: Name of the input, for error messages.

    Raises:
        UserError: The stream is no JSON array. What follows a mistake cannot be told apart, so no
            item after it is read.
    """
    text = _Buffer(stream)
    number = 0
    if text.next_character() != "[":
        raise _broken(name, number, "it does not begin with a bracket")
    text.skip(1)
    if text.next_character() != "]":
        while True:
            number += 1
            try:
                item = text.item()
            except (ValueError, RecursionError) as error:
                raise _broken(name, number, str(error)) from error
            yield number, item
            mark = text.next_character()
            if mark not in (",", "]"):
                found = f"there is {mark!r}" if mark else "the file ends"
                raise _broken(name, number, f"{found} after it instead of a comma or a bracket")
            if mark == "]":
                break
            text.skip(1)
    text.skip(1)
    if text.next_character():
        raise _broken(name, number, "text follows the end of the array")


def _broken(name: str, number: int, reason: str) -> UserError:
    return UserError(
        f"the JSON array of input {name} is broken at item {number} ({reason}); mend it, or leave"
        " the file out"
    )


class _Buffer:
    """The part of a text that is being parsed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._start = 0
        self._ended = False

    def next_character(self) -> str:
        """The first character that is no white space, which is kept; empty at the end."""
        while True:
            while self._start < len(self._text):
                character = self._text[self._start]
                if character not in _WHITESPACE:
                    return character
                self._start += 1
            if self._ended:
                return ""
            self._read(_BLOCK_BYTES)

    def skip(self, count: int) -> None:
        """Leave characters behind."""
        self._start += count

    def item(self) -> object:
        """The value that begins at the next character.

        Raises:
            ValueError, RecursionError: There is none.
        """
        self.next_character()
        size = _BLOCK_BYTES
        while True:
            try:
                value, end = self._decode(self._text, self._start)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._text) - _LONGEST_CUT
                if self._ended or not (cut or error.msg.startswith("Unterminated string")):
                    raise ValueError(error.msg) from error
            else:
                # A number may go on behind the buffer: 1 is the beginning of 1.5e3.
                cut = isinstance(value, int | float) and end >= len(self._text) - _LONGEST_CUT
                if self._ended or (end < len(self._text) and not cut):
                    self._start = end
                    return value
            self._read(size)
            size = max(size, len(self._text))  # twice the text: parsed again a few times only

    def _read(self, size: int) -> None:
        block = self._stream.read(size)
        self._ended = not block
        self._text = self._text[self._start :] + self._decoder.decode(block, final=not block)
        self._start = 0
