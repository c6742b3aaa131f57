"""Bits per byte: one measure for a compressor, a count-based model and a neural one."""

import lzma
import math


def bits_per_byte(nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """Turn a mean loss into bits per byte of text.

    Args:
        nats_per_token: Mean cross-entropy, as ``val/loss`` gives it.
        num_tokens: Number of tokens it is the mean of.
        num_bytes: Number of bytes of text that these tokens stand for (an end-of-document token
            stands for none, and its cost counts all the same).

    Returns:
        Bits per byte.
    """
    return nats_per_token * num_tokens / (num_bytes * math.log(2))


def xz_bits_per_byte(text: bytes) -> float:
    """Bits per byte of what ``xz -9`` makes of the text, container included."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
