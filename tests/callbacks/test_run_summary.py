"""The summary of a run: its numbers, where its files are, and when there is none."""

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from mhc_lightning.callbacks import AmaxGain, RunSummary, Throughput
from mhc_lightning.formatting import format_gain
from mhc_lightning.loggers import MetricsCSV


def table(text: str) -> dict[str, str]:
    lines = text[text.index("Run summary") :].splitlines()[1:]
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines if line.strip())


def test_says_what_the_run_came_to(
    foreign: Any, fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gain = AmaxGain()
    trainer = fit(
        foreign.Module(), gain, Throughput(count_tokens=len), RunSummary(),
        ModelCheckpoint(tmp_path / "checkpoints"), enable_checkpointing=True,
        max_steps=4, validate=True, val_check_interval=2, limit_val_batches=2,
    )  # fmt: skip
    rows = table(capsys.readouterr().out)
    assert rows["optimizer steps"] == "4"
    assert float(rows["training loss"]) == pytest.approx(
        trainer.callback_metrics["train/loss"].item(), abs=1e-4
    )
    assert float(rows["validation loss"]) > 0
    assert "validation perplexity" not in rows  # this module logs none
    peak = gain.peaks["amax_gain/composite/backward"]
    assert (
        f"backward {format_gain(peak.value)} (sub-layer {peak.layer}, step {peak.step})"
        in (rows["largest composite gain"])
    )
    assert rows["tokens"].startswith("8, at the end ")
    assert rows["logs"] == f"{tmp_path / 'tb'}, {tmp_path / 'csv'}"
    assert rows["checkpoints"] == str(tmp_path / "checkpoints")
    assert "#custom_scalars" in rows["watch"]


def test_a_run_without_tensorboard_is_not_sent_there(
    foreign: Any, fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(foreign.Module(), RunSummary(), max_steps=2, logger=MetricsCSV(tmp_path))
    rows = table(capsys.readouterr().out)
    assert rows["logs"] == str(tmp_path)
    assert "watch" not in rows


def test_a_resumed_run_says_so(
    foreign: Any, fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fit(foreign.Module(), max_steps=2)
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = fit(foreign.Module(), RunSummary(), max_steps=1)
    capsys.readouterr()
    again.fit_loop.epoch_loop.max_steps = 5
    path = tmp_path / "a.ckpt"
    again.fit(foreign.Module(), again.train_dataloader, ckpt_path=path, weights_only=False)
    assert table(capsys.readouterr().out)["optimizer steps"] == "5 (resumed at 2)"


def test_a_run_that_failed_gets_none(
    foreign: Any, fit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(foreign.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fit(Failing(), RunSummary())
    assert "Run summary" not in capsys.readouterr().out
