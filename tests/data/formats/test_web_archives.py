"""WARC files: the records that are plain text, and nothing else."""

import gzip
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from mhc_lightning.data.documents import ReadingLog
from mhc_lightning.errors import UserError

Read = Callable[..., tuple[list[bytes], ReadingLog]]


def web_archive(zipped: bool) -> bytes:
    stream = io.BytesIO()
    writer = WARCWriter(stream, gzip=zipped)

    def add(kind: str, content: bytes, content_type: str, http: str | None = None) -> None:
        headers = None
        if http is not None:
            fields = [("Content-Type", content_type)]
            if http == "gzip":
                content = gzip.compress(content)
                fields.append(("Content-Encoding", "gzip"))
            headers = StatusAndHeaders("200 OK", fields, protocol="HTTP/1.1")
            content_type = "application/http; msgtype=response"
        record = writer.create_warc_record(
            "http://example.com/",
            kind,
            payload=io.BytesIO(content),
            length=len(content),
            warc_content_type=content_type,
            http_headers=headers,
        )
        writer.write_record(record)

    writer.write_record(writer.create_warcinfo_record("x.warc", {"software": "a test"}))
    add("conversion", "the first é\n\nof two lines".encode(), "text/plain")
    add("response", b"<html>a page</html>", "text/html", "plain")
    add("response", b"a response", "text/plain; charset=utf-8", "plain")
    add("response", b"a packed response " * 9, "text/plain", "gzip")
    add("response", "café".encode("latin-1"), 'text/plain; charset="ISO-8859-1"', "plain")
    add("resource", b"a resource", "text/plain")
    add("resource", b"\x89PNG", "image/png")
    add("metadata", b"not a document", "text/plain")
    add("conversion", b"", "text/plain")
    return stream.getvalue()


EXPECTED = [
    "the first é\n\nof two lines".encode(),
    b"a response",
    b"a packed response " * 9,
    "café".encode(),
    b"a resource",
]


@pytest.mark.parametrize(
    "name, zipped", [("a.warc.gz", True), ("a.warc", False), ("a.warc.wet.gz", True), ("a", True)]
)
def test_records_of_plain_text_are_documents(
    tmp_path: Path, read: Read, name: str, zipped: bool
) -> None:
    path = tmp_path / name
    path.write_bytes(web_archive(zipped))
    documents, log = read(path)
    assert documents == EXPECTED
    assert (log.skipped.other_web_records, log.skipped.empty_documents) == (2, 1)


def test_an_archive_compressed_as_a_whole_is_read_too(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "a.warc.gz"
    path.write_bytes(gzip.compress(web_archive(False)))
    assert read(path)[0] == EXPECTED


def test_a_cut_archive_is_refused_wherever_it_is_cut(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "a.warc"
    data = web_archive(False)
    whole = 0
    for size in range(100, len(data) - 4, 7):
        path.write_bytes(data[:size])
        try:
            documents, _ = read(path)
        except UserError as error:
            assert "WARC" in str(error) and "broken" in str(error)
        else:
            whole += 1
            assert data[size:].lstrip(b"\r\n").startswith(b"WARC/")
            assert documents == EXPECTED[: len(documents)]
    assert whole < 10


def test_a_wrong_length_is_refused(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "a.warc"
    record = (
        b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Type: text/plain\r\n"
        b"Content-Length: %d\r\n\r\nhello\r\n\r\n"
    )
    for first, second in ((3, 5), (5, 3), (5, 50), (-1, 5)):
        path.write_bytes(record % first + record % second)
        with pytest.raises(UserError, match=r"record \d of the WARC file .*a\.warc is broken"):
            read(path)
    path.write_bytes(record % 5 + b"something else\r\n" * 9)
    with pytest.raises(UserError, match="is broken"):
        read(path)


def test_without_the_library(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.warc"
    path.write_bytes(web_archive(False))
    monkeypatch.setitem(sys.modules, "warcio.archiveiterator", None)
    with pytest.raises(UserError, match=r'a WARC file; .* install "mhc-lightning\[formats\]"`'):
        read(path)
