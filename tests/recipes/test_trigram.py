"""The trigram model that the quickstart compares with."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trigram import Trigram

VOCABULARY = 5
TEXT = [0, 1, 2, 0, 1, 3, 0, 1, 2, 2, 0, 1, 2, 1, 0, 1, 3, 3, 0, 1, 2, 0, 0, 2, 1, 1, 0, 1]


def discounts(counts: Counter) -> list[float]:
    """Chen and Goodman's equation 17, with the guards that tiny texts need."""
    n = [sum(value == k for value in counts.values()) for k in range(5)]
    share = n[1] / max(n[1] + 2 * n[2], 1)
    return [0.0] + [max(0.0, k - (k + 1) * share * n[k + 1] / max(n[k], 1)) for k in (1, 2, 3)]


def brute_force(text: list[int], context: tuple[int, ...], symbol: int) -> float:
    """Modified Kneser-Ney straight from its definition, by dictionaries and recursion."""
    orders: dict[int, Counter[tuple[int, ...]]] = {}
    orders[2] = Counter(zip(text, text[1:], text[2:], strict=False))
    for length in (1, 0):  # a shorter context counts in how many longer ones it was seen
        orders[length] = Counter(key[1:] for key in orders[length + 1])

    def probability(context: tuple[int, ...]) -> float:
        counts = orders[len(context)]
        following = {key: value for key, value in counts.items() if key[:-1] == context}
        shorter = probability(context[1:]) if context else 1 / VOCABULARY
        if not following:
            return shorter
        discount = discounts(counts)
        total = sum(following.values())
        released = sum(discount[min(value, 3)] for value in following.values())
        count = following.get((*context, symbol), 0)
        return (count - discount[min(count, 3)] + released * shorter) / total

    return probability(context)


def distribution(model: Trigram, before: int, last: int) -> np.ndarray:
    symbols = np.arange(VOCABULARY)
    return model.probability(np.full_like(symbols, before), np.full_like(symbols, last), symbols)


def test_equals_the_definition():
    model = Trigram(np.array(TEXT), VOCABULARY)
    for before in range(VOCABULARY):
        for last in range(VOCABULARY):
            expected = [brute_force(TEXT, (before, last), s) for s in range(VOCABULARY)]
            assert distribution(model, before, last) == pytest.approx(expected, abs=1e-14)


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=3, max_size=200))
def test_every_context_gives_a_distribution(text):
    model = Trigram(np.array(text), VOCABULARY)
    for before in range(VOCABULARY):
        for last in range(VOCABULARY):
            given_context = distribution(model, before, last)
            assert given_context.min() >= 0
            assert given_context.sum() == pytest.approx(1, abs=1e-12)


def test_bits_add_up_over_the_text_after_its_first_two_symbols():
    model = Trigram(np.array(TEXT), VOCABULARY)
    text = [3, 0, 1, 2, 4]
    expected = sum(
        -math.log2(brute_force(TEXT, context, symbol))
        for context, symbol in [((3, 0), 1), ((0, 1), 2), ((1, 2), 4)]
    )
    assert model.bits(np.array(text)) == pytest.approx(expected, abs=1e-12)


def test_uses_both_symbols_of_its_context():
    cycle = np.tile([0, 1, 0, 2], 100)  # after 0 alone, 1 and 2 are equally likely
    assert Trigram(cycle, VOCABULARY).bits(np.tile([0, 1, 0, 2], 50)) / 198 < 0.1
