"""The documents of records, and the split by content."""

import pytest

from mhc_lightning.data.documents import (
    Document,
    ReadingOptions,
    Skipped,
    is_held_out,
    record_documents,
)
from mhc_lightning.data.record_text import BadRecord
from mhc_lightning.errors import UserError

RECORDS: list[tuple[int, object]] = [
    (1, {"text": "a"}),
    (3, {"body": "b"}),
    (4, {"text": None}),
    (5, BadRecord("is no JSON")),
    (7, {"text": "c"}),
]


def test_a_bad_record_ends_the_run_or_is_counted_with_the_first_named() -> None:
    skipped = Skipped()
    place = "line {} of x.jsonl".format
    reading = ReadingOptions(skip_bad_records=True)
    documents = list(record_documents(RECORDS, place, reading, skipped))
    assert documents == [Document(b"a", False), Document(b"c", False)]
    assert (skipped.bad_records, skipped.empty_documents) == (2, 1)
    assert skipped.first_bad_record.startswith("line 3 of x.jsonl has no field 'text' but 'body'")
    with pytest.raises(UserError, match=r"^line 3 of x\.jsonl has no .*on_bad_record=skip$"):
        list(record_documents(RECORDS, place, ReadingOptions(), Skipped()))


def test_what_was_skipped_adds_up_and_the_first_bad_record_stays() -> None:
    total = Skipped(1, 2, 0, "", 1)
    total.add(Skipped(1, 1, 3, "row 1", 2))
    total.add(Skipped(0, 0, 1, "row 9", 0))
    assert total == Skipped(2, 3, 4, "row 1", 3)


def test_the_split_is_a_stable_share_of_the_documents() -> None:
    documents = [f"document {number}".encode() for number in range(4000)]
    held_out = [is_held_out(document, 0.1) for document in documents]
    assert 320 < sum(held_out) < 480
    assert held_out == [is_held_out(document, 0.1) for document in documents]
    # A larger share keeps what a smaller one held out.
    assert all(is_held_out(d, 0.2) for d, held in zip(documents, held_out, strict=True) if held)
    assert not any(is_held_out(document, 0.0) for document in documents)
