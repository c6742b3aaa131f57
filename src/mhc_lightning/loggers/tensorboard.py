"""The logger of TensorBoard event files: resuming leaves each step once."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mhc_lightning.files.run_layout import EVENT_FILES
from mhc_lightning.loggers.event_files import EventFile, drop_events_after
from mhc_lightning.loggers.hyper_parameters import declare


class TensorBoard(TensorBoardLogger):
    """TensorBoard event files straight in the run folder.

    Resuming removes the points after the checkpoint from the files themselves, so that no reader
    sees a step twice, and marks the restart for a TensorBoard that is running.

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
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Show them in the tab HPARAMS, beside the run's losses."""
        declare(self.experiment, params)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `SummaryWriter`."""
        if self._experiment is None:
            file_writer = super().experiment._get_file_writer()
            self._file = Path(file_writer.event_writer._file_name)
            file_writer.event_writer.close()
            file_writer.event_writer = EventFile(self._file)
        return self._experiment

    @rank_zero_only
    def save(self) -> None:
        """Write the events to the file."""
        self.experiment.flush()

    @rank_zero_only
    def resume_from(self, step: int) -> None:
        """Remove the events after `step`, and the hyper-parameters of the run's earlier parts."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer = self.experiment._get_file_writer()
        for file in sorted(Path(self.log_dir).glob(EVENT_FILES)):
            if file.name != self._file.name:
                drop_events_after(step, file)
        restart = Event(session_log=SessionLog(status=SessionLog.START))
        writer.add_event(restart, step + 1)
        writer.flush()
