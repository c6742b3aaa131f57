"""Numbers for people: every formatter, at the borders of its forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from mhc_lightning import formatting

CASES: dict[str, list[tuple[Any, str]]] = {
    "format_number": [
        (0.04123, "0.0412"), (3012.3, "3,012"), (9.9951, "10.00"),
        (-1.5e-7, "−1.5e−7"),
        (0.0, "0.00"),
        (1e7, "1.0e7"), (math.nan, "NaN"), (-math.inf, "−infinite"),
    ],
    "format_gain": [
        (1.0, "1"), (1.0041, "1.004"), (1.6, "1.6"), (22.5134, "22.5"), (40.0, "40"),
        (3012.3, "3,012"), (0.0012, "0.0012"), (-2.5, "−2.5"), (math.inf, "infinite"),
    ],
    "format_cell": [
        (0.034, "0.03"), (-0.001, "0.00"), (-12.34, "−12.3"), (9.996, "10.0"), (509.1, "509.1"),
        (3012.3, "3012"), (-251234.0, "−3e+05"), (math.nan, "nan"), (-math.inf, "−inf"),
    ],
    "format_tick": [(0.02, "0.02"), (1000, "1,000"), (1e-6, "1e−6"), (-2e5, "−2e5"), (0, "0")],
    "format_difference": [(0.012, "+0.0120"), (-0.021, "−0.0210")],
    "format_count": [(640, "640"), (12_000, "12k"), (25_900_000, "25.9M"), (9.18e9, "9.18B")],
    "format_bytes": [
        (640, "640 B"), (1024, "1.0 KiB"), (1.5 * 2**30, "1.5 GiB"),
        (2**50, "1,024.0 TiB"),
    ],
    "format_seconds": [(1.234, "1.23 s"), (0.0456, "45.6 ms")],
    "format_duration": [
        (1.25, "1.2 s"), (61, "1 min 01 s"), (3725, "1 h 02 min"), (90061, "25 h 01 min"),
        (4.7 * 86400, "4.7 days"),
    ],
    "format_list": [
        ([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [(name, value, text) for name, cases in CASES.items() for value, text in cases],
)
def test_a_number_reads_so(name: str, value: Any, text: str) -> None:
    function: Callable[[Any], str] = getattr(formatting, name)
    assert function(value) == text


def test_spans_of_steps_and_sub_layers() -> None:
    assert formatting.format_steps(7, 7) == "step 7"
    assert formatting.format_steps(7, 1090) == "steps 7 to 1,090"
    assert formatting.format_sub_layers(3, 3) == "sub-layer 3"
    assert formatting.format_sub_layers(38, 44) == "sub-layers 38 to 44"
    assert formatting.format_sub_layers(None, None) == ""
    assert formatting.format_interval(-0.021, 0.5) == "−0.0210 to +0.5000"


def test_numbers_that_json_lacks_become_texts() -> None:
    given = {"a": [1.5, math.nan, (math.inf, None)], "b": True}
    assert formatting.json_value(given) == {"a": [1.5, "nan", ["inf", None]], "b": True}
