"""Hashes of n-grams, position by position in Python's unbounded integers, from the papers' text."""

from collections.abc import Sequence
from typing import NamedTuple


class Spelling(NamedTuple):
    """How tokens are read before they are hashed.

    Attributes:
        classes: The class of each token.
        pad: The class in place of a missing token.
        end: The token that ends a document; None to look back across documents.
    """

    classes: Sequence[int]
    pad: int
    end: int | None


def suffix(spelling: Spelling, tokens: Sequence[int], position: int, length: int) -> list[int]:
    """The classes of the last `length` tokens up to a position, latest first."""
    found = [spelling.classes[tokens[position]]]
    while len(found) < length:
        before = position - len(found)
        if before < 0 or tokens[before] == spelling.end:
            break
        found.append(spelling.classes[tokens[before]])
    return found + [spelling.pad] * (length - len(found))


def as_int64(value: int) -> int:
    """The int64 that a whole number wraps around to."""
    return (value + 2**63) % 2**64 - 2**63


def multiply_xor(gram: Sequence[int], multipliers: Sequence[int]) -> int:
    """The hash of arXiv 2601.07372: products, each wrapped to int64, joined by xor."""
    mixed = 0
    for token, multiplier in zip(gram, multipliers, strict=False):
        mixed ^= as_int64(token * multiplier)
    return mixed


def polynomial(gram: Sequence[int], base: int) -> int:
    """The number whose digits to a base are the tokens (arXiv 2501.16975)."""
    return sum(token * base**power for power, token in enumerate(gram))


def is_prime(number: int) -> bool:
    """By trial division."""
    return number > 1 and all(number % k for k in range(2, int(number**0.5) + 1))


def prime_sizes(num_tables: int, sizes: Sequence[int], num_heads: int) -> list[list[int]]:
    """The primes of each table: each size's search begins anew, and skips primes taken before."""
    taken: list[int] = []
    for _ in range(num_tables):
        for size in sizes:
            candidate = size
            for _ in range(num_heads):
                while candidate in taken or not is_prime(candidate):
                    candidate += 1
                taken.append(candidate)
    per_table = len(sizes) * num_heads
    return [taken[k * per_table : (k + 1) * per_table] for k in range(num_tables)]
