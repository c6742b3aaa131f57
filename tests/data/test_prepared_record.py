"""Damage to `prepared.json` is noticed."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from mhc_lightning.data import PreparedData
from mhc_lightning.data.prepared_record import PreparedRecord


def test_a_record_is_read_as_it_was_written(prepared: PreparedData) -> None:
    assert PreparedRecord.from_json(prepared.record.to_json()) == prepared.record
    reordered = json.dumps(json.loads(prepared.record.to_json()), sort_keys=True)
    assert PreparedRecord.from_json(reordered) == prepared.record


def test_no_flipped_bit_goes_unnoticed(prepared: PreparedData) -> None:
    text = prepared.record.to_json().encode()
    for position in range(0, len(text), 17):
        data = bytearray(text)
        data[position] ^= 1 << position % 7
        try:
            found = PreparedRecord.from_json(bytes(data))
        except ValueError:
            continue
        assert found == prepared.record, data[position - 20 : position + 20]  # white space


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["counts"]["train"].update(tokens=r["counts"]["train"]["tokens"] + 1),
        lambda r: r["counts"]["validation"].update(bytes=5),
        lambda r: r["chunks"]["train"][1].update(tokens=r["chunks"]["train"][1]["tokens"] - 1),
        lambda r: r["chunks"]["train"][1].update(offset=48),
        lambda r: r["chunks"]["train"][1].update(size=r["chunks"]["train"][1]["size"] - 2),
        lambda r: r["chunks"]["train"][1].update(sha256="0" * 64),
        lambda r: r["chunks"]["train"].reverse(),
        lambda r: r["chunks"]["train"].pop(),
        lambda r: r.update(dtype="uint32"),
        lambda r: r.update(content="0" * 64),
        lambda r: r["tokenizer"].update(vocab_size=357),
        lambda r: r["tokenizer"].update(kind="bites"),
    ],
)
def test_a_record_without_a_checksum_may_not_contradict_itself(
    earlier_record: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    PreparedRecord.from_json(json.dumps(earlier_record))
    change(earlier_record)
    with pytest.raises(ValueError, match="it is damaged: "):
        PreparedRecord.from_json(json.dumps(earlier_record))
