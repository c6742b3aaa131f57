"""Loaders read the stream from the current position, and end their workers."""

import atexit
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_lightning.data import PreparedData
from mhc_lightning.data.batch_loader import BatchLoader, TrainingLoader
from mhc_lightning.data.resume import StreamPosition
from mhc_lightning.data.training_sequences import TrainingSequences
from mhc_lightning.errors import UserError


def at_step(step: int) -> Any:
    """As much of a trainer as the position of the stream needs."""
    return SimpleNamespace(global_step=step)


def stream_of(prepared: PreparedData) -> TrainingSequences:
    return TrainingSequences([prepared], [1.0], 64, seed=0, window=3)


def training(
    prepared: PreparedData, trainer: Any, rank: int = 0, world_size: int = 1, workers: int = 0
) -> TrainingLoader:
    """A loader of micro-batches of 3; a step of the trainer consumes one sequence."""
    return TrainingLoader(
        stream_of(prepared),
        5,
        position=StreamPosition(1),
        trainer=trainer,
        accumulation=1,
        micro_batch_size=3,
        rank=rank,
        world_size=world_size,
        num_workers=workers,
        pin_memory=False,
    )


def test_ranks_together_read_the_stream(prepared: PreparedData) -> None:
    stream = stream_of(prepared)
    loaders = [training(prepared, at_step(7), rank, 2, workers=rank) for rank in range(2)]
    rounds = [torch.cat(batches) for batches in zip(*loaders, strict=True)]
    assert len(rounds) == 5 == len(loaders[0])
    assert torch.equal(torch.cat(rounds), stream.__getitems__(range(7, 7 + 5 * 6)))
    loaders[1].close()


def test_the_start_is_asked_for_with_the_first_batch(prepared: PreparedData) -> None:
    trainer = at_step(0)
    iterator = iter(training(prepared, trainer))
    trainer.global_step = 12
    stream = stream_of(prepared)
    assert torch.equal(next(iterator), stream.__getitems__([12, 13, 14]))
    assert torch.equal(next(iterator), stream.__getitems__([15, 16, 17]))


def test_a_second_pass_over_living_workers_starts_anew(prepared: PreparedData) -> None:
    trainer = at_step(0)
    loader = training(prepared, trainer, workers=2)
    first = next(iter(loader))
    trainer.global_step = 3
    second = next(iter(loader))
    trainer.global_step = 0
    assert torch.equal(torch.stack(list(loader))[:2], torch.stack([first, second]))
    loader.close()


def test_the_state_is_the_position(prepared: PreparedData) -> None:
    loader = training(prepared, at_step(4))
    assert loader.state_dict() == {"steps": 4, "sequences": 4}
    loader.load_state_dict({"steps": 1, "sequences": 9})
    assert loader.state_dict() == {"steps": 4, "sequences": 12}


def test_reading_leaves_the_models_random_numbers_alone(prepared: PreparedData) -> None:
    before = torch.get_rng_state()
    for workers in (0, 1):
        loader = training(prepared, at_step(0), workers=workers)
        list(loader)
        loader.close()
    validation = BatchLoader(TrainingSequences([prepared], [1.0], 64, 0, 3), [[0, 1], [2, 3]], 2)
    assert [tuple(batch.shape) for batch in validation] == [(2, 65), (2, 65)]
    assert torch.equal(torch.get_rng_state(), before)


def worker_pids(loader: BatchLoader) -> list[int]:
    return [worker.pid for worker in loader._loader._iterator._workers]


def test_workers_outlive_a_signal_to_the_group_and_end_with_the_loader(
    prepared: PreparedData,
) -> None:
    loader = training(prepared, at_step(0), workers=2)
    iterator = iter(loader)
    batches: list[Tensor] = [next(iterator), next(iterator)]  # one of each worker
    pids = worker_pids(loader)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    batches += iterator
    assert len(batches) == 5
    loader.close()
    assert len(pids) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_program_that_forgets_its_loader_ends(prepared: PreparedData) -> None:
    def program() -> None:
        atexit._clear()  # what only pytest's process has to do
        atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]
        loader = training(prepared, at_step(0), workers=2)
        next(iter(loader))
        atexit._run_exitfuncs()

    process = multiprocessing.get_context("fork").Process(target=program)
    process.start()
    try:
        process.join(timeout=20)
        assert process.exitcode == 0
    finally:
        process.kill()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_chunk_stops_the_loader_with_one_line(
    prepared_path: Path, tmp_path: Path, workers: int
) -> None:
    copy = Path(shutil.copytree(prepared_path, tmp_path / "copy"))
    data = PreparedData(copy)
    damaged = copy / data.chunks("train")[0].name
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    stream = TrainingSequences([PreparedData(copy)], [1.0], 64, seed=0, window=3)
    total = stream.orders[0].length
    batches = [range(start, min(start + 64, total)) for start in range(0, total, 64)]
    made = BatchLoader(stream, batches, len(batches), workers)
    with pytest.raises(UserError) as caught:
        list(made)
    assert str(caught.value).startswith(f"chunk file {damaged} is damaged (checksum); copy it")
    made.close()
