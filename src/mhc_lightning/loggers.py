"""The two loggers of every run: `metrics.csv`, and TensorBoard event files; both resume exactly."""

import csv
import io
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mhc_lightning.checkpoint_files import write_text_atomically

STEP = "step"


class MetricsCSV(Logger):
    """Writes every scalar to one table: a row per optimizer step, a column per tag.

    Values that arrive for the same step (training, then validation) share its row. Numbers keep
    their full precision: reading them back gives the same bits. The file is complete after every
    call; a process killed in between leaves at worst a cut last line, which
    `resume_from` removes. A tag seen for the first time adds a column, at the end of the header.

    Args:
        folder: Where `metrics.csv` goes.
        name: The file's name.
    """

    def __init__(self, folder: str | Path, name: str = "metrics.csv") -> None:
        super().__init__()
        self.path = Path(folder) / name
        self._columns: list[str] | None = None  # None: the file has not been looked at
        self._row: dict[str, str] = {}
        self._row_start = 0  # where the row being filled begins in the file, in bytes

    @property
    def name(self) -> str:
        """Name of the table."""
        return self.path.name

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
            metrics: Values by tag; what is not a single number is left out.
            step: Optimizer steps completed; None means the row being filled.
        """
        columns = self._open()
        values = {tag: text for tag, v in metrics.items() if (text := _number(v)) is not None}
        if not values:
            return
        current = int(self._row[STEP]) if self._row else 0
        step = current if step is None else int(step)
        if self._row and step < current:
            self._merge_into_earlier(step, values)
            return
        if step != current or not self._row:
            self._row = {STEP: str(step)}
            self._row_start = self.path.stat().st_size
        self._row.update(values)
        new = [tag for tag in values if tag not in columns]
        if new:
            rows = [row for row in self._rows() if row[STEP] != self._row[STEP]]
            columns += new
            self._rewrite([*rows, self._row])
            return
        with open(self.path, "r+b") as file:
            file.seek(self._row_start)
            file.write(self._line(self._row))
            file.truncate()

    @rank_zero_only
    def resume_from(self, step: int) -> None:
        """Drop the rows after `step`, and a line that a killed process left cut."""
        self._columns, self._row = None, {}
        if self.path.exists():
            self._open()
            self._rewrite([row for row in self._rows() if int(row[STEP]) <= step])

    def _open(self) -> list[str]:
        """The columns, after mending or making the file the first time."""
        if self._columns is not None:
            return self._columns
        self._columns = [STEP]
        if self.path.exists():
            with open(self.path, encoding="utf-8", newline="") as file:
                self._columns = next(csv.reader(file), [STEP])
            rows = list(self._rows())
            self._rewrite(rows)  # without a cut last line
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite([])
        return self._columns

    def _rows(self) -> list[dict[str, str]]:
        """Complete rows of the file, as text by column, empty cells left out."""
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole))
        columns = len(reader.fieldnames or [])
        rows = []
        for row in reader:
            if len(row) == columns and None not in row.values() and row[STEP].isdigit():
                rows.append({tag: text for tag, text in row.items() if text != ""})
        return rows

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Replace the file; the last of `rows` becomes the row being filled."""
        assert self._columns is not None
        lines = [self._line(dict(zip(self._columns, self._columns, strict=True)))]
        lines += [self._line(row) for row in rows]
        write_text_atomically(self.path, b"".join(lines).decode())
        self._row = dict(rows[-1]) if rows else {}
        self._row_start = sum(map(len, lines)) - (len(lines[-1]) if rows else 0)

    def _merge_into_earlier(self, step: int, values: dict[str, str]) -> None:
        assert self._columns is not None
        rows = {int(row[STEP]): row for row in self._rows()}
        rows.setdefault(step, {STEP: str(step)}).update(values)
        self._columns += [tag for tag in values if tag not in self._columns]
        self._rewrite([rows[key] for key in sorted(rows)])

    def _line(self, row: Mapping[str, str]) -> bytes:
        assert self._columns is not None
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([row.get(tag, "") for tag in self._columns])
        return line.getvalue().encode()


class TensorBoard(TensorBoardLogger):
    """TensorBoard event files straight in the run folder.

    Resuming removes the points after the checkpoint from the files themselves, so no reader sees
    a step twice, and marks the restart for a TensorBoard that is watching.

    Args:
        folder: Where the event files go.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=str(folder), name="", version="", default_hp_metric=False)

    @property
    def log_dir(self) -> str:
        """The folder of the event files."""
        return str(self.save_dir)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the run's settings are in `config.yaml`."""

    @rank_zero_only
    def save(self) -> None:
        """Flush the events to disk."""
        self.experiment.flush()

    @rank_zero_only
    def resume_from(self, step: int) -> None:
        """Remove the events after `step`."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer = self.experiment._get_file_writer()
        assert writer is not None
        own = Path(writer.event_writer._file_name)
        for file in sorted(Path(self.log_dir).glob("events.out.tfevents.*")):
            if file.name != own.name:
                _drop_events_after(step, file)
        restart = Event(session_log=SessionLog(status=SessionLog.START))
        writer.add_event(restart, step + 1)
        writer.flush()


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


def _drop_events_after(step: int, file: Path) -> None:
    """Rewrite an event file without the events of later steps (and a cut last one)."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    kept: list[bytes] = []
    dropped = False
    for record in RawEventFileLoader(str(file)).Load():
        if Event.FromString(record).step > step:
            dropped = True
        else:
            kept.append(record)
    length = sum(len(record) + 16 for record in kept)  # a record's framing takes 16 bytes
    if not dropped and length == file.stat().st_size:
        return
    aside = file.with_name(f".aside-{file.name}")
    with open(aside, "wb") as stream:
        writer = RecordWriter(stream)
        for record in kept:
            writer.write(record)
        writer.flush()
    os.replace(aside, file)
