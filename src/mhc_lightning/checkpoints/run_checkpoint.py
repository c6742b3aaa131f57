"""The callback that saves a run so that it resumes exactly, whatever ends it."""

import copy
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mhc_lightning.checkpoints.forms import Sharded, read_folders_too
from mhc_lightning.checkpoints.names import BEST, LAST, saved_steps
from mhc_lightning.checkpoints.random_state import capture_random_state, restore_random_state
from mhc_lightning.checkpoints.retention import Retention, remove_leftovers
from mhc_lightning.checkpoints.saver import CheckpointSaver
from mhc_lightning.errors import UserError
from mhc_lightning.files.atomic import point_link, require_links


class RunCheckpoint(Checkpoint):
    """Saves checkpoints, the relative links ``last`` and ``best``, and prunes old ones.

    A checkpoint is a file, ``step_<n>.ckpt``, or a folder of shards, ``step_<n>``, to which each
    process writes what it holds; a run goes on from either, in any layout.

    A checkpoint is the state at the end of an optimizer step. It is written after that step's
    metrics have reached the loggers, so a resumed run never misses a row. Beside what Lightning
    keeps, it holds the random number generators of every process, and whether the validation due
    at that step was still to come (it is then run again on resuming).

    It is saved every `every_n_steps` steps, at the end of the run, on SIGTERM (at the next
    optimizer step; within a validation, at once, or at its end if a callback has lent the module
    other weights for it), where a validation improves on the best, and where `save_at_step_end` was
    called.
    A state that is not finite, in a trained parameter or in what an optimizer keeps of it, is never
    saved: the run ends with `NonFiniteLossError` and what was saved before stays. If writing fails,
    training goes on with a warning and everything saved before stays.

    Args:
        folder: Where the files go; made if missing.
        every_n_steps: Optimizer steps between checkpoints; None saves only at the end.
        keep_last: How many of the newest to keep; None keeps all. Two or more leave one to fall
            back to should the newest be damaged later.
        keep_every: Keep for good those at multiples of this many steps.
        keep_best: How many to keep by `monitor`; 0 takes no notice of it.
        monitor: A logged validation metric.
        mode: ``min`` if less of it is better, else ``max``.
        sharded: Whether checkpoints are folders; ``auto`` makes them so where no process holds all
            of the model, and where they are written asynchronously.
        asynchronous: Whether training goes on while a checkpoint is written, from a copy in CPU
            memory. One is written at a time, and the run's end waits for it.

    Raises:
        UserError: a setting is out of range, or two do not go together.
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
        self.monitor = monitor
        self.retention = Retention(keep_last, keep_every, keep_best, mode)
        self.saver = CheckpointSaver(self.folder, self.retention, sharded, asynchronous)
        self._seen_step = -1  # the last optimizer step whose end was seen
        self._snapshot: dict[str, Any] | None = None  # state at the end of _seen_step
        self._due = False
        self._asked = False  # by `save_at_step_end`
        self._sigterm = False
        self._stopping = False  # all processes agreed to stop
        self._random_state: dict[str, Any] | None = None

    @property
    def dirpath(self) -> str:
        """The folder, under the name that Lightning's own checkpoint callback gives it."""
        return str(self.folder)

    def save_at_step_end(self) -> None:
        """Save the step that is running as it ends; every process must call this.

        That checkpoint, and the newest one before it, are then kept for good.
        """
        self._asked = True

    # ---- the life of a run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the form; make the folder and clear what a killed run left half-written."""
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
                " choose another output_dir or mend its permissions"
            ) from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM over from Lightning, which may stop between two micro-batches of a step."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note_sigterm)
        self._seen_step = trainer.global_step
        if trainer.is_global_zero:
            self.saver.point_best()
        if self._random_state is not None:
            restore_random_state(self._random_state, pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write what became due at the end of the step before, now that its metrics are logged."""
        self.saver.settle(wait=False)
        if self._due:
            self._write(trainer, validation_pending=False)
        self._stop_if_asked(trainer)
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
        """At the end of an optimizer step, take a snapshot if it may have to be written."""
        step = trainer.global_step
        if step == self._seen_step:  # only another micro-batch
            return
        self._seen_step = step
        self._agree_on_stopping(trainer)
        last = step >= trainer.max_steps > 0 or trainer.should_stop or _is_last_of_epochs(trainer)
        self._due = last or self._stopping or step % (self.every_n_steps or step + 1) == 0
        if self._asked:
            self._asked, self._due = False, True
            written = {*saved_steps(self.folder), self.saver.saved_step}  # or being written
            before = sorted(earlier for earlier in written if 0 <= earlier < step)
            self.retention.kept |= {step, *before[-1:]}
        epoch_loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if self._due or epoch_loop._should_check_val_fx(fetcher):
            # Tensors in it are the live ones: nothing changes them before it is written.
            self._snapshot = self.saver.take(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On SIGTERM at the step just ended, save before its validation and stop."""
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
        """On SIGTERM within a validation, save the step it belongs to and stop."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._agree_on_stopping(trainer)
            self._leave_validation_if_asked(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what is due, and what is among the best."""
        if self._snapshot is None:
            return
        self._gather_random_states(trainer, self._snapshot)  # the validation drew from them
        if self._is_among_best(trainer) or self._stopping:
            self._due = True
        if self._due:
            self._write(trainer, validation_pending=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what is due: as a run ends, callbacks may leave the module other weights."""
        if self._due and self._snapshot is not None:
            self._write(trainer, validation_pending=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the end of the run, and wait for what is being written."""
        self.saver.settle()
        if self._snapshot is not None and self.saver.saved_step != self._seen_step:
            self._write(trainer, validation_pending=False)
        self.saver.settle()
        self._snapshot = None
        self._stop_if_asked(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Wait for what is being written; what befalls it does not hide the exception."""
        try:
            self.saver.settle()
        except Exception as error:
            rank_zero_warn(f"a checkpoint could not be saved: {error}", category=RuntimeWarning)

    # ---- what the checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """The scores of the best checkpoints so far, of what, and which are kept for good."""
        return {
            "scores": dict(self.retention.scores),
            "scored_by": [self.monitor, self.retention.mode],
            "kept": sorted(self.retention.kept),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the scores and what is kept, as far as the checkpoints are still there.

        Scores of another metric, or mode, compare with none of now: what was best by them is kept
        for good, and the best are chosen anew.
        """
        there = set(saved_steps(self.folder))
        scores = {s: score for s, score in state_dict["scores"].items() if s in there}
        self.retention.kept = there & set(state_dict.get("kept", ()))
        now = [self.monitor, self.retention.mode]
        before = state_dict.get("scored_by", now)
        if before == now:
            self.retention.scores = scores
            return
        self.retention.scores = {}
        self.retention.kept |= set(scores)
        if scores:
            rank_zero_warn(
                f"checkpoint.monitor and mode are {' '.join(now)}, and were {' '.join(before)}: the"
                f" best checkpoints are chosen anew; those so far ({sorted(scores)}) are kept"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the generators of every process."""
        self._gather_random_states(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue from `checkpoint`: loggers forget what came after it, `last` names it."""
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
        """Save the snapshot."""
        snapshot, self._due = self._snapshot, False
        assert snapshot is not None
        snapshot["loops"] = _loops_at_step_end(snapshot["loops"], validation_pending)
        snapshot["callbacks"][self.state_key] = self.state_dict()
        self.saver.save(trainer, snapshot)

    def _is_among_best(self, trainer: pl.Trainer) -> bool:
        if self.retention.keep_best == 0:
            return False
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise UserError(
                f"checkpoint.monitor is {self.monitor!r}, which the validation does not log"
                f" (it logs: {known})"
            )
        self.saver.settle()  # so that all processes agree on what is there
        return self.retention.admit(self._seen_step, float(value))

    def _gather_random_states(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        own = capture_random_state(trainer.strategy.root_device)
        states = [own]
        if trainer.world_size > 1:
            states = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(states, own)
        checkpoint["random_states"] = states

    # ---- stopping

    def _note_sigterm(self, signum: int, frame: Any) -> None:
        self._sigterm = True

    def _agree_on_stopping(self, trainer: pl.Trainer) -> None:
        """Stop all processes at the same step if any of them was told to."""
        self._stopping = trainer.strategy.reduce_boolean_decision(self._sigterm, all=False)

    def _leave_validation_if_asked(self, trainer: pl.Trainer) -> None:
        over = self._seen_step >= trainer.max_steps > 0  # nothing could resume this validation
        if not self._stopping or self._snapshot is None or over:
            return
        if self.saver.is_as_taken(trainer):  # else at the validation's end
            self._write(trainer, validation_pending=True)
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if self._stopping:
            # A launcher ends the other processes when one leaves: not before all is written.
            self.saver.settle()
            trainer.strategy.barrier("RunCheckpoint")
            raise SIGTERMException(128 + signal.SIGTERM)


def _is_last_of_epochs(trainer: pl.Trainer) -> bool:
    """Whether the batch is the last one of a run that is measured in epochs."""
    loop = trainer.fit_loop
    epochs = -1 if loop.max_epochs is None else loop.max_epochs
    return loop.epoch_loop.batch_progress.is_last_batch and 0 < epochs <= trainer.current_epoch + 1


def _loops_at_step_end(loops: dict[str, Any], validation_pending: bool) -> dict[str, Any]:
    """Lightning's loop counters for "an optimizer step has just ended".

    With a pending validation they say "at the first batch of it", which Lightning answers by
    going back to the start of that validation before it trains on.
    """
    loops = copy.deepcopy(loops)
    fit = loops["fit_loop"]
    training = fit["epoch_loop.batch_progress"]
    validation = fit["epoch_loop.val_loop.batch_progress"]
    training["is_last_batch"] = False  # a run may be made longer
    begun = int(validation_pending)
    for scope in ("total", "current"):
        validation[scope].update(ready=begun, started=begun, processed=0, completed=0)
        training[scope]["completed"] += begun
    return loops
