"""The two forms of a checkpoint: one whole file, or a folder of shards."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from mhc_lightning.checkpoints.distributed_state import DistributedState
from mhc_lightning.checkpoints.file_writing import write_checkpoint
from mhc_lightning.checkpoints.folder_writing import save_folder
from mhc_lightning.checkpoints.portable_strategy import PortableState
from mhc_lightning.checkpoints.reading import load_whole_folder
from mhc_lightning.errors import UserError

Sharded = Literal["auto", True, False]


class WholeFile:
    """One file, which the first process writes after all others have sent it their parts."""

    is_folder = False

    def take(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The run's state, whole in the first process; every process calls this."""
        return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)

    def write(
        self, trainer: pl.Trainer, taken: dict[str, Any], path: Path, commit: Callable[[], None]
    ) -> "Future[Any]":
        """Write a state of `take`; on return the write is done, or has failed on every process."""

        def write() -> None:
            write_checkpoint(taken, path)
            commit()

        return _in_first_process(trainer, write)


class ShardedFolder:
    """A folder, to which each process writes its own part.

    Args:
        strategy: The run's strategy, with its process group.
        asynchronous: True to let the run go on while shards are written.

    Raises:
        UserError: The strategy spreads a model in a way that this package does not know.
    """

    is_folder = True

    def __init__(self, strategy: Strategy, asynchronous: bool) -> None:
        if not isinstance(strategy, PortableState | SingleDeviceStrategy | DDPStrategy):
            raise UserError(
                f"checkpoint.sharded=true does not work with {type(strategy).__name__}; use"
                " checkpoint.sharded=false"
            )
        self.asynchronous = asynchronous
        # A group of its own: the run communicates too while shards are written.
        alone = not (dist.is_available() and dist.is_initialized())
        self._group = None if alone else dist.new_group(backend="gloo")

    def take(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The run's state, with this process's part of the tensors; every process calls this."""
        strategy: Any = trainer.strategy
        spread = _spreads(strategy)
        with strategy.in_parts() if spread else nullcontext():
            taken = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        whole = (
            strategy.distributed_state()
            if spread
            else DistributedState(strategy.lightning_module, strategy.root_device, None)
        )
        taken["optimizer_states"] = [whole.optimizer_part(o) for o in strategy.optimizers]
        return taken

    def write(
        self, trainer: pl.Trainer, taken: dict[str, Any], path: Path, commit: Callable[[], None]
    ) -> "Future[Any]":
        """Write a state of `take`; in the background if asynchronous.

        Returns:
            A future that is done after `commit`, or fails with an OSError, alike on every process.
        """
        optimizers = taken["optimizer_states"]
        tensors = {
            "state_dict": taken["state_dict"],
            "optimizer_states": {str(k): part for k, (part, _) in enumerate(optimizers)},
        }
        groups = [{"param_groups": groups} for _, groups in optimizers]
        return save_folder(
            tensors,
            {**taken, "state_dict": {}, "optimizer_states": groups},
            path,
            commit,
            group=self._group,
            asynchronous=self.asynchronous,
        )


def choose_form(
    strategy: Strategy, sharded: Sharded, asynchronous: bool
) -> WholeFile | ShardedFolder:
    """The form of a run's checkpoints; every process calls this, once all have met.

    Args:
        strategy: The run's strategy.
        sharded: True for folders, False for files; `auto` takes folders if the model is spread
            over several processes, and if `asynchronous`.
        asynchronous: True if shards are written while the run goes on.

    Raises:
        UserError: The strategy does not support the form.
    """
    if sharded == "auto":
        spread = _spreads(strategy) and strategy.world_size > 1  # type: ignore[attr-defined]
        sharded = spread or asynchronous
    return ShardedFolder(strategy, asynchronous) if sharded else WholeFile()


def read_folders_too(strategy: Strategy) -> None:
    """Let one of Lightning's own strategies resume from a checkpoint folder, as ours do."""
    if not _spreads(strategy) and not isinstance(strategy.checkpoint_io, _FolderReadingIO):
        strategy.checkpoint_io = _FolderReadingIO(strategy.checkpoint_io)


def _spreads(strategy: Strategy) -> bool:
    """Whether processes hold different parts of the module, which the strategy itself loads."""
    return isinstance(strategy, PortableState) and strategy.spreads_module


class _FolderReadingIO(CheckpointIO):
    """Reads checkpoint folders for Lightning's own strategies; `inner` does everything else."""

    def __init__(self, inner: CheckpointIO) -> None:
        self.inner = inner

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a file or folder, whole, into CPU memory."""
        if Path(path).is_dir():
            return load_whole_folder(Path(path), trusted=weights_only is False)
        return self.inner.load_checkpoint(path, map_location, weights_only)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As `inner`."""
        self.inner.save_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """As `inner`."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """As `inner`."""
        self.inner.teardown()


def _in_first_process(trainer: pl.Trainer, action: Callable[[], None]) -> "Future[Any]":
    """Run an action in the first process; the future fails on every process if it fails there."""
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            action()
        except Exception as failure:
            error = failure
    shared = error
    if error is not None and not isinstance(error, OSError):  # it may be impossible to send
        shared = RuntimeError(f"the first process could not write a checkpoint: {error!r}")
    shared = trainer.strategy.broadcast(shared)
    done: Future[Any] = Future()
    if shared is None:
        done.set_result(None)
    else:
        done.set_exception(error or shared)
    return done
