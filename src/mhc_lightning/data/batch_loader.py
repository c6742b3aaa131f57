"""The loaders that Lightning gets: batches by position, from worker processes.

They are plain iterables and no ``DataLoader``, because Lightning would replace the sampler of one.
"""

import atexit
import functools
import os
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mhc_lightning.errors import UserError

_BATCHES_AHEAD = 4
_GRACE_SECONDS = 300.0


class _Guarded(Dataset[Any]):
    """A dataset that hands a mistake of the user's over in place of the batch.

    Raised in a worker, it would arrive wrapped in the worker's traceback.
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
    """Datasets here give whole batches; there is nothing to collate."""
    return batch


def _start_worker(worker: int) -> None:
    """Outlive a SIGTERM or Ctrl-C to the whole process group.

    The main process still needs batches to reach the end of its step, and closes the loader when
    it is done. Should it not, the worker goes after some minutes.
    """

    def leave_later(signal_number: int, frame: Any) -> None:
        timer = threading.Timer(_GRACE_SECONDS, os._exit, (0,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, leave_later)
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
        dataset: Gives a batch [B, S+1] for a list of B positions (``__getitems__``).
        batches: The positions of each batch, of this rank only.
        length: Number of batches.
        num_workers: Worker processes; 0 reads in the main process.
        pin_memory: Whether batches go to pinned memory.
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
            _Guarded(dataset),
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable will do
            collate_fn=_take_batch,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=_BATCHES_AHEAD if num_workers else None,
            worker_init_fn=_start_worker if num_workers else None,
            # Its own: a loader that draws its seed from the global generator changes the
            # model's random numbers when it starts at another moment.
            generator=torch.Generator(),
        )
        # Before multiprocessing's own clean-up, which would wait for the workers' grace period.
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


class _Owner(Protocol):
    """What a :class:`TrainingLoader` asks of its data module."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def begin(self) -> int: ...

    def announce(self, position: int) -> None: ...


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
    """Training batches from wherever training is.

    The start is asked for when the first batch is: Lightning makes iterators before it has
    restored the step that a checkpoint was written at. Having a length keeps it from fetching a
    batch ahead; having a state keeps it from warning at resume.

    Args:
        owner: The data module.
        dataset: See :class:`BatchLoader`.
        length: Number of batches in what Lightning calls an epoch.
        micro_batch_size: Sequences per batch.
        rank: Data-parallel rank.
        world_size: Number of data-parallel ranks.
        num_workers: See :class:`BatchLoader`.
        pin_memory: See :class:`BatchLoader`.
    """

    def __init__(
        self,
        owner: _Owner,
        dataset: Dataset[Tensor],
        length: int,
        *,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self._owner = owner
        self._batches = _RankBatches(micro_batch_size, rank, world_size)
        super().__init__(dataset, self._batches, length, num_workers, pin_memory)

    def __iter__(self) -> Iterator[Tensor]:
        position = self._batches.start = self._owner.begin()
        for batch in super().__iter__():
            self._owner.announce(position)
            yield batch
            position += self._batches.stride

    def state_dict(self) -> dict[str, Any]:
        """The data module's, which Lightning saves with the module too."""
        return self._owner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hand the state to the data module, which may have it already."""
        self._owner.load_state_dict(state_dict)
