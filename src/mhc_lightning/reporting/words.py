"""Numbers as people read them."""

import math

from mhc_lightning.reporting.gains import Extreme
from mhc_lightning.reporting.statistics import Estimate

MINUS = "−"


def number(value: float, digits: int = 3) -> str:
    """To so many significant digits, without an exponent where that is readable: 0.0412, 3,012."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else f"{MINUS}infinite"
    size = abs(value)
    if size and not 1e-4 <= size < 1e7:
        mantissa, _, exponent = f"{value:.{max(digits - 2, 0)}e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    before = math.floor(math.log10(size)) + 1 if size else 1
    text = f"{value:,.{max(digits - before, 0)}f}"
    return text.replace("-", MINUS)


def gain(value: float) -> str:
    """A gain: 1, 1.004, 22.5, 3,012."""
    if not math.isfinite(value):
        return number(value)
    if abs(value) < 10:
        text = f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) >= 0.01 else number(value, 2)
        return text.replace("-", MINUS)
    return number(value).removesuffix(".0")


def difference(value: float, digits: int = 4) -> str:
    """With its sign: +0.0120, −0.0210."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", MINUS)


def interval(estimate: Estimate, digits: int = 4) -> str:
    """The 95% interval of an estimate: −0.0210 to −0.0102."""
    assert estimate.low is not None and estimate.high is not None
    return f"{difference(estimate.low, digits)} to {difference(estimate.high, digits)}"


def steps(first: int, last: int) -> str:
    """Step 7, or steps 7 to 90."""
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def sub_layers(extreme: Extreme) -> str:
    """In sub-layer 3; in sub-layers 38 to 44; nothing where it is not known."""
    first, last = extreme.first_layer, extreme.last_layer
    if first is None:
        return ""
    return f" in sub-layer {first}" if first == last else f" in sub-layers {first} to {last}"


def memory(size: float) -> str:
    """Bytes in binary units: 12.3 GiB."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.1f} {unit}" if unit != "B" else f"{size:.0f} B"


def listed(words: list[str]) -> str:
    """A, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
