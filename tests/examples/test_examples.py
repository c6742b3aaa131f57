"""The examples, run as a user runs them, only shorter."""

import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, output: Path, *options: str) -> tuple[str, EventAccumulator]:
    command = [sys.executable, str(EXAMPLES / name), "--output", str(output), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    (events,) = output.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events), size_guidance={"images": 0})
    accumulator.Reload()
    return result.stdout, accumulator


@pytest.mark.parametrize(("connection", "n"), [("mhc", 4), ("hc", 2)])
def test_a_vision_transformer_of_ones_own(connection: str, n: int, tmp_path: Path) -> None:
    stdout, events = run(
        "vision_transformer.py", tmp_path, "--connection", connection,
        "--steps", "60", "--blocks", "2", "--dim", "16", "--num-streams", str(n),
    )  # fmt: skip
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses[-1] < losses[0]
    assert "held-out accuracy" in stdout
    gains = {e.step: e.value for e in events.Scalars("amax_gain/composite/forward")}
    assert list(gains) == [10, 20, 30, 40, 50, 60]
    if connection == "mhc":
        assert list(gains.values()) == pytest.approx([1.0] * 6, abs=1e-5)
        assert events.Scalars("sinkhorn_residual/row")[-1].value < 1e-5
    assert "stream_matrices/composite_0_to_3" in events.Tags()["images"]
    assert events.Scalars("stream_diversity/mean")[-1].value > 0


def test_watching_deepseek_v4(tmp_path: Path) -> None:
    stdout, events = run("watch_deepseek_v4.py", tmp_path, "--steps", "20", "--layers", "2")
    forward = events.Scalars("amax_gain/composite/forward")[-1].value
    # Turned over, its rows are exact but for its epsilons of 1e-6; as stored, they would not be.
    assert forward == pytest.approx(1.0, abs=1e-4)
    assert events.Scalars("sinkhorn_residual/row")[-1].value < 1e-4
    scalars = events.Tags()["scalars"]
    assert "amax_gain/composite/backward/layer_3" in scalars  # two blocks of two
    assert "amax_gain/composite/backward/layer_4" not in scalars
    assert "stream_diversity/layer_3" in scalars
    assert "step 20/20" in stdout


def test_a_pipeline_of_ones_own() -> None:
    """Two stages on each of two devices, whose gradients are clipped by their common norm."""
    losses = []
    for options in ((), ("--devices", "2", "--schedule", "zbv")):
        command = [sys.executable, str(EXAMPLES / "pipeline_your_own.py"), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        losses.append([float(line.split()[-1]) for line in done.stdout.splitlines()])
    assert len(losses[0]) == 9 and losses[0][-1] < 0.7 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)


@pytest.mark.parametrize("name", ["vision_transformer.py", "watch_deepseek_v4.py"])
def test_help_says_what_one_sees(name: str) -> None:
    command = [sys.executable, str(EXAMPLES / name), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "tensorboard --logdir" in result.stdout
