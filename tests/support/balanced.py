"""A few cases that together take every value of every parameter equally often."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest


def balanced(count: int, **values: Sequence[Any]) -> pytest.MarkDecorator:
    """Run a test on `count` cases, always the same ones.

    Each parameter's values are repeated as often as needed and shuffled by themselves, so that they
    meet in ever new combinations and none of them is left out by chance.

    Args:
        count: Number of cases, at least that of the longest list.
        **values: By parameter of the test, its values.
    """
    shuffled = []
    for name, choices in values.items():
        assert count >= len(choices), name
        column = (list(choices) * math.ceil(count / len(choices)))[:count]
        random.Random(name).shuffle(column)
        shuffled.append(column)
    return pytest.mark.parametrize(list(values), list(zip(*shuffled, strict=True)))
