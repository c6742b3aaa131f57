"""The logger of `metrics.csv`: one table of all scalars; resuming leaves each step once."""

import csv
import io
import math
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from mhc_lightning.errors import UserError
from mhc_lightning.files.atomic import write_text_atomically

STEP = "step"


class MetricsCSV(Logger):
    """Writes every scalar to one table: a row per optimizer step, a column per tag.

    Values of the same step (training, then validation) share its row. Numbers keep their full
    precision: reading them back gives the same bits. The file is complete after every call. A
    process killed during a call leaves at worst a truncated last line, which `resume_from` removes.
    A new tag adds a column at the end of the header.

    Args:
        folder: The folder of `metrics.csv`.
        name: The file's name.
    """

    def __init__(self, folder: str | Path, name: str = "metrics.csv") -> None:
        super().__init__()
        self.path = Path(folder) / name
        self._columns: list[str] | None = None  # None: the file has not been read
        # The row being filled, after rows before it that could not be written yet.
        self._tail: list[dict[str, str]] = []
        self._tail_start = 0  # the byte of the file where these rows begin
        self._stale = False  # the whole file has to be replaced
        self._failing = False  # the last write failed

    @property
    def name(self) -> str:
        """Empty: files that Lightning puts under this name, such as checkpoints, go to `folder`."""
        return ""

    @property
    def version(self) -> str:
        """Empty: there is one table per run folder."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the table."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Nothing: the run's settings are in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add scalars to the row of `step`.

        Args:
            metrics: Values by tag; a value that is not a single number is left out.
            step: Optimizer steps completed; None means the row being filled.
        """
        columns = self._open()
        values = {tag: text for tag, v in metrics.items() if (text := _number(v)) is not None}
        if not values:
            return
        current = int(self._tail[-1][STEP]) if self._tail else 0
        step = current if step is None else int(step)
        try:
            if step >= current:
                self._fill(step, values, columns)
            else:
                self._merge_into_earlier(step, values, columns)
            self._failing = False
        except OSError as error:
            if not self._failing:
                rank_zero_warn(
                    f"could not write {self.path}: {error.strerror or error}; the run goes on, and"
                    " its rows are written when that is possible again",
                    category=RuntimeWarning,
                )
            self._failing = True

    @rank_zero_only
    def resume_from(self, step: int) -> None:
        """Drop the rows after `step`, and a last line that a killed process left truncated.

        Raises:
            UserError: The file has no column `step`.
        """
        self._columns, self._tail = None, []
        if self.path.exists():
            self._open()
            self._rewrite([row for row in self._rows() if int(row[STEP]) <= step])

    def _open(self) -> list[str]:
        """The columns; the first call makes the file, or removes its truncated last line.

        Raises:
            UserError: The file has no column `step`.
        """
        if self._columns is not None:
            return self._columns
        if self.path.exists():
            with open(self.path, encoding="utf-8", errors="replace", newline="") as file:
                columns = next(csv.reader(file), [STEP])
            if STEP not in columns:
                raise UserError(
                    f"{self.path} has no column {STEP!r}, so its rows cannot be continued; move the"
                    " file away, or choose another folder"
                )
            self._columns = columns
            self._rewrite(self._rows())  # without a truncated last line
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._columns = [STEP]
            self._rewrite([])
        return self._columns

    def _rows(self) -> list[dict[str, str]]:
        """Complete rows of the file, as text by column, empty cells left out."""
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole))
        columns = len(reader.fieldnames or [])
        rows = []
        for row in reader:
            if len(row) == columns and None not in row.values() and row[STEP].isdigit():
                rows.append({tag: text for tag, text in row.items() if text != ""})
        return rows

    def _fill(self, step: int, values: dict[str, str], columns: list[str]) -> None:
        """Add values to the row of `step`, the last or a new one, and write it."""
        if not self._tail or step != int(self._tail[-1][STEP]):
            if not self._failing:
                self._tail_start, self._tail = self.path.stat().st_size, []
            self._tail.append({STEP: str(step)})
        self._tail[-1].update(values)
        new = [tag for tag in values if tag not in columns]
        columns += new
        if new or self._stale:
            unwritten = {row[STEP] for row in self._tail}
            self._rewrite([row for row in self._rows() if row[STEP] not in unwritten] + self._tail)
            return
        with open(self.path, "r+b") as file:
            file.seek(self._tail_start)
            file.write(b"".join(map(self._line, self._tail)))
            file.truncate()
        self._keep_last_row()

    def _merge_into_earlier(self, step: int, values: dict[str, str], columns: list[str]) -> None:
        rows = {int(row[STEP]): row for row in [*self._rows(), *self._tail]}
        rows.setdefault(step, {STEP: str(step)}).update(values)
        columns += [tag for tag in values if tag not in columns]
        self._rewrite([rows[key] for key in sorted(rows)])

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Replace the file; the last of `rows` becomes the row being filled."""
        assert self._columns is not None
        header = self._line(dict(zip(self._columns, self._columns, strict=True)))
        lines = b"".join([header, *map(self._line, rows)])
        self._tail, self._tail_start, self._stale = list(rows), len(header), True
        write_text_atomically(self.path, lines.decode())
        self._stale = False
        self._keep_last_row()

    def _keep_last_row(self) -> None:
        """After a write: only the last row may still grow."""
        self._tail_start += sum(len(self._line(row)) for row in self._tail[:-1])
        self._tail = self._tail[-1:]

    def _line(self, row: Mapping[str, str]) -> bytes:
        assert self._columns is not None
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([row.get(tag, "") for tag in self._columns])
        return line.getvalue().encode()


def _number(value: Any) -> str | None:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            return None
        value = value.item()
    if isinstance(value, bool | int):
        return str(int(value))
    if isinstance(value, float) or hasattr(value, "__float__"):
        number = float(value)
        return repr(number) if math.isfinite(number) else str(number)
    return None
