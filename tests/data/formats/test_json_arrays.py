"""JSON arrays item by item: the same items as of a whole parse, in bounded memory."""

import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhc_lightning.data.formats import json_arrays
from mhc_lightning.data.formats.json_arrays import array_items
from mhc_lightning.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def items(data: bytes) -> list[object]:
    numbered = list(array_items(io.BytesIO(data), "x.json"))
    assert [number for number, _ in numbered] == list(range(1, len(numbered) + 1))
    return [item for _, item in numbered]


@given(
    st.lists(VALUES, max_size=8),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.sampled_from([1, 2, 5, 64, 1 << 16]),
)
def test_items_are_those_of_the_whole(
    values: list[object], indent: int | None, ascii_only: bool, block: int
) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode(
        "utf-8", "surrogatepass"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_arrays, "_BLOCK_BYTES", block)
        if b"\xed" not in data:  # a lone surrogate is no UTF-8, and kept as bytes
            assert items(data) == values
        assert len(items(b"\xef\xbb\xbf \n" + data + b" \n")) == len(values)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b'{"text": "a"}', "at item 0 .*does not begin with a bracket"),
        (b"", "at item 0 .it does not begin with a bracket"),
        (b'[{"text": "a"}, {"text": ', "at item 2 .Expecting value"),
        (b'[{"text": "a"}', "at item 1 .the file ends after it"),
        (b'[{"text": "a"}, {"text": "b', "at item 2 .Unterminated string"),
        (b'[{"text": "a"} {"text": "b"}]', "at item 1 .there is '{' after it"),
        (b'[{"text": "a"}, {"text" "b"}, ' + b" " * 10**6 + b"]", "at item 2 .Expecting ':'"),
        (b'[{"text": "a"},]', "at item 2 .Expecting value"),
        (b'["a"] ["b"]', "at item 1 .text follows the end"),
        (b"[" * 10**5, "at item 1 .*recursion"),
    ],
)
def test_a_broken_array_is_named_with_its_item(data: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=rf"JSON array of input x\.json is broken {reason}"):
        items(data)


def test_a_mistake_is_found_without_reading_on() -> None:
    stream = io.BytesIO(b'[{"text": "a"}, {"text" 5}' + b', {"text": "b"}' * 10**6)
    with pytest.raises(UserError, match="item 2"):
        list(array_items(stream, "x"))
    assert stream.tell() < 1 << 18


def test_memory_does_not_grow_with_the_array(tmp_path: Path, read: Callable[..., object]) -> None:
    path = tmp_path / "x.json"
    with path.open("w") as file:
        file.write("[")
        for number in range(30_000):
            file.write(f'{"," if number else ""}\n{{"text": "number {number} {"x" * 900}"}}')
        file.write("]")
    with path.open("rb") as opened:
        tracemalloc.start()
        try:
            assert sum(1 for _ in array_items(opened, "x")) == 30_000
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert path.stat().st_size > 25e6 and peak < 3e6, peak
