"""Bits per byte from losses."""

import math
import os

import pytest
from bits import bits_per_byte, xz_bits_per_byte


def test_a_uniform_byte_model_needs_eight_bits():
    assert bits_per_byte(math.log(256), num_tokens=10, num_bytes=10) == pytest.approx(8)


def test_tokens_of_several_bytes_share_their_cost_and_those_of_none_add_theirs():
    assert bits_per_byte(math.log(2), num_tokens=30, num_bytes=120) == pytest.approx(0.25)
    assert bits_per_byte(math.log(2), num_tokens=11, num_bytes=10) == pytest.approx(1.1)


def test_xz_cannot_shrink_noise_and_shrinks_repetition():
    assert 8 <= xz_bits_per_byte(os.urandom(20_000)) < 8.2
    assert xz_bits_per_byte(b"to be or not to be, " * 1000) < 0.1
