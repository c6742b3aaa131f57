"""Throughput: tokens of usual batches, and only the time of training."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mhc_lightning.callbacks import Throughput
from mhc_lightning.callbacks.throughput import (
    count_batch_tokens,
    peak_device_flops,
)
from mhc_lightning.errors import UserError


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        (torch.zeros(3, 9, dtype=torch.int64), 24),
        ({"input_ids": torch.zeros(3, 9, dtype=torch.int32), "labels": 1}, 27),
        ((torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3)), 27),
    ],
)
def test_counts_the_tokens_of_usual_batches(batch: Any, tokens: int) -> None:
    assert count_batch_tokens(batch) == tokens


@pytest.mark.parametrize("batch", [torch.zeros(3, 9), {"x": 1}, [], "text", None])
def test_a_batch_it_cannot_count_is_a_user_error(batch: Any) -> None:
    with pytest.raises(UserError, match="count_tokens="):
        count_batch_tokens(batch)


def test_the_peak_of_a_cpu_is_measured_without_random_numbers() -> None:
    state = torch.get_rng_state()
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(strategy=strategy, precision="32-true")
    peak = peak_device_flops(trainer)
    assert 1e8 < peak < 1e14
    assert torch.equal(state, torch.get_rng_state())


def count(batch: Any) -> int:
    return batch.shape[0] * batch.shape[1]


def test_time_of_validation_and_saving_is_left_out(
    foreign: Any, fit: Any, events: Any, tmp_path: Any
) -> None:
    class Slow(foreign.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(1.0 if self.global_step == 0 else 0.02)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time.sleep(0.8)

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            time.sleep(0.4)

    throughput = Throughput(every_n_steps=6, count_tokens=count)
    fit(
        Slow(), throughput,
        ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1),
        max_steps=6, validate=True, val_check_interval=3, limit_val_batches=1,
        num_sanity_val_steps=0, enable_checkpointing=True,
    )  # fmt: skip
    (event,) = events().Scalars("train/tokens_per_second")
    assert event.step == 6
    # 5 steps of 10 tokens in 0.1 s of sleep and what the steps themselves took. Validation, saving,
    # or the first step would add 0.8 s or more each.
    assert 50 / 0.8 < event.value < 50 / 0.1
    assert throughput.total_tokens == 60


def test_accumulated_micro_batches_all_count(foreign: Any, fit: Any) -> None:
    class Even(foreign.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

    throughput = Throughput(every_n_steps=2, count_tokens=count)
    fit(Even(), throughput, max_steps=2, accumulate_grad_batches=4)
    # The window is the second step: 4 micro-batches of 10 tokens in at least 0.08 s.
    assert 40 / 0.3 < throughput.last["train/tokens_per_second"] < 40 / 0.08


def test_utilisation_is_speed_times_flops_over_peak(foreign: Any, fit: Any) -> None:
    class Counting(foreign.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(8, 4)
            self.model = SimpleNamespace(flops_per_token=lambda length: 1000 * length)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(self.embedding(batch), batch_idx)

    tokens: Any = torch.randint(0, 8, (32, 6))
    data = torch.utils.data.DataLoader(tokens, batch_size=2)
    throughput = Throughput(every_n_steps=2, peak_flops=1e6)
    fit(Counting(), throughput, max_steps=4, data=data)
    last = throughput.last
    assert last["step"] == 4
    assert last["train/mfu"] == pytest.approx(last["train/tokens_per_second"] * 5000 / 1e6)


def test_without_a_count_of_flops_there_is_no_utilisation(foreign: Any, fit: Any) -> None:
    throughput = Throughput(every_n_steps=2, count_tokens=count)
    fit(foreign.Module(), throughput, max_steps=2)
    assert set(throughput.last) == {"train/tokens_per_second", "step"}
    assert throughput.peak_flops is None
