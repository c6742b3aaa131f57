"""Tables of plain text, the same on a terminal and in a pipe.

Not rich's: it cuts or wraps cells to the width of the console.
"""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], align: str, *, first_width: int = 0) -> str:
    """Rows of cells as lines, columns two spaces apart.

    Args:
        rows: The rows, of one length; a heading is one of them.
        align: A letter per column: `l` for left, `r` for right.
        first_width: Least width of the first column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(widths[0], first_width)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        ).rstrip()
        for row in rows
    )
