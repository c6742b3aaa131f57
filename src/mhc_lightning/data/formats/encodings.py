"""Text in UTF-16 and UTF-32, recognised and turned into UTF-8 as it is read."""

import codecs
from typing import BinaryIO

from mhc_lightning.data.formats.streams import BUFFER_BYTES, BlockStream
from mhc_lightning.errors import UserError

# Control characters without tabs, line ends, and the codes of terminals.
CONTROL_BYTES = bytes({*range(32), 127} - {*b"\t\n\v\f\r\b\x1b"})
LARGEST_CONTROL_SHARE = 0.05  # of a text's bytes; in compressed data, a tenth


def wide_encoding(sample: bytes) -> str:
    """The encoding of UTF-16 or UTF-32 text, else an empty string.

    Without a mark, most high bytes of such a text are zero.
    """
    for encoding, mark in (
        ("UTF-32", codecs.BOM_UTF32_LE),  # its mark begins with that of UTF-16
        ("UTF-32", codecs.BOM_UTF32_BE),
        ("UTF-16", codecs.BOM_UTF16_LE),
        ("UTF-16", codecs.BOM_UTF16_BE),
    ):
        if sample.startswith(mark) and decodes(sample, encoding):
            return encoding
    for encoding, zeros in (("UTF-16LE", sample[1::2]), ("UTF-16BE", sample[::2])):
        if len(zeros) > 8 and zeros.count(0) > 0.7 * len(zeros) and decodes(sample, encoding):
            return encoding
    return ""


def decodes(sample: bytes, encoding: str) -> bool:
    """True if bytes are the beginning of a text in an encoding, with few control characters."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return False
    return sum(map(text.count, map(chr, CONTROL_BYTES))) <= LARGEST_CONTROL_SHARE * len(text)


def utf8_of(sample: bytes, encoding: str) -> bytes:
    """The beginning of a text in UTF-8; a character that is cut off is left out."""
    return codecs.getincrementaldecoder(encoding)("ignore").decode(sample).encode()


class Utf8Stream(BlockStream):
    """A text in another encoding, read as UTF-8 without a byte-order mark.

    Args:
        stream: The bytes of the text.
        encoding: A name that Python knows; with a mark in the text, `UTF-16` or `UTF-32`.
        name: Name of the input, for the error message.
    """

    def __init__(self, stream: BinaryIO, encoding: str, name: str) -> None:
        super().__init__()
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._encoding = encoding
        self._name = name

    def next_block(self) -> bytes | None:
        """See `BlockStream`.

        Raises:
            UserError: The bytes are no text in this encoding.
        """
        data = self._stream.read(BUFFER_BYTES)
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise UserError(
                f"input {self._name} begins like {self._encoding} text but is not"
                f" ({error.reason}); convert it to UTF-8, or leave it out"
            ) from error
        return text.encode("utf-8") if data or text else None
