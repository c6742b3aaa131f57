"""The loaders of training and validation: batches by position, read in worker processes.

The loaders are plain iterables: Lightning would replace the sampler of a `DataLoader`. litdata's
`StreamingDataLoader` resumes too, but its order follows the ranks and workers of the first run.
"""

import atexit
import functools
import os
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mhc_lightning.data.resume import StreamPosition
from mhc_lightning.data.training_sequences import TrainingSequences
from mhc_lightning.errors import UserError

_BATCHES_AHEAD = 4
_GRACE_SECONDS = 300.0


class _ErrorsAsBatches(Dataset[Any]):
    """A dataset that returns a `UserError` in place of the batch.

    An error raised in a worker would arrive wrapped in the worker's traceback.
    """

    def __init__(self, dataset: Dataset[Tensor]) -> None:
        self._dataset = dataset

    def __getitems__(self, positions: Sequence[int]) -> Tensor | UserError:
        try:
            batch: Tensor = self._dataset.__getitems__(positions)  # type: ignore[attr-defined]
            return batch
        except UserError as error:
            return UserError(str(error))


def _take_batch(batch: Any) -> Any:
    """A batch, unchanged: the datasets return whole batches."""
    return batch


def _start_worker(worker: int) -> None:
    """Let a worker survive a SIGTERM or Ctrl-C to the whole process group.

    The main process needs batches until the end of its step, and then closes the loader. If the
    loader is not closed, the worker exits after some minutes.
    """

    def exit_later(signal_number: int, frame: Any) -> None:
        timer = threading.Timer(_GRACE_SECONDS, os._exit, (0,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, exit_later)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_workers(loader: "weakref.ref[DataLoader[Any]]") -> None:
    """End the worker processes of a loader, if it has any."""
    iterator = getattr(loader(), "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()
        loader()._iterator = None  # type: ignore[union-attr]


class BatchLoader:
    """Batches of a dataset, in a given order.

    Args:
        dataset: Returns a batch [B, S+1] for a list of B positions (`__getitems__`).
        batches: The positions of each batch of this rank.
        length: Number of batches.
        num_workers: Worker processes; 0 reads in the main process.
        pin_memory: Copy batches to pinned memory.
    """

    def __init__(
        self,
        dataset: Dataset[Tensor],
        batches: Iterable[Sequence[int]],
        length: int,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._length = length
        self._loader: DataLoader[Tensor | UserError] = DataLoader(
            _ErrorsAsBatches(dataset),
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable works
            collate_fn=_take_batch,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=_BATCHES_AHEAD if num_workers else None,
            worker_init_fn=_start_worker if num_workers else None,
            # The loader has its own generator. A seed drawn from the global one would change the
            # model's random numbers whenever the loader starts at another moment.
            generator=torch.Generator(),
        )
        # Runs before multiprocessing's clean-up, which would wait for the workers' grace period.
        self._at_exit = functools.partial(_end_workers, weakref.ref(self._loader))
        if num_workers:
            atexit.register(self._at_exit)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Tensor]:
        for batch in islice(iter(self._loader), self._length):
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def close(self) -> None:
        """End the worker processes."""
        if self._loader._iterator is not None and self._loader.num_workers:
            self._loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
        self._loader._iterator = None


class _RankBatches:
    """The endless positions of one rank's batches, from a start that is set before each pass."""

    def __init__(self, micro_batch_size: int, rank: int, world_size: int) -> None:
        self.start = 0
        self.stride = micro_batch_size * world_size
        self._offsets = range(rank * micro_batch_size, (rank + 1) * micro_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start
        while True:
            yield [position + offset for offset in self._offsets]
            position += self.stride


class TrainingLoader(BatchLoader):
    """Training batches from the current position of the stream.

    The position is read when the first batch is requested: Lightning makes iterators before it
    restores the step of a checkpoint. The loader has a length, so that Lightning does not fetch a
    batch ahead. It has a state, so that Lightning does not warn at resume.

    Args:
        dataset: The training stream.
        length: Number of batches in an epoch of Lightning.
        position: The position in the stream.
        trainer: The trainer, whose optimizer steps give the position.
        accumulation: Micro-batches per optimizer step.
        micro_batch_size: Sequences per batch.
        rank: Data-parallel rank.
        world_size: Number of data-parallel ranks.
        num_workers: See `BatchLoader`.
        pin_memory: See `BatchLoader`.
        repeats: True to give the first batches of the stream in every epoch, to overfit them.
    """

    def __init__(
        self,
        dataset: TrainingSequences,
        length: int,
        *,
        position: StreamPosition,
        trainer: L.Trainer,
        accumulation: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
        repeats: bool = False,
    ) -> None:
        self._stream, self._position, self._repeats = dataset, position, repeats
        self._trainer, self._accumulation = trainer, accumulation
        self._batches = _RankBatches(micro_batch_size, rank, world_size)
        self._source: Iterator[tuple[int, Tensor]] = iter(())
        self._peeked: list[tuple[int, Tensor]] = []
        super().__init__(dataset, self._batches, length, num_workers, pin_memory)

    def __iter__(self) -> Iterator[Tensor]:
        start = self._position.begin(self._trainer, self._accumulation)
        start = self._batches.start = 0 if self._repeats else start
        self._peeked = []
        self._source = zip(count(start, self._batches.stride), super().__iter__())
        while self.peek() is not None:
            position, batch = self._peeked.pop()
            self._stream.warn_of_repeats(position)
            yield batch

    def peek(self) -> Tensor | None:
        """The batch that the iteration gives next; None at its end."""
        if not self._peeked:
            self._peeked = list(islice(self._source, 1))
        return self._peeked[0][1] if self._peeked else None

    def state_dict(self) -> dict[str, Any]:
        """The position, which the data module's state holds too."""
        return self._position.state_dict(self._trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of a checkpoint."""
        self._position.load_state_dict(state_dict)
