"""A pass of the training stream holds every sequence of the sources once, in a shuffled order."""

import pickle

import numpy as np
import torch

from mhc_lightning.data import PreparedData
from mhc_lightning.data.training_sequences import TrainingSequences

LENGTH = 64


def expected(prepared: PreparedData, split: str) -> list[bytes]:
    """All sequences of a split, sorted."""
    found = []
    for chunk in prepared.chunks(split):
        tokens = np.asarray(prepared.tokens(chunk)).astype(np.int64)
        for start in range(0, len(tokens) - LENGTH, LENGTH):
            found.append(tokens[start : start + LENGTH + 1].tobytes())
    return sorted(found)


def test_a_pass_gives_every_sequence_once(prepared: PreparedData) -> None:
    stream = TrainingSequences([prepared], [1.0], LENGTH, seed=0, window=3)
    total = stream.orders[0].length
    batch = stream.__getitems__(range(total))
    assert batch.dtype == torch.int64 and batch.shape == (total, LENGTH + 1)
    assert sorted(row.numpy().tobytes() for row in batch) == expected(prepared, "train")
    assert stream.epochs(total - 1) == [0] and stream.epochs(total) == [1]
    again = stream.__getitems__(range(total, 2 * total))
    assert not torch.equal(batch, again)
    assert sorted(row.numpy().tobytes() for row in again) == expected(prepared, "train")


def test_seed_decides_the_order(prepared: PreparedData) -> None:
    streams = [TrainingSequences([prepared], [1.0], LENGTH, seed, window=3) for seed in (0, 0, 1)]
    first, same, other = (stream.__getitems__(range(20)) for stream in streams)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(pickle.loads(pickle.dumps(streams[0]))[7], first[7])


def test_a_mixture_reads_from_every_source(
    prepared: PreparedData, other_prepared_path: str
) -> None:
    other = PreparedData(other_prepared_path)
    mixed = TrainingSequences([prepared, other], [3.0, 1.0], LENGTH, seed=0, window=3)
    sides = {source: set(expected(data, "train")) for source, data in enumerate((prepared, other))}
    batch = mixed.__getitems__(range(400))
    for position, row in enumerate(batch):
        assert row.numpy().tobytes() in sides[mixed.mixture.locate(position)[0]]
    assert 70 < mixed.mixture.drawn(400)[1] < 130
