"""Parts of ZIP and tar archives: their members, each a file with a format of its own."""

import io
from collections.abc import Iterator
from dataclasses import dataclass

from mhc_lightning.data.documents import Document, ReadingLog, ReadingOptions
from mhc_lightning.data.file_formats import (
    ARCHIVES,
    BINARY,
    PLAIN_TEXT,
    TABLES,
    ZIP,
    FileFormat,
    sampled_format,
)
from mhc_lightning.data.formats.archives import (
    Member,
    tar_members,
    zip_members,
    zip_sizes,
)
from mhc_lightning.data.formats.compression import (
    COMPRESSION_GUESS,
    compression_of,
    damage_named,
    decompressed,
    ending_of,
)
from mhc_lightning.data.formats.streams import BUFFER_BYTES, Rewound
from mhc_lightning.data.input_patterns import is_chosen, is_visible, matches
from mhc_lightning.data.stream_documents import stream_documents
from mhc_lightning.data.text_files import TextFile, as_utf8, open_bytes, open_source
from mhc_lightning.errors import UserError

_UNPACK = "unpack the archive, and give the folder"


@dataclass(frozen=True)
class ArchivePart:
    """The members [start, stop) of an archive; `stop` is None for all of a tar archive.

    Attributes:
        size: Bytes of text, roughly.
        input_size: Bytes on disk, roughly.
    """

    file: TextFile
    size: int
    input_size: int
    start: int = 0
    stop: int | None = None

    def documents(self, reading: ReadingOptions, log: ReadingLog) -> Iterator[Document]:
        """See `WorkUnit`."""
        if self.stop is None:
            with open_bytes(self.file, reading.max_expansion) as stream:
                for member in tar_members(stream, self.file.path):
                    yield from _member_documents(self.file, member, reading, log)
            return
        with open_source(self.file, seek=True) as raw:
            for member in zip_members(
                raw, self.file.path, self.start, self.stop, reading.max_expansion
            ):
                yield from _member_documents(self.file, member, reading, log)


def archive_parts(file: TextFile, unit_bytes: int) -> Iterator[ArchivePart]:
    """An archive in parts of about `unit_bytes`; a tar archive is one part.

    Raises:
        UserError: The archive is damaged, encrypted, or has members that lead out of its folder.
    """
    if file.format != ZIP:
        guess = COMPRESSION_GUESS if file.compression else 1
        yield ArchivePart(file, file.size * guess, file.size)
        return
    with open_source(file, seek=True) as raw:
        sizes = zip_sizes(raw, file.path)
    scale = file.size / max(1, sum(sizes))
    start, size = 0, 0
    for member, member_bytes in enumerate(sizes):
        if size and size + member_bytes > unit_bytes:
            yield ArchivePart(file, size, int(size * scale), start, member)
            start, size = member, 0
        size += member_bytes
    yield ArchivePart(file, size, int(size * scale), start, len(sizes))


def _member_documents(
    archive: TextFile, member: Member, reading: ReadingOptions, log: ReadingLog
) -> Iterator[Document]:
    name, path = f"{archive.name}/{member.name}", f"{archive.path}/{member.name}"
    if not is_chosen(name, reading.include, reading.exclude) or not all(
        map(is_visible, member.name.split("/"))
    ):
        return
    with damage_named(path):
        beginning = member.stream.read(BUFFER_BYTES)
        compression = compression_of(member.name, beginning)
        stream = decompressed(
            io.BufferedReader(Rewound(beginning, member.stream)),
            compression,
            path,
            member.size,
            reading.max_expansion,
        )
        found, sample = sampled_format(stream, member.name, reading.text)
        if matches(name, reading.as_text):
            found = FileFormat(PLAIN_TEXT)
        elif found.name in (*ARCHIVES, *TABLES):
            found = FileFormat(found.name, _UNPACK)
        if found.conversion:
            ending = ending_of(member.name)
            raise UserError(
                f"{path} looks like {found.name}: {found.conversion}. Or leave it out with"
                f" exclude=['*{ending}'], or, if it is plain text, say as_text=['*{ending}']"
            )
        log.members.append((name, found.description))
        if found.name == BINARY:
            log.skipped.binary_files += 1
            return
        text = as_utf8(io.BufferedReader(Rewound(sample, stream)), found.encoding, path)
        yield from stream_documents(text, found.name, path, reading, log.skipped)
