"""Text from token ids that come one at a time."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable


class TextStream(ABC):
    """Decodes ids one at a time; holds back the bytes of an unfinished character."""

    @abstractmethod
    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""

    @abstractmethod
    def flush(self) -> str:
        """The text still held back, after the last id (U+FFFD for an unfinished character)."""


class ByteStream(TextStream):
    """Text of bytes; ids from 256 on stand for no byte."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """See `TextStream.push`."""
        return self._decoder.decode(bytes([token])) if 0 <= token < 256 else ""

    def flush(self) -> str:
        """See `TextStream.flush`."""
        return self._decoder.decode(b"", final=True)


class JsonStream(TextStream):
    """Decodes the last few ids again at each step: the text of an id depends on earlier ids.

    The text of the first `_settled` ids of the window has been returned. The other ids wait until
    they end with a whole character.

    Args:
        decode: The text of ids.
        after: The ids before the first: decoders leave out a space at the beginning of a text.
    """

    _LONGEST_CHARACTER = 4  # bytes of UTF-8, so at most as many byte-level tokens

    def __init__(self, decode: Callable[[Iterable[int]], str], after: Iterable[int] = ()) -> None:
        self._decode = decode
        self._window = list(after)[-self._LONGEST_CHARACTER :]
        self._settled = len(self._window)

    def push(self, token: int) -> str:
        """See `TextStream.push`."""
        self._window.append(token)
        unfinished = self._decode(self._window).endswith("\ufffd")
        if unfinished and len(self._window) - self._settled < self._LONGEST_CHARACTER:
            return ""
        return self.flush()

    def flush(self) -> str:
        """See `TextStream.flush`."""
        before = self._decode(self._window[: self._settled])
        text = self._decode(self._window)[len(before) :]
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        return text
