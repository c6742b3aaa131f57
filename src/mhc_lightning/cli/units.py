"""Numbers as people read them."""


def in_units(size: int) -> str:
    """Bytes in binary units, as 12.3 GiB."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}" if unit != "B" else f"{size} B"


def in_seconds(seconds: float) -> str:
    """A time, as 1.23 s or 45.6 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
