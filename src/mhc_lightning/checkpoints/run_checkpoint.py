"""The callback that decides when a run is saved, so that it resumes exactly, whatever ends it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mhc_lightning.checkpoints.forms import Sharded, read_folders_too
from mhc_lightning.checkpoints.loop_counters import counters_at_step_end, is_last_of_epochs
from mhc_lightning.checkpoints.names import BEST, LAST, saved_steps
from mhc_lightning.checkpoints.random_state import gather_random_states, restore_random_state
from mhc_lightning.checkpoints.retention import Retention, remove_leftovers
from mhc_lightning.checkpoints.saver import CheckpointSaver
from mhc_lightning.checkpoints.termination import Termination
from mhc_lightning.errors import UserError
from mhc_lightning.files.atomic import point_link, require_links


class RunCheckpoint(Checkpoint):
    """Saves checkpoints, moves the relative links `last` and `best`, and deletes old checkpoints.

    A checkpoint is a file, `step_<n>.ckpt`, or a folder, `step_<n>`, to which each process writes
    its own shards. A run resumes from either, in any layout.

    A checkpoint is the state at the end of an optimizer step. It is written after the step's
    metrics have reached the loggers, so that a resumed run never misses a row. Besides Lightning's
    own state it holds the random number generators of every process, and whether the validation of
    that step was still pending (resuming then runs it again).

    A checkpoint is saved

    - every `every_n_steps` steps, and at the end of the run;
    - on SIGTERM: at the next optimizer step, or within a validation at once (at its end if a
      callback has swapped the weights: averages, say);
    - when a validation is among the best;
    - when `save_at_step_end` was called.

    A state with a value that is not finite, in a trained parameter or an optimizer's state of it,
    is never saved: the run ends with `NonFiniteLossError`, and earlier checkpoints stay. If writing
    fails, training goes on with a warning, and earlier checkpoints stay.

    Args:
        folder: The folder of the checkpoints; created if missing.
        every_n_steps: Optimizer steps between checkpoints; None saves only at the end.
        keep_last: Number of the newest to keep; None keeps all. With two or more, one is left to
            fall back to if the newest is damaged later.
        keep_every: Keep for good the checkpoints at multiples of this many steps.
        keep_best: Number of the best by `monitor` to keep; 0 ignores it.
        monitor: A logged validation metric.
        mode: `min` if a lower value is better, else `max`.
        sharded: True for folders, False for files; `auto` takes folders if no process holds all
            of the model, and if checkpoints are written asynchronously.
        asynchronous: True to go on training while a checkpoint is written, from a copy in CPU
            memory. One is written at a time, and the end of the run waits for it.

    Raises:
        UserError: A setting is out of range, or two exclude each other.
    """

    def __init__(
        self,
        folder: str | Path,
        every_n_steps: int | None = 500,
        keep_last: int | None = 2,
        keep_every: int | None = None,
        keep_best: int = 0,
        monitor: str = "val/loss",
        mode: str = "min",
        sharded: Sharded = "auto",
        asynchronous: bool = False,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(
                f"checkpoint.every_n_steps is {every_n_steps}; it must be at least 1,"
                " or null for only one at the end"
            )
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.retention = Retention(keep_last, keep_every, keep_best, monitor, mode)
        self.saver = CheckpointSaver(self.folder, self.retention, sharded, asynchronous)
        self._seen_step = -1  # the last optimizer step whose end was seen
        self._snapshot: dict[str, Any] | None = None  # state at the end of _seen_step
        self._due = False
        self._asked = False  # by `save_at_step_end`
        self._termination = Termination()
        self._random_state: dict[str, Any] | None = None

    @property
    def dirpath(self) -> str:
        """The folder, under the name that Lightning's own checkpoint callback uses."""
        return str(self.folder)

    def save_at_step_end(self) -> None:
        """Save the running step at its end; every process must call this.

        That checkpoint, and the newest one before it, are kept for good.
        """
        self._asked = True

    # ---- the life of a run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the form; create the folder, and delete what a killed run left half-written."""
        read_folders_too(trainer.strategy)
        if stage != "fit":
            return
        self.saver.set_up(trainer.strategy)
        if not trainer.is_global_zero:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            require_links(self.folder, (LAST, BEST))
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints to {self.folder}: {error.strerror or error};"
                " choose another output_dir or fix its permissions"
            ) from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for SIGTERM, let `best` name the best one, and restore random generators."""
        self._termination.listen()
        self._seen_step = trainer.global_step
        if trainer.is_global_zero:
            self.saver.point_best()
        if self._random_state is not None:
            restore_random_state(self._random_state, pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the previous step if it is due, now that its metrics are logged."""
        self.saver.settle(wait=False)
        if self._due:
            self._write(trainer, validation_pending=False)
        self._end_if_asked(trainer)
        self._snapshot = None
        if self._random_state is not None and trainer.global_step == self._seen_step:
            # Iterators made since the training started have drawn from the generators.
            restore_random_state(self._random_state, pl_module.device)
            self._random_state = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """At the end of an optimizer step, take a snapshot if a checkpoint may be written of it."""
        step = trainer.global_step
        if step == self._seen_step:  # only another micro-batch
            return
        self._seen_step = step
        self._termination.agree(trainer)
        last = step >= trainer.max_steps > 0 or trainer.should_stop or is_last_of_epochs(trainer)
        self._due = last or self._termination.agreed or step % (self.every_n_steps or step + 1) == 0
        if self._asked:
            self._asked, self._due = False, True
            written = {*saved_steps(self.folder), self.saver.saved_step}  # or still being written
            before = sorted(earlier for earlier in written if 0 <= earlier < step)
            self.retention.kept |= {step, *before[-1:]}
        epoch_loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if self._due or epoch_loop._should_check_val_fx(fetcher):
            # The snapshot holds the live tensors: nothing changes them before it is written.
            self._snapshot = self.saver.take(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After SIGTERM in the step just ended, save it before its validation, and end the run."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._random_state = None  # a validation run again draws from the restored generators
        self._leave_validation_if_asked(trainer)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After SIGTERM within a validation, save the validated step, and end the run."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._termination.agree(trainer)
            self._leave_validation_if_asked(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the step if it is due, or among the best."""
        if self._snapshot is None:
            return
        self._snapshot["random_states"] = gather_random_states(trainer)  # the validation drew
        if self._is_among_best(trainer) or self._termination.agreed:
            self._due = True
        if self._due:
            self._write(trainer, validation_pending=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the step if it is due: callbacks may change the weights at the end of a run."""
        if self._due and self._snapshot is not None:
            self._write(trainer, validation_pending=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last step, and wait for all writing."""
        self.saver.settle()
        if self._snapshot is not None and self.saver.saved_step != self._seen_step:
            self._write(trainer, validation_pending=False)
        self.saver.settle()
        self._snapshot = None
        self._end_if_asked(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Wait for a checkpoint in writing; its failure does not hide the exception."""
        try:
            self.saver.settle()
        except Exception as error:
            rank_zero_warn(f"a checkpoint could not be saved: {error}", category=RuntimeWarning)

    # ---- the content of a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The state of retention: scores, and the steps kept for good."""
        return self.retention.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore retention, as far as its checkpoints still exist."""
        self.retention.load_state_dict(state_dict, set(saved_steps(self.folder)))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the generators of every process."""
        checkpoint["random_states"] = gather_random_states(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue from `checkpoint`: loggers drop later rows, and `last` names it."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        states = checkpoint.get("random_states", [])
        if len(states) == trainer.world_size:
            self._random_state = states[trainer.global_rank]
        self.saver.resume_from(Path(str(trainer.ckpt_path)), checkpoint["global_step"])
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if hasattr(logger, "resume_from"):
                logger.resume_from(checkpoint["global_step"])
        if self.saver.resumed_from is not None:
            point_link(self.folder / LAST, self.saver.resumed_from.name)

    # ---- saving

    def _write(self, trainer: pl.Trainer, *, validation_pending: bool) -> None:
        snapshot, self._due = self._snapshot, False
        assert snapshot is not None
        snapshot["loops"] = counters_at_step_end(snapshot["loops"], validation_pending)
        snapshot["callbacks"][self.state_key] = self.state_dict()
        self.saver.save(trainer, snapshot)

    def _is_among_best(self, trainer: pl.Trainer) -> bool:
        if self.retention.keep_best == 0:
            return False
        monitor = self.retention.monitor
        value = trainer.callback_metrics.get(monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise UserError(
                f"checkpoint.monitor is {monitor!r}, which the validation does not log"
                f" (it logs: {known})"
            )
        self.saver.settle()  # so that all processes agree on what is there
        return self.retention.admit(self._seen_step, float(value))

    # ---- stopping

    def _leave_validation_if_asked(self, trainer: pl.Trainer) -> None:
        over = self._seen_step >= trainer.max_steps > 0  # nothing could resume this validation
        if not self._termination.agreed or self._snapshot is None or over:
            return
        if self.saver.is_as_taken(trainer):  # else at the validation's end
            self._write(trainer, validation_pending=True)
            self._end_if_asked(trainer)

    def _end_if_asked(self, trainer: pl.Trainer) -> None:
        if self._termination.agreed:
            self.saver.settle()
            self._termination.end(trainer)
