"""Records of conversations, read as records of texts are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mhc_lightning.data.conversations import FIELDS, conversation_of, to_bytes
from mhc_lightning.data.file_formats import MARKED_TEXT, PLAIN_TEXT, WARC
from mhc_lightning.data.record_text import RecordText
from mhc_lightning.data.text_files import TextFile
from mhc_lightning.errors import UserError


@dataclass(frozen=True)
class ConversationText(RecordText):
    """The fields of a conversation; its text is what `conversations.to_bytes` makes of them."""

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields; a record has some of them."""
        return FIELDS

    def of(self, record: object) -> bytes:
        """See `RecordText`."""
        return to_bytes(conversation_of(record))

    def missing(self, names: Iterable[str]) -> str:
        """See `RecordText`."""
        messages, *pair = FIELDS
        columns = set(names)
        return "" if messages in columns or columns.issuperset(pair) else messages

    def remedy(self, names: Iterable[str]) -> str:
        """See `RecordText`."""
        messages, *pair = FIELDS
        return (
            f"conversations are in {messages!r}, or in {' and '.join(map(repr, pair))}; rename the"
            " fields, or prepare texts without conversations=true"
        )

    def lacking(self, record: dict[str, Any]) -> str:
        """See `RecordText`."""
        return self.missing(record)


def require_records(files: Sequence[TextFile]) -> None:
    """Refuse files that hold texts and no records.

    Raises:
        UserError: Names one of them.
    """
    for file in files:
        if file.format in (PLAIN_TEXT, MARKED_TEXT, WARC):
            raise UserError(
                f"conversations are records, as of JSON Lines, and {file.path} is {file.format};"
                " leave it out with exclude=…, or prepare it without conversations=true"
            )
