"""Evidence: spans of sub-layers, those above a bound, and the first process's values."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mhc_lightning.callbacks.alarm.evidence import (
    first_process_values,
    spans,
    sub_layers_above,
)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([0, 1], "0 to 1"), ([0, 3, 4, 5, 7, 9, 10], "0, 3 to 5, 7, 9 to 10")],
)
def test_numbers_in_a_row_are_a_span(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text


def test_sub_layers_above_a_bound_or_not_finite() -> None:
    gains = {0: 1.0, 10: 3.0, 2: math.nan, 3: 2.0, 4: math.inf}
    sample = {"gain": math.inf, **{f"gain/layer_{k}": v for k, v in gains.items()}}
    sample["other/layer_1"] = 9.0
    assert sub_layers_above(sample, "gain", 2.0) == [2, 4, 10]
    assert sub_layers_above(sample, "gain", None) == [2, 4]


@pytest.mark.parametrize("failed", [False, True])
def test_values_of_one_process_are_its_own(failed: bool) -> None:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(strategy=strategy, world_size=1)
    values, any_failed = first_process_values(trainer, {"a": torch.tensor(0.5), "b": 2.0}, failed)
    assert (values, any_failed) == ({"a": 0.5, "b": 2.0}, failed)
