"""Sequences are read from few open files, and a file that changes is noticed."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from mhc_lightning.data import PreparedData, sequence_reader
from mhc_lightning.data.sequence_reader import sequences_in
from mhc_lightning.data.training_sequences import TrainingSequences
from mhc_lightning.errors import UserError

LENGTH = 64


def test_each_token_of_a_chunk_is_predicted_once(prepared: PreparedData) -> None:
    chunk = prepared.chunks("train")[0]
    assert sequences_in(chunk, chunk.tokens - 1) == 1
    assert sequences_in(chunk, chunk.tokens) == 0
    assert sequences_in(chunk, LENGTH) == (chunk.tokens - 1) // LENGTH


def test_few_files_are_open_at_once(
    prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence_reader, "_OPEN_CHUNKS", 2)
    stream = TrainingSequences([prepared], [1.0], LENGTH, seed=0, window=100)
    free = TrainingSequences([prepared], [1.0], LENGTH, seed=0, window=100)
    total = stream.orders[0].length
    batch = stream.__getitems__(range(total))
    assert len(stream._reader._open) == 2
    monkeypatch.undo()
    assert torch.equal(batch, free.__getitems__(range(total)))


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
