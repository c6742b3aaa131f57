"""The text of a record: one of its fields, or several that a template joins.

A record is an object of JSON, a row of a table or of a dataset: a dictionary.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import Any

from mhc_lightning.errors import UserError

_SURROGATE = re.compile("([\ud800-\udfff])")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
_FIELDS_NAMED = 8
_TOKEN_COLUMN = "input_ids"  # of `datasets`


class BadRecord(Exception):  # noqa: N818  # what `on_bad_record` decides about
    """A record that holds no text; the message says why, to follow the record's place."""


@dataclass(frozen=True)
class RecordText:
    r"""The fields of a record that hold its text.

    Attributes:
        field: Name of the field. `data.text` is the field of this name or, without one, the field
            `text` of the object in the field `data`.
        template: A text with the names of fields in braces, which replaces `field`. `\n` is the end
            of a line, `\t` a tab, `\\` a backslash, `{{` a brace.

    Raises:
        UserError: The template cannot be understood.
    """

    field: str = "text"
    template: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None and not self.fields:
            raise UserError(
                f"text_template {self.template!r} names no field; write one in braces, as in"
                " '{title}\\n\\n{body}'"
            )

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, each once, in order."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    @cached_property
    def _parts(self) -> tuple[tuple[str, str | None], ...]:
        """Literal texts, each with the field that follows it; None where no field follows."""
        if self.template is None:
            return (("", self.field),)
        parts = []
        try:
            for literal, name, form, conversion in Formatter().parse(self.template):
                if name == "" or form or conversion:
                    raise ValueError("braces hold the name of a field and nothing else")
                parts.append((re.sub(r"\\[nt\\]", lambda m: _ESCAPES[m[0]], literal), name))
        except ValueError as error:
            raise UserError(
                f"text_template {self.template!r} cannot be understood ({error}); write the names"
                " of fields in braces, and a brace of the text twice"
            ) from error
        return tuple(parts)

    def of(self, record: object) -> bytes:
        """The text of a record; null counts as no text, and a string that is no object is itself.

        Raises:
            BadRecord: The record has no such field, or the field is not text.
        """
        if isinstance(record, str) and self.template is None:
            return text_bytes(record)
        if not isinstance(record, dict):
            raise BadRecord(f"is {_kind(record)}, not an object with fields")
        values = {name: self._value(record, name) for name in self.fields}
        if not any(values.values()):
            return b""
        return b"".join(
            text_bytes(literal) + (values[name] if name is not None else b"")
            for literal, name in self._parts
        )

    def missing(self, names: Iterable[str]) -> str:
        """The first field that is surely missing among the names of a table's columns, else ''."""
        columns = set(names)
        return next((f for f in self.fields if columns.isdisjoint((f, *_prefixes(f)))), "")

    def remedy(self, names: Iterable[str]) -> str:
        """What to do where a field is missing among these names, for messages."""
        remedy = "name one with text_field=… or text_template=…"
        if _TOKEN_COLUMN in names:
            remedy += (
                f"; tokens, as in {_TOKEN_COLUMN!r}, are not prepared: save them as a `datasets`"
                " folder (load_dataset(…).save_to_disk(…)) and train on it with data.path=…"
            )
        return remedy

    def reads(self, column: str) -> bool:
        """True if a column holds a field of the text, or an object with one."""
        return any(column in (name, *_prefixes(name)) for name in self.fields)

    def lacking(self, record: dict[str, Any]) -> str:
        """The first field that a record has not, else an empty string."""
        return next((name for name in self.fields if not _find(record, name)[0]), "")

    def _value(self, record: dict[str, Any], name: str) -> bytes:
        found, value = _find(record, name)
        if not found:
            raise BadRecord(f"has no field {name!r} but {field_names(record)}; {self._remedy}")
        if value is None:
            return b""
        if isinstance(value, str):
            return text_bytes(value)
        if isinstance(value, bytes):
            try:
                value.decode("utf-8")
            except UnicodeDecodeError:
                raise BadRecord(
                    f"has a field {name!r} of bytes that are not UTF-8, so not text; {self._remedy}"
                ) from None
            return value
        raise BadRecord(f"has a field {name!r} that is {_kind(value)}, not text; {self._remedy}")

    @property
    def _remedy(self) -> str:
        return "name one with text_field=…" if self.template is None else "mend text_template=…"


def field_names(record: Iterable[object]) -> str:
    """The first names of a record's fields, for messages."""
    names = list(record)
    more = f" and {len(names) - _FIELDS_NAMED} more" if len(names) > _FIELDS_NAMED else ""
    return ", ".join(repr(str(name)) for name in names[:_FIELDS_NAMED]) + more or "no fields"


def _find(record: dict[str, Any], name: str) -> tuple[bool, Any]:
    """Whether a record has a field, and its value; an object that is null has null fields."""
    if name in record:
        return True, record[name]
    for prefix, rest in _splits(name):
        if prefix in record:
            inner = record[prefix]
            if inner is None:
                return True, None
            if isinstance(inner, dict):
                found, value = _find(inner, rest)
                if found:
                    return True, value
    return False, None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """A dotted name cut at each of its dots."""
    for dot in re.finditer(r"\.", name):
        yield name[: dot.start()], name[dot.end() :]


def _prefixes(name: str) -> list[str]:
    return [prefix for prefix, _ in _splits(name)]


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def json_record(line: bytes) -> object:
    """One line of JSON Lines; invalid UTF-8 in it is kept.

    Raises:
        BadRecord: The line is no JSON.
    """
    try:
        return json.loads(line.decode("utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"is no JSON ({error}); fix or remove it") from error


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
