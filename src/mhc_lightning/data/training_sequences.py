"""The training stream: endless sequences by position, in a shuffled order of several sources."""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from mhc_lightning.data.prepared_record import TRAIN
from mhc_lightning.data.sequence_reader import SequencePlace, SequenceReader, sequences_in
from mhc_lightning.data.shuffling import EpochOrder, Mixture
from mhc_lightning.data.token_source import TokenSource


class TrainingSequences(torch.utils.data.Dataset[Tensor]):
    """The endless training stream: one sequence for each position.

    Args:
        sources: The opened data.
        weights: Relative frequency of each source.
        sequence_length: Tokens to predict per sequence.
        seed: Identifies the order.
        window: Chunks per shuffling window.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        weights: Sequence[float],
        sequence_length: int,
        seed: int,
        window: int,
    ) -> None:
        self._reader = SequenceReader(sources, TRAIN, sequence_length)
        self.mixture = Mixture(weights, f"{seed}/mixture")
        self.orders = [
            EpochOrder(
                [sequences_in(chunk, sequence_length) for chunk in source.chunks(TRAIN)],
                window,
                f"{seed}/{number}",
            )
            for number, source in enumerate(sources)
        ]
        self._windows: dict[int, tuple[int, int]] = {}  # source -> (epoch, window) being read
        self._first_epochs: list[int] = []
        self._repeated: set[int] = set()

    def __getitem__(self, position: int) -> Tensor:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> Tensor:
        """The sequences at some positions, int64 [len(positions), sequence_length + 1]."""
        return self._reader.batch(map(self._place, positions), len(positions))

    def epochs(self, position: int) -> list[int]:
        """Number of whole passes over each source before a position."""
        return [
            drawn // order.length
            for drawn, order in zip(self.mixture.drawn(position), self.orders, strict=True)
        ]

    def warn_of_repeats(self, position: int) -> None:
        """Warn once per source when training reaches its second pass.

        Args:
            position: The position of training; the first call gives the start.
        """
        if len(self._repeated) == len(self.orders):
            return
        epochs = self.epochs(position)
        self._first_epochs = self._first_epochs or epochs
        for source, (first, epoch) in enumerate(zip(self._first_epochs, epochs, strict=True)):
            if epoch > first and source not in self._repeated:
                self._repeated.add(source)
                rank_zero_warn(
                    f"{self._reader.sources[source].path}: every sequence has been seen"
                    f" {epoch} time{'s' if epoch > 1 else ''}; going on in a new order"
                )

    def _place(self, position: int) -> SequencePlace:
        source, index = self.mixture.locate(position)
        self._prefetch(source, index)
        return source, *self.orders[source].locate(index)

    def _prefetch(self, source: int, index: int) -> None:
        """On entering a window of remote chunks, fetch this window and the next one."""
        data, order = self._reader.sources[source], self.orders[source]
        if data.cache is None or self._windows.get(source) == order.window_at(index):
            return
        epoch, window = self._windows[source] = order.window_at(index)
        chunks = [
            self._reader.chunk(source, chunk)
            for chunk in dict.fromkeys(
                order.chunks_of(epoch, window) + order.chunks_of(epoch, window + 1)
            )
        ]
        data.prefetch(chunks)
