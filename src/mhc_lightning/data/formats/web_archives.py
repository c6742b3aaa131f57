"""Documents of a WARC file: records that are plain text, such as those of Common Crawl's WET files.

Pages of HTML are left out, and counted: text has to be extracted from them first.
"""

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from mhc_lightning.data.formats.streams import Bounded
from mhc_lightning.errors import UserError

_WITH_CONTENT = ("conversion", "resource", "response")
_BLOCK_BYTES = 1 << 16


def web_records(
    stream: BinaryIO, name: str, max_expansion: float
) -> Iterator[tuple[int, bytes | None]]:
    """The contents of the records that may be documents, numbered from 1 over all records.

    Records of the types `conversion`, `resource` and `response` may be documents; the others say
    how the archive was made. A text in another charset than UTF-8 that its record names is
    converted.

    Args:
        stream: The archive, decompressed.
        name: Name of the input, for error messages.
        max_expansion: See `compression.decompressed`; a response may be compressed again.

    Yields:
        The number of the record, and its text; None for content that is not plain text.

    Raises:
        UserError: warcio is not installed, or the archive is damaged or cut short.
    """
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError as error:
        raise UserError(
            f'input {name} is a WARC file; to read it, `pip install "mhc-lightning[formats]"`'
        ) from error
    number = 0
    # What warcio reads of a response that is cut short within its headers, it takes for the end.
    archive = ArchiveIterator(stream, no_record_parse=True)
    try:
        for record in archive:
            number += 1
            if archive.err_count:
                raise _broken(name, number - 1, "its length is not what it says")
            length = int(record.rec_headers.get_header("Content-Length"))
            if record.rec_type in _WITH_CONTENT:
                text = _text(record, name, length, max_expansion)
                _check_complete(record, name, number, length)
                yield number, text
            else:
                _check_complete(record, name, number, length)
        if archive.err_count:
            raise _broken(name, number, "its length is not what it says")
    except (ArchiveLoadFailed, ValueError, TypeError) as error:
        raise _broken(name, number + 1, " ".join(str(error).split())) from error


def _check_complete(record: Any, name: str, number: int, length: int) -> None:
    while record.raw_stream.read(_BLOCK_BYTES):
        pass
    if record.raw_stream.limit:
        raise _broken(name, number, f"the file ends within its {length} bytes")


def _text(record: Any, name: str, length: int, max_expansion: float) -> bytes | None:
    """The content of a record that is plain text, else None."""
    content_type = record.rec_headers.get_header("Content-Type") or ""
    if record.rec_type == "response":
        try:
            record.http_headers = _http_parser().parse(record.raw_stream)
        except EOFError:  # no content at all
            return None
        content_type = record.http_headers.get_header("Content-Type") or ""
    kind, _, parameters = content_type.partition(";")
    if kind.strip().lower() != "text/plain":
        return None
    content = Bounded(record.content_stream(), name, length, max_expansion)
    data = io.BufferedReader(content).read()
    charset = parameters.lower().partition("charset=")[2].split(";")[0].strip(" \"'")
    if charset and charset not in ("utf-8", "utf8"):
        try:
            return data.decode(charset).encode()
        except (LookupError, UnicodeError):
            return data
    return data


def _http_parser() -> Any:
    from warcio.statusandheaders import StatusAndHeadersParser

    return StatusAndHeadersParser(["HTTP/1.0", "HTTP/1.1"], verify=False)


def _broken(name: str, number: int, reason: str) -> UserError:
    return UserError(
        f"record {number} of the WARC file {name} is broken ({reason}); repair the file or leave it"
        " out"
    )
