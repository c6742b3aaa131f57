"""A document, its text as bytes, and the split it belongs to.

A plain-text file is one document; a record (a line of JSON Lines, a row of a table) is one
document. Invalid UTF-8 and NUL bytes are kept.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from mhc_lightning.data.record_text import BadRecord, RecordText
from mhc_lightning.data.text_cuts import TextCuts
from mhc_lightning.errors import UserError

HASHED_BYTES = 1 << 20  # the beginning of a document, which decides its split


@dataclass(frozen=True)
class Document:
    """A document, or a part of one that is too long to hold at once.

    Attributes:
        data: The bytes.
        held_out: True in the validation split, False in the training split.
        begins: True if the document begins with this part.
        ends: True if the document ends with this part.
        proven_cut: False if the document is cut after this part where the tokens of the parts may
            differ from those of the whole, see `TextCuts`.
    """

    data: bytes
    held_out: bool
    ends: bool = True
    proven_cut: bool = True
    begins: bool = True


@dataclass(frozen=True)
class ReadingOptions:
    """How documents are read from the input.

    Attributes:
        text: The text of a record.
        validation_fraction: Share of the documents that is held out.
        skip_bad_records: Leave out records without text; else the first one ends the run.
        max_expansion: A compressed file may unpack to so many times its size.
        include: Patterns of the members of archives to take, see `find_input_files`.
        exclude: Patterns of members to leave out.
        as_text: Patterns of members that are plain text whatever they look like.
        cuts: Where the tokenizer allows a long text to be cut.
    """

    text: RecordText = field(default_factory=RecordText)
    validation_fraction: float = 0.0
    skip_bad_records: bool = False
    max_expansion: float = 200.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    as_text: tuple[str, ...] = ()
    cuts: TextCuts = field(default_factory=TextCuts)


@dataclass
class Skipped:
    """Counts of input that was left out.

    Attributes:
        binary_files: Binary files in folders and archives.
        empty_documents: Documents of zero bytes, or with null for a text.
        bad_records: Records without text, left out as `on_bad_record=skip` says.
        first_bad_record: Place of the first of them, and why it is bad.
        other_web_records: Records of WARC files that are no plain text.
    """

    binary_files: int = 0
    empty_documents: int = 0
    bad_records: int = 0
    first_bad_record: str = ""
    other_web_records: int = 0

    def add(self, other: "Skipped") -> None:
        """Add the counts of input that comes after this."""
        self.binary_files += other.binary_files
        self.empty_documents += other.empty_documents
        self.bad_records += other.bad_records
        self.first_bad_record = self.first_bad_record or other.first_bad_record
        self.other_web_records += other.other_web_records


@dataclass
class ReadingLog:
    """What was found while documents were read.

    Attributes:
        skipped: Input that was left out.
        members: Files in archives, and what each was taken for.
    """

    skipped: Skipped = field(default_factory=Skipped)
    members: list[tuple[str, str]] = field(default_factory=list)


def is_held_out(content: bytes, validation_fraction: float) -> bool:
    """True if a document belongs to the validation split; its first MiB alone decides.

    So the split is stable, and exact copies of a document are always in the same split.
    """
    digest = hashlib.blake2b(content[:HASHED_BYTES], digest_size=8).digest()
    return int.from_bytes(digest, "big") < validation_fraction * 2**64


def record_documents(
    records: Iterable[tuple[int, object]],
    place: Callable[[int], str],
    reading: ReadingOptions,
    skipped: Skipped,
) -> Iterator[Document]:
    """The documents of records.

    Args:
        records: Numbers and records; a `BadRecord` stands for one that cannot be read.
        place: Names the record of a number, for error messages.
        reading: What the text is, and what becomes of a record without one.
        skipped: Counts records that are left out.

    Raises:
        UserError: A record has no text, and is not to be skipped.
    """
    for number, record in records:
        try:
            if isinstance(record, BadRecord):
                raise record
            data = reading.text.of(record)
        except BadRecord as bad:
            if not reading.skip_bad_records:
                raise UserError(
                    f"{place(number)} {bad}; or leave out such records with on_bad_record=skip"
                ) from bad
            skipped.bad_records += 1
            skipped.first_bad_record = skipped.first_bad_record or f"{place(number)} {bad}"
            continue
        if data:
            yield Document(data, is_held_out(data, reading.validation_fraction))
        else:
            skipped.empty_documents += 1
