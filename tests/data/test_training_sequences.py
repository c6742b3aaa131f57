import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mhc_lightning.data import PreparedData
from mhc_lightning.data import sequences as module
from mhc_lightning.data.chunk_file import Chunk
from mhc_lightning.data.training_sequences import (
    TrainingSequences,
    ValidationSequences,
    held_out_sequences_in,
    sequences_in,
)
from mhc_lightning.errors import UserError

LENGTH = 64


def expected(prepared: PreparedData, split: str) -> list[bytes]:
    """All sequences of a split, sorted."""
    found = []
    for chunk in prepared.chunks(split):
        tokens = np.asarray(prepared.tokens(chunk)).astype(np.int64)
        for start in range(0, len(tokens) - LENGTH, LENGTH):
            found.append(tokens[start : start + LENGTH + 1].tobytes())
    return sorted(found)


def test_each_token_of_a_chunk_is_predicted_once(prepared: PreparedData) -> None:
    chunk = prepared.chunks("train")[0]
    assert sequences_in(chunk, chunk.tokens - 1) == 1
    assert sequences_in(chunk, chunk.tokens) == 0
    assert sequences_in(chunk, LENGTH) == (chunk.tokens - 1) // LENGTH


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


def test_few_files_are_open_at_once(
    prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_OPEN_CHUNKS", 2)
    stream = TrainingSequences([prepared], [1.0], LENGTH, seed=0, window=100)
    free = TrainingSequences([prepared], [1.0], LENGTH, seed=0, window=100)
    total = stream.orders[0].length
    batch = stream.__getitems__(range(total))
    assert len(stream._reader._open) == 2
    monkeypatch.undo()
    assert torch.equal(batch, free.__getitems__(range(total)))


def test_validation_is_evenly_spaced_and_fixed(prepared: PreparedData) -> None:
    everything = expected(prepared, "validation")
    whole = ValidationSequences([prepared], [len(everything)], LENGTH)
    rows = whole.__getitems__(range(len(whole)))
    assert sorted(row.numpy().tobytes() for row in rows) == everything
    few = ValidationSequences([prepared], [5], LENGTH)
    assert len(few) == 5
    for index in range(5):
        assert torch.equal(few[index], rows[index * len(everything) // 5])
    assert few.num_tokens == [5 * LENGTH]


@pytest.mark.parametrize("length", [1, 2, 64, 100, 10**5])
def test_all_held_out_tokens_but_a_chunks_first_are_predicted_once(
    prepared: PreparedData, length: int
) -> None:
    chunks = prepared.chunks("validation")
    count = sum(held_out_sequences_in(chunk, length) for chunk in chunks)
    every = ValidationSequences([prepared], [count], length)
    rows = every.__getitems__(range(count))
    held = [np.asarray(prepared.tokens(chunk)) for chunk in chunks]
    targets = rows[:, 1:]
    assert np.array_equal(targets[targets != -100], np.concatenate([c[1:] for c in held]))
    assert every.num_tokens == [int((targets != -100).sum())]
    inputs = rows[:, :-1][targets != -100]
    assert np.array_equal(inputs, np.concatenate([c[:-1] for c in held]))
    padding = every.__getitems__([count, count + 7])
    assert padding.shape == (2, length + 1) and (padding == -100).all()


@pytest.mark.parametrize("tokens", [0, 1, 2, 64, 65, 66])
def test_short_chunks(prepared: PreparedData, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    chunk = Chunk("", tokens, 0, 0, "")
    monkeypatch.setitem(prepared.record.chunks, "validation", [chunk])
    sizes = [k for k in (min(LENGTH, tokens - 1), tokens - 65) if k > 0]
    assert held_out_sequences_in(chunk, LENGTH) == len(sizes)
    for count in range(len(sizes) + 1):
        chosen = ValidationSequences([prepared], [count], LENGTH)
        assert chosen.num_tokens == [sum(sizes[:count])]


def test_a_chunk_that_changes_while_it_is_read_from_is_named(
    prepared_path: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(prepared_path, tmp_path / "copy"))
    data = PreparedData(copy)
    stream = TrainingSequences([data], [1.0], LENGTH, seed=0, window=1)
    first = stream[0]
    path = copy / data.chunks("train")[stream.orders[0].locate(0)[0]].name
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=rf"{path} is damaged"):
        stream[1]
    shutil.copy(prepared_path / path.relative_to(copy), path)
    assert torch.equal(stream[0], first)
