"""UTF-16 and UTF-32 become UTF-8, wherever a block ends."""

import codecs
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from mhc_lightning.data.formats import encodings
from mhc_lightning.data.formats.encodings import Utf8Stream, wide_encoding
from mhc_lightning.errors import UserError

TEXT = "aé日🎉\r\n" * 40


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 16])
@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32", "UTF-16LE", "UTF-16BE"])
def test_text_stays_the_same(monkeypatch: pytest.MonkeyPatch, encoding: str, block: int) -> None:
    monkeypatch.setattr(encodings, "BUFFER_BYTES", block)
    stream = Utf8Stream(io.BytesIO(TEXT.encode(encoding)), encoding, "x")
    assert stream.read() == TEXT.encode()


def test_a_text_that_only_begins_in_an_encoding_is_refused(
    tmp_path: Path, read: Callable[..., object]
) -> None:
    for name, data, reason in (
        ("half.txt", TEXT.encode("utf-16")[:-1], "truncated data"),
        ("pair.txt", ("a" * 70_000).encode("utf-16") + b"\x00\xd8a\x00", "illegal UTF-16"),
        ("big.txt", ("a" * 70_000).encode("utf-32") + b"\xff\xff\xff\xff", "not in range"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(
            UserError, match=f"{name} begins like UTF-.* text but is not .*{reason}"
        ):
            read(path)


def test_only_text_counts_as_wide() -> None:
    assert wide_encoding(TEXT.encode("utf-8")) == ""
    assert wide_encoding(codecs.BOM_UTF16_LE + bytes(range(256))) == ""
    assert wide_encoding(b"\xff\xfe\x00\xd8\x00\xd8") == ""  # surrogates without their partners
    assert wide_encoding("plain words, sixteen bits".encode("utf-16-be")) == "UTF-16BE"
