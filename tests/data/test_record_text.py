"""The text of a record: nested fields, templates, and what is no text."""

import pytest

from mhc_lightning.data.record_text import BadRecord, RecordText, json_record, text_bytes
from mhc_lightning.errors import UserError


def test_a_line_of_json_lines_gives_its_field() -> None:
    text = RecordText()
    assert text.of(json_record('{"text": "hé\\n"}'.encode())) == "hé\n".encode()
    assert text.of(json_record(b'{"text": null}')) == b""
    assert text.of(json_record(b'{"text": "\xff"}')) == b"\xff"
    for line, message in (
        (b"{", "^is no JSON"),
        (b'{"body": "a", "id": 1}', "no field 'text' but 'body', 'id'; name one with text_field=…"),
        (b"{}", "no field 'text' but no fields"),
        (b'["a"]', "is list, not an object with fields"),
        (b'{"text": 5}', "is int, not text"),
        (b'{"text": "a", "deep": ' + b"[" * 10**5, "is no JSON"),
    ):
        with pytest.raises(BadRecord, match=message):
            text.of(json_record(line))


def test_a_dotted_name_is_a_field_or_a_path() -> None:
    text = RecordText("data.text")
    assert text.of({"data": {"text": "inside"}}) == b"inside"
    assert text.of({"data.text": "dotted", "data": {"text": "inside"}}) == b"dotted"
    assert text.of({"data": None}) == text.of({"data": {"text": None}}) == b""
    assert RecordText("a.b.c").of({"a.b": {"c": "x"}}) == RecordText("a.b.c").of(
        {"a": {"b.c": "x"}}
    )
    for record in ({"data": "text"}, {"data": {"body": "x"}}, {"text": "x"}, {"data": ["text"]}):
        with pytest.raises(BadRecord, match=r"no field 'data\.text'"):
            text.of(record)


def test_a_template_joins_fields() -> None:
    text = RecordText(template=r"# {title}\n\n{meta.body}\t{{x}}\\")
    assert text.fields == ("title", "meta.body")
    assert text.of({"title": "T", "meta": {"body": "B"}}) == b"# T\n\nB\t{x}\\"
    assert text.of({"title": None, "meta": {"body": "B"}}) == b"# \n\nB\t{x}\\"
    assert text.of({"title": None, "meta": {"body": ""}}) == b""
    with pytest.raises(BadRecord, match=r"no field 'meta\.body' .*; mend text_template=…"):
        text.of({"title": "T"})
    for template in ("no field", "{", "{a!r}", "{a:5}", "{}", "a}"):
        with pytest.raises(UserError, match="text_template"):
            RecordText(template=template)


def test_bytes_are_text_if_they_are_utf8() -> None:
    assert RecordText().of({"text": "é".encode()}) == "é".encode()
    with pytest.raises(BadRecord, match="bytes that are not UTF-8"):
        RecordText().of({"text": b"\xff"})


def test_a_string_is_its_own_text() -> None:
    assert RecordText().of("alone") == b"alone"
    with pytest.raises(BadRecord, match="is str, not an object"):
        RecordText(template="{a}").of("alone")


def test_columns_are_known_by_their_names_alone() -> None:
    text = RecordText(template="{a} {b.c.d}")
    assert text.missing(["a", "b"]) == text.missing(["a", "b.c", "x"]) == ""
    assert text.missing(["a", "c"]) == "b.c.d" and text.missing(["b"]) == "a"
    assert [name for name in ("a", "b", "b.c", "b.c.d", "c") if text.reads(name)] == [
        *("a", "b", "b.c", "b.c.d"),
    ]


def test_lone_surrogates_are_kept_as_bytes() -> None:
    assert text_bytes("a\udcffb") == b"a\xffb"
    assert text_bytes("a\ud800") == b"a\xed\xa0\x80"
    assert text_bytes("é\ud800 \udcff\udcfe") == "é".encode() + b"\xed\xa0\x80 \xff\xfe"
