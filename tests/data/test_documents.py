"""Documents in JSON Lines, their bytes, and the split by content."""

import pytest

from mhc_lightning.data.documents import is_held_out, jsonl_document, text_bytes
from mhc_lightning.errors import UserError


def test_jsonl_lines_give_their_field() -> None:
    assert jsonl_document('{"text": "hé\\n"}'.encode(), "text", str) == "hé\n".encode()
    assert jsonl_document(b'{"text": null}', "text", str) == b""
    assert jsonl_document(b'{"text": "\xff"}', "text", str) == b"\xff"
    for line, message in (
        (b"{", r"line 7 of /x\.jsonl is no JSON"),
        (b'{"body": "a", "id": 1}', r"line 7 .* no field 'text' but 'body', 'id'"),
        (b'["a"]', "no field 'text' but no fields at all"),
        (b'{"text": 5}', "is int, not text"),
        (b'{"text": "a", "deep": ' + b"[" * 10**5, "line 7 of /x.jsonl is no JSON"),
    ):
        with pytest.raises(UserError, match=message):
            jsonl_document(line, "text", lambda: "line 7 of /x.jsonl")


def test_lone_surrogates_are_kept_as_bytes() -> None:
    assert text_bytes("a\udcffb") == b"a\xffb"
    assert text_bytes("a\ud800") == b"a\xed\xa0\x80"
    assert text_bytes("é\ud800 \udcff\udcfe") == "é".encode() + b"\xed\xa0\x80 \xff\xfe"


def test_the_split_is_a_stable_share_of_the_documents() -> None:
    documents = [f"document {number}".encode() for number in range(4000)]
    held_out = [is_held_out(document, 0.1) for document in documents]
    assert 320 < sum(held_out) < 480
    assert held_out == [is_held_out(document, 0.1) for document in documents]
    # A larger share keeps what a smaller one held out.
    assert all(is_held_out(d, 0.2) for d, held in zip(documents, held_out, strict=True) if held)
    assert not any(is_held_out(document, 0.0) for document in documents)
