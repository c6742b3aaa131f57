"""Saving checkpoints one at a time: writing, then moving links, then pruning."""

from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from mhc_lightning.checkpoints.forms import Sharded, ShardedFolder, WholeFile, choose_form
from mhc_lightning.checkpoints.names import BEST, LAST, checkpoint_name, checkpoints_of
from mhc_lightning.checkpoints.retention import Retention, remove_checkpoint
from mhc_lightning.errors import UserError
from mhc_lightning.files.atomic import point_link
from mhc_lightning.optimizers.finiteness import require_finite


class CheckpointSaver:
    """Takes and saves the state of a run, moves links and prunes; all processes call it alike.

    Args:
        folder: The folder of the checkpoints.
        retention: Decides which of them to keep.
        sharded: True for folders, False for files, or `auto`; see `choose_form`.
        asynchronous: True to let the run go on while a checkpoint is written.

    Attributes:
        saved_step: The step of the last checkpoint that was saved, or is being written.
        resumed_from: The checkpoint that the run resumed from, if it is one of this folder.

    Raises:
        UserError: The settings exclude each other.
    """

    def __init__(
        self, folder: Path, retention: Retention, sharded: Sharded, asynchronous: bool
    ) -> None:
        if sharded not in ("auto", True, False):
            raise UserError(f"checkpoint.sharded is {sharded!r}; it must be auto, true or false")
        if asynchronous and sharded is False:
            raise UserError(
                "checkpoint.asynchronous=true writes folders of shards;"
                " leave out checkpoint.sharded=false"
            )
        self.folder = folder
        self.retention = retention
        self.sharded: Sharded = sharded
        self.asynchronous = asynchronous
        self.saved_step = -1
        self.resumed_from: Path | None = None
        self._form: WholeFile | ShardedFolder = WholeFile()
        self._writing: tuple[int, Future[Any]] | None = None  # of a step
        self._norms = torch.zeros(0)

    def set_up(self, strategy: Strategy) -> None:
        """Choose the form, once the processes have met."""
        self._form = choose_form(strategy, self.sharded, self.asynchronous)

    def resume_from(self, path: Path, step: int) -> None:
        """Note the checkpoint that the run resumes from."""
        path = path.resolve()
        own = path.parent == self.folder.resolve() and path.exists()
        self.resumed_from = self.folder / path.name if own else None
        self.saved_step = step

    def point_best(self) -> None:
        """In the first process of a resumed run, let `best` name the best checkpoint so far.

        The link may name a later checkpoint of an abandoned branch, which will be overwritten.
        """
        if self.resumed_from is None:
            return
        steps = self.retention.best_steps()
        for path in checkpoints_of(self.folder, steps[0]) if steps else []:
            point_link(self.folder / BEST, path.name)
        if not steps:
            (self.folder / BEST).unlink(missing_ok=True)

    def take(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The present state of the run; its tensors may be the live ones."""
        self._norms = _norms(trainer.lightning_module)
        return self._form.take(trainer)

    def is_as_taken(self, trainer: pl.Trainer) -> bool:
        """True if the parameters are still those of the last `take`; every process calls this.

        Callbacks lend the module other weights while it is validated, such as averages.
        """
        same = torch.equal(self._norms, _norms(trainer.lightning_module))
        return trainer.strategy.reduce_boolean_decision(same)

    def save(self, trainer: pl.Trainer, taken: dict[str, Any]) -> None:
        """Save a state of `take`, or begin to save it; on return the state is no longer needed.

        Raises:
            NonFiniteLossError: The state is not finite. Nothing is written or deleted for it.
        """
        step = taken["global_step"]
        self.settle()
        require_finite(trainer)  # what was taken is still the run's state
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()  # a resumed run keeps what was logged up to here
        path = self.folder / checkpoint_name(step, folder=self._form.is_folder)
        best = self.retention.best_steps()[0] if step in self.retention.scores else None
        commit = partial(self._commit, path, step, best, self.retention.spared())
        self._writing = step, self._form.write(trainer, taken, path, commit)
        self.saved_step = step
        if not self.asynchronous:
            self.settle()

    def settle(self, *, wait: bool = True) -> None:
        """Handle the end of the writing, if it has ended; a failure is a warning.

        Args:
            wait: True to wait for the end. Only then do all processes know the same outcome.
        """
        if self._writing is None or not (wait or self._writing[1].done()):
            return
        (step, writing), self._writing = self._writing, None
        try:
            writing.result()
        except OSError as error:
            rank_zero_warn(
                f"could not save the checkpoint of step {step} in {self.folder}:"
                f" {error.strerror or error}; the run goes on, earlier checkpoints are intact",
                category=RuntimeWarning,
            )
            self.retention.withdraw(step)
            self.saved_step = -1

    def _commit(self, path: Path, step: int, best: int | None, spared: set[int]) -> None:
        """In the first process, once a checkpoint has its name, move the links, then prune."""
        point_link(self.folder / LAST, path.name)
        for other in checkpoints_of(self.folder, step):
            if other != path:
                remove_checkpoint(other)  # of the other form
        if best is not None:
            for saved in checkpoints_of(self.folder, best):
                point_link(self.folder / BEST, saved.name)
        self.retention.prune(self.folder, newest=step, spared=spared)


@torch.no_grad()
def _norms(module: nn.Module) -> Tensor:
    """Norms of this process's part of each trained parameter, without waiting for the device."""
    trained = [p for p in module.parameters() if p.requires_grad and not (is_lazy(p) or p.is_meta)]
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    norms = [
        torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32))
        for part in parts
    ]
    return torch.stack([norm.to(norms[0].device) for norm in norms]) if norms else torch.zeros(0)
