"""Validation sees a fixed choice of held-out sequences, each once, on any number of ranks."""

import numpy as np
import pytest
import torch

from mhc_lightning.data import PreparedData
from mhc_lightning.data.chunk_file import Chunk
from mhc_lightning.data.validation_sequences import (
    ValidationSequences,
    held_out_sequences_in,
    validation_batches,
    validation_counts,
)

LENGTH = 64


def test_validation_is_evenly_spaced_and_fixed(prepared: PreparedData) -> None:
    everything = sorted(
        np.asarray(tokens[start : start + LENGTH + 1]).astype(np.int64).tobytes()
        for tokens in map(prepared.tokens, prepared.chunks("validation"))
        for start in range(0, len(tokens) - LENGTH, LENGTH)
    )
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


@pytest.mark.parametrize(
    ("total", "size", "world"),
    [(1, 1, 1), (1, 3, 8), (2, 2, 3), (7, 3, 2), (20, 5, 2), (21, 5, 3), (48, 16, 1), (48, 2, 8)],
)
def test_every_sequence_comes_once_and_ranks_get_equal_batches(
    total: int, size: int, world: int
) -> None:
    ranks = [validation_batches(total, size, rank, world) for rank in range(world)]
    used = sorted(index for batches in ranks for batch in batches for index in batch)
    assert used == list(range(len(used)))
    assert total <= len(used) < total + size * world, "less than a round of padding"
    assert len({len(batches) for batches in ranks}) == 1
    assert len({len(batch) for batches in ranks for batch in batches}) == 1
    assert all(1 <= len(batch) <= size for batches in ranks for batch in batches)


def test_nothing_to_validate_on() -> None:
    assert validation_batches(0, 4, 0, 1) == []


def test_counts_follow_the_weights_and_what_there_is(prepared: PreparedData) -> None:
    everything = validation_counts([prepared], [1.0], 64, None)[0]
    assert everything > 100
    assert validation_counts([prepared, prepared], [3.0, 1.0], 64, 40) == [30, 10]
    assert validation_counts([prepared], [1.0], 64, 10**6) == [everything]
    chunks = len(prepared.chunks("validation"))
    assert validation_counts([prepared], [1.0], 10**6, None) == [chunks], "each is one short one"
