"""TensorBoard's event files: written in whole records, cut back to a step on resuming.

`SummaryWriter(purge_step=...)` would only mark the restart. The points after it stay in the files,
and most readers show them twice. Its thread dies on a full disk.
"""

import io
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mhc_lightning.files.atomic import replacing
from mhc_lightning.loggers.hyper_parameters import is_declaration

_MAX_WAITING = 1 << 20  # bytes of records that wait for a flush
_MAX_UNSAVED = 1 << 24  # bytes kept while they cannot be written


class EventFile:
    """Appends records to an event file, in place of TensorBoard's own writer.

    TensorBoard's writer has a thread that dies at the first error and then blocks or fails the
    training. This one keeps the records that it cannot write, up to 16 MiB, and tries again at the
    next flush.

    Args:
        path: An existing event file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = io.BytesIO()
        self._failing = False

    def add_event(self, event: Any) -> None:
        """Add an `Event` record."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self._waiting).write(event.SerializeToString())
        if self._waiting.tell() > _MAX_WAITING and not self._failing:
            self.flush()

    def flush(self) -> None:
        """Append the waiting records to the file, all of them or none."""
        records = self._waiting.getvalue()
        if not records:
            return
        try:
            with open(self.path, "ab", buffering=0) as file:
                start = file.tell()
                try:
                    _write_all(file, records)
                except OSError:
                    file.truncate(start)
                    raise
        except OSError as error:
            if not self._failing:
                rank_zero_warn(
                    f"could not write {self.path.name}: {error.strerror or error};"
                    " the run goes on, and its points are written when that is possible again",
                    category=RuntimeWarning,
                )
            self._failing = True
            if len(records) > _MAX_UNSAVED:
                self._waiting = io.BytesIO()
            return
        self._waiting, self._failing = io.BytesIO(), False

    def close(self) -> None:
        """Write the waiting records."""
        self.flush()


def drop_events_after(step: int, file: Path) -> None:
    """Rewrite an event file without events of later steps, and without a truncated last event.

    Hyper-parameters go, too: those of the resumed run are in another file.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    shortened = io.BytesIO()
    writer = RecordWriter(shortened)
    for record in RawEventFileLoader(str(file)).Load():
        event = Event.FromString(record)
        if event.step <= step and not is_declaration(event):
            writer.write(record)
    if shortened.tell() == file.stat().st_size:
        return
    with replacing(file) as aside:
        aside.write_bytes(shortened.getvalue())


def _write_all(file: io.FileIO, data: bytes) -> None:
    """Write all bytes; a full disk may first take a part without an error."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
