"""The examples, run as a user runs them, only shorter."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Returns a function: runs an example as a program in this process; its standard output."""

    def run(name: str, *options: str) -> str:
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which the example sets, too
        monkeypatch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def events_in(output: Path) -> EventAccumulator:
    """The TensorBoard events under a folder."""
    (events,) = output.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize(("connection", "n"), [("mhc", 4), ("hc", 2)])
def test_a_vision_transformer_of_ones_own(
    connection: str, n: int, run: Run, tmp_path: Path
) -> None:
    stdout = run(
        "vision_transformer.py", "--output", str(tmp_path), "--connection", connection,
        "--steps", "50", "--blocks", "2", "--dim", "16", "--num-streams", str(n),
    )  # fmt: skip
    events = events_in(tmp_path)
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses[-1] < losses[0]
    assert "held-out accuracy" in stdout
    gains = {e.step: e.value for e in events.Scalars("amax_gain/composite/forward")}
    assert list(gains) == [10, 20, 30, 40, 50]
    if connection == "mhc":
        assert list(gains.values()) == pytest.approx([1.0] * 5, abs=1e-5)
        assert events.Scalars("sinkhorn_residual/row")[-1].value < 1e-5
    assert "stream_matrices/composite_0_to_3" in events.Tags()["images"]
    assert events.Scalars("stream_diversity/mean")[-1].value > 0


def test_watching_deepseek_v4(run: Run, tmp_path: Path) -> None:
    options = ("--output", str(tmp_path), "--steps", "20", "--layers", "2")
    stdout = run("watch_deepseek_v4.py", *options)
    events = events_in(tmp_path)
    forward = events.Scalars("amax_gain/composite/forward")[-1].value
    # Turned over, its rows are exact but for its epsilons of 1e-6; as stored, they would not be.
    assert forward == pytest.approx(1.0, abs=1e-4)
    assert events.Scalars("sinkhorn_residual/row")[-1].value < 1e-4
    scalars = events.Tags()["scalars"]
    assert "amax_gain/composite/backward/layer_3" in scalars  # two blocks of two
    assert "amax_gain/composite/backward/layer_4" not in scalars
    assert "stream_diversity/layer_3" in scalars
    assert "step 20/20" in stdout


def test_a_pipeline_of_ones_own(run: Run) -> None:
    """Two stages on each of two devices, whose gradients are clipped by their common norm."""
    alone = run("pipeline_your_own.py")
    command = [sys.executable, str(EXAMPLES / "pipeline_your_own.py"), "--devices", "2"]
    done = subprocess.run(
        [*command, "--schedule", "zbv"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [
        [float(line.split()[-1]) for line in stdout.splitlines()] for stdout in (alone, done.stdout)
    ]
    assert len(losses[0]) == 9 and losses[0][-1] < 0.7 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)


@pytest.mark.parametrize("name", ["vision_transformer.py", "watch_deepseek_v4.py"])
def test_help_says_what_one_sees(name: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert ended.value.code == 0
    assert "tensorboard --logdir" in capsys.readouterr().out
