"""Formats numbers for people: gains, losses, bytes, durations, axis ticks; and values for JSON."""

import math
from collections.abc import Sequence
from typing import Any

_MINUS = "−"


def format_number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits: 0.0412, 3,012, 1.5e−7, NaN, infinite.

    An exponent appears only below 1e-4 and from 1e7 on.
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else f"{_MINUS}infinite"
    size = abs(value)
    if size and not 1e-4 <= size < 1e7:
        mantissa, _, exponent = f"{value:.{max(digits - 2, 0)}e}".partition("e")
        return _with_minus(f"{mantissa}e{int(exponent)}")
    integer_digits = math.floor(math.log10(size)) + 1 if size else 1
    return _with_minus(f"{value:,.{max(digits - integer_digits, 0)}f}")


def format_gain(value: float) -> str:
    """An Amax gain: 1, 1.004, 22.5, 3,012."""
    if not math.isfinite(value):
        return format_number(value)
    if abs(value) < 0.01:
        return format_number(value, 2)
    if abs(value) < 10:
        return _with_minus(f"{value:.3f}".rstrip("0").rstrip("."))
    return format_number(value).removesuffix(".0")


def format_cell(value: float) -> str:
    """A number for the cell of a drawn matrix, in a few characters: 0.03, −12.3, 3012, 3e+04."""
    size = abs(value)
    digits = ".2f" if size < 9.995 else ".1f" if size < 999.95 else ".0f"
    text = format(value, digits if size < 99999.5 or not math.isfinite(value) else ".0e")
    return text.lstrip("-") if text == "-0.00" else _with_minus(text)


def format_tick(value: float) -> str:
    """A number beside an axis: 0.02, 1,000, 1e−6."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e5):
        text = f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    else:
        text = f"{round(value, 6):,g}"
    return _with_minus(text)


def format_difference(value: float, digits: int = 4) -> str:
    """A difference with its sign: +0.0120, −0.0210."""
    return _with_minus(f"{value:+.{digits}f}")


def format_interval(low: float, high: float, digits: int = 4) -> str:
    """An interval of differences: −0.0210 to −0.0102."""
    return f"{format_difference(low, digits)} to {format_difference(high, digits)}"


def format_count(number: int) -> str:
    """A large count with its unit: 9.18B, 25.9M, 12k, 640."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return str(number)


def format_bytes(size: float) -> str:
    """Bytes in binary units: 12.3 GiB, 640 B."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.1f} {unit}" if unit != "B" else f"{size:.0f} B"


def format_seconds(seconds: float) -> str:
    """A short time to three digits: 1.23 s, 45.6 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def format_duration(seconds: float) -> str:
    """The duration of a run: 1.2 s, 1 min 01 s, 25 h 01 min, 4.7 days (from two days on)."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:,.1f} days"
    minutes, seconds_left = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds_left:02.0f} s" if minutes else f"{seconds_left:.1f} s"


def format_steps(first: int, last: int) -> str:
    """Optimizer steps: step 7, or steps 7 to 90."""
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def format_sub_layers(first: int | None, last: int | None) -> str:
    """Sub-layers: sub-layer 3, or sub-layers 38 to 44; empty where they are not known."""
    if first is None:
        return ""
    return f"sub-layer {first}" if first == last else f"sub-layers {first} to {last}"


def format_list(words: Sequence[str]) -> str:
    """Words in a sentence: a; a and b; a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def json_value(value: Any) -> Any:
    """Nested values for JSON; NaN and infinity, which JSON lacks, become strings."""
    if isinstance(value, dict):
        return {key: json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _with_minus(text: str) -> str:
    return text.replace("-", _MINUS)
