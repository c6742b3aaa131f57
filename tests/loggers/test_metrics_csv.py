"""The table of metrics: one row per step, exact numbers, resumed without a step twice."""

import csv
import errno
import os
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from full_disk import file_size_limit
from torch.utils.data import DataLoader

from mhc_lightning.errors import UserError
from mhc_lightning.loggers import MetricsCSV, metrics_csv


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_values_of_a_step_share_a_row_and_keep_every_bit(tmp_path):
    log = MetricsCSV(tmp_path)
    value = torch.tensor(0.1)
    log.log_metrics({"a": value, "ok": True, "image": torch.zeros(3)}, 1)
    log.log_metrics({"b": 2.5e-7}, 1)
    log.log_metrics({"a": float("nan")}, 2)
    log.log_metrics({"late": 1 / 3}, 3)
    log.log_metrics({"a": -1}, 3)
    assert rows(tmp_path) == [
        {"step": "1", "a": repr(value.item()), "ok": "1", "b": "2.5e-07"},
        {"step": "2", "a": "nan"},
        {"step": "3", "a": "-1", "late": repr(1 / 3)},
    ]
    assert float(rows(tmp_path)[0]["a"]) == value.item()
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,a,ok,b,late"


def test_a_late_value_for_an_earlier_step_finds_its_row(tmp_path):
    log = MetricsCSV(tmp_path)
    for step in (1, 3, 5):
        log.log_metrics({"a": step}, step)
    log.log_metrics({"b": 9}, 3)
    log.log_metrics({"b": 8}, 2)
    log.log_metrics({"a": 6}, 6)
    assert [tuple(row.values()) for row in rows(tmp_path)] == [
        ("1", "1"),
        ("2", "8"),
        ("3", "3", "9"),
        ("5", "5"),
        ("6", "6"),
    ]


@pytest.mark.parametrize("cut", [0, 1, 3, 9])
def test_resuming_drops_later_rows_and_a_cut_line(tmp_path, cut):
    log = MetricsCSV(tmp_path)
    for step in range(1, 6):
        log.log_metrics({"loss": step / 7, "a,b": step}, step)
    whole = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(whole[: len(whole) - cut])
    again = MetricsCSV(tmp_path)
    again.resume_from(3)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]
    again.log_metrics({"a,b": 4, "loss": 4 / 7}, 4)
    again.log_metrics({"loss": 5 / 7, "a,b": 5}, 5)
    assert (tmp_path / "metrics.csv").read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 3])
def test_a_cut_line_is_no_row_even_if_it_reads_as_one(tmp_path, cut):
    log = MetricsCSV(tmp_path)
    for step in range(1, 6):
        log.log_metrics({"loss": step / 7}, step)
    whole = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(whole[: len(whole) - cut])  # a number with fewer digits
    MetricsCSV(tmp_path).resume_from(5)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3", "4"]


def test_a_full_disk_delays_rows_and_does_not_stop_the_run(tmp_path):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a": 0.0}, 0)
    size = (tmp_path / "metrics.csv").stat().st_size
    with file_size_limit(size + 6), pytest.warns(RuntimeWarning, match="metrics.csv") as warned:
        for step in range(1, 5):
            log.log_metrics({"a": float(step)}, step)
        log.log_metrics({"new": 1.0}, 4)
    assert len(warned) == 1
    assert rows(tmp_path)[0] == {"step": "0", "a": "0.0"}
    log.log_metrics({"a": 5.0}, 5)
    assert [(row["step"], row.get("a"), row.get("new")) for row in rows(tmp_path)] == [
        ("0", "0.0", None),
        ("1", "1.0", None),
        ("2", "2.0", None),
        ("3", "3.0", None),
        ("4", "4.0", "1.0"),
        ("5", "5.0", None),
    ]


def test_a_new_column_that_cannot_be_written_is_not_lost(tmp_path, monkeypatch):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a": 1}, 1)
    write = metrics_csv.write_text_atomically

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics_csv, "write_text_atomically", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        log.log_metrics({"b": 2}, 2)
    monkeypatch.setattr(metrics_csv, "write_text_atomically", write)
    log.log_metrics({"c": 3}, 3)
    assert rows(tmp_path) == [
        {"step": "1", "a": "1"},
        {"step": "2", "b": "2"},
        {"step": "3", "c": "3"},
    ]


def test_a_flipped_byte_does_not_keep_a_run_from_going_on(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"step,loss\n1,2.0\n2,1\xff5\n3,1.0\n")
    logger = MetricsCSV(tmp_path)
    logger.resume_from(2)
    logger.log_metrics({"loss": 4.0}, 3)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]
    assert rows(tmp_path)[0]["loss"] == "2.0" and float(rows(tmp_path)[2]["loss"]) == 4.0


def test_lightnings_checkpoints_lie_beside_the_table(tmp_path):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", devices=1, logger=MetricsCSV(tmp_path),
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data: Any = torch.ones(2, 2)
    trainer.fit(Module(), DataLoader(data))
    assert [path.suffix for path in (tmp_path / "checkpoints").iterdir()] == [".ckpt"]


def test_a_table_without_steps_is_a_user_error(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,loss\n1,2.0\n")
    for use in (lambda log: log.resume_from(1), lambda log: log.log_metrics({"loss": 1.0}, 2)):
        with pytest.raises(UserError, match=r"metrics\.csv has no column 'step'.*move"):
            use(MetricsCSV(tmp_path))
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss\n1,2.0\n"
