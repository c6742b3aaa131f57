"""A document, its text as bytes, and the split it belongs to.

A plain-text file is one document; a line of JSON Lines is one document. Invalid UTF-8 and NUL bytes
are kept.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from mhc_lightning.errors import UserError

HASHED_BYTES = 1 << 20  # the beginning of a document, which decides its split
_SURROGATE = re.compile("([\ud800-\udfff])")


@dataclass(frozen=True)
class Document:
    """A document, or a part of one that is too long to hold at once.

    Attributes:
        data: The bytes.
        held_out: True in the validation split, False in the training split.
        ends: True if the document ends with this part.
    """

    data: bytes
    held_out: bool
    ends: bool = True


@dataclass
class Skipped:
    """Counts of input that was left out.

    Attributes:
        binary_files: Binary files in folders.
        empty_documents: Documents of zero bytes.
    """

    binary_files: int = 0
    empty_documents: int = 0


def is_held_out(content: bytes, validation_fraction: float) -> bool:
    """True if a document belongs to the validation split; its first MiB alone decides.

    So the split is stable, and exact copies of a document are always in the same split.
    """
    digest = hashlib.blake2b(content[:HASHED_BYTES], digest_size=8).digest()
    return int.from_bytes(digest, "big") < validation_fraction * 2**64


def jsonl_document(line: bytes, field: str, place: Callable[[], str]) -> bytes:
    """The document in one line of JSON Lines; empty if its field is null.

    Args:
        line: The line; invalid UTF-8 in it is kept.
        field: The key of the text.
        place: Names the line, for error messages.

    Raises:
        UserError: The line is not a JSON object, has no such field, or the field is not a string.
    """
    try:
        row = json.loads(line.decode("utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place()} is no JSON ({error}); fix or remove it") from error
    if not isinstance(row, dict) or field not in row:
        keys = ", ".join(map(repr, row)) if isinstance(row, dict) else "no fields at all"
        raise UserError(f"{place()} has no field {field!r} but {keys}; name one with text_field=…")
    text = row[field]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise UserError(
            f"field {field!r} in {place()} is {type(text).__name__}, not text;"
            " name another with text_field=…"
        )
    return text_bytes(text)


def text_bytes(text: str) -> bytes:
    """UTF-8 of a string; escaped bytes are restored, other lone surrogates kept (invalid UTF-8)."""
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        parts = _SURROGATE.split(text)  # text and surrogates in turn
        return b"".join(
            part.encode(
                "utf-8", "surrogateescape" if "\udc80" <= part <= "\udcff" else "surrogatepass"
            )
            for part in parts
        )
