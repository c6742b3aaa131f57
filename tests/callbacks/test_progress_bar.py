"""The progress of training: plain lines in a pipe, one bar on a terminal."""

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mhc_lightning.callbacks import AmaxGain, ProgressBar, Throughput
from mhc_lightning.callbacks.progress_bar import total_steps, worst_composite_gain

LINE = re.compile(
    r"step (\d+)/4  loss (\d+\.\d{4})(  val loss \d+\.\d{4})?"
    r"(  [\d,]+ tokens/s)?  gain ([\d.]+)(  [\d,]+ tokens/s)?  \d\d:\d\d<\d\d:\d\d"
)


def callbacks() -> tuple[Any, ...]:
    return AmaxGain(), Throughput(count_tokens=len), ProgressBar()


def test_a_pipe_gets_one_plain_line_per_logging_step(
    foreign: Any, fit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    instruments = callbacks()
    trainer = fit(
        foreign.Module(), *instruments, max_steps=4, validate=True, val_check_interval=3,
        limit_val_batches=2, enable_progress_bar=True,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "\r" not in out
    assert "\x1b" not in out
    lines = [match for line in out.splitlines() if (match := LINE.fullmatch(line))]
    assert [match[1] for match in lines] == ["2", "4"]
    assert float(lines[1][2]) == pytest.approx(
        trainer.logged_metrics["train/loss"].item(), abs=1e-4
    )
    gain = worst_composite_gain(instruments[0].last)
    assert float(lines[1][5]) == pytest.approx(gain, abs=1e-3)
    assert re.search(r"^step 3  validation loss \d+\.\d{4}$", out, re.MULTILINE)


def test_a_terminal_gets_one_bar_over_optimizer_steps(
    foreign: Any, fit: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fit(
        foreign.Module(), *callbacks(), max_steps=4, accumulate_grad_batches=2, validate=True,
        val_check_interval=4, limit_val_batches=2, enable_progress_bar=True,
    )  # fmt: skip
    out = capsys.readouterr().out
    last = out.replace("\n", "\r").rstrip("\r").split("\r")
    final = [line for line in last if line.startswith("step 100%")][-1]
    assert "4/4" in final
    assert "gain" in final
    assert "val loss" in final
    assert "step 2  validation" not in out  # no loose lines between the bars


def test_the_loss_of_modules_that_log_none(
    foreign: Any, fit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    class Silent(foreign.Module):
        losses: list[float]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = (self(batch) - 1).square().mean()
            self.losses.append(loss.item())
            return loss

    module = Silent()
    module.losses = []
    fit(module, ProgressBar(), max_steps=2, accumulate_grad_batches=2, enable_progress_bar=True)
    shown = re.search(r"step 2/2  loss ([\d.]+)", capsys.readouterr().out)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(module.losses[-1], abs=1e-4)


def test_disabled_it_says_nothing(
    foreign: Any, fit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = ProgressBar()
    bar.disable()
    fit(foreign.Module(), bar, max_steps=2, enable_progress_bar=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "batches", "total"),
    [(10, None, 64, 10), (10, -1, float("inf"), 10), (-1, 2, 9, 6), (5, 2, 9, 5), (10, 2, 9, 6)],
)
def test_the_last_step_is_known_from_steps_or_epochs(
    max_steps: int, max_epochs: Any, batches: float, total: int
) -> None:
    trainer: Any = SimpleNamespace(
        max_steps=max_steps, max_epochs=max_epochs, num_training_batches=batches,
        accumulate_grad_batches=4,
    )  # fmt: skip
    assert total_steps(trainer) == total


def test_an_endless_run_has_no_last_step() -> None:
    trainer: Any = SimpleNamespace(max_steps=-1, max_epochs=-1, num_training_batches=3)
    assert total_steps(trainer) is None
