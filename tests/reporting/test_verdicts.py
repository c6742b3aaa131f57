"""Verdicts: states, reasons and the numbers in sentences; not their wording."""

import json

import numpy as np
import pytest

from mhc_lightning.reporting.baselines import choose_baseline
from mhc_lightning.reporting.logged_runs import read_runs
from mhc_lightning.reporting.summary import summarise
from mhc_lightning.reporting.verdicts import judge

STEPS = range(10, 1001, 10)


def judge_runs(*folders):
    """Summary and verdict by run."""
    runs = read_runs([str(folder) for folder in folders])
    return {s.run.name: (s, judge(s)) for s in summarise(runs, choose_baseline(runs, None))}


@pytest.fixture(scope="module")
def judged(runs):
    return judge_runs(runs)


def sentence(verdict, *words):
    """The one sentence that holds all these words."""
    (found,) = [s for s in verdict.sentences if all(w.lower() in s.lower() for w in words)]
    return found


def test_an_explosion_names_value_step_and_sub_layers(judged):
    summary, verdict = judged["hc"]
    assert verdict.state == "unsteady" and verdict.reasons == ["gains left 1", "gradient spike"]
    explosion = sentence(verdict, "composite backward", "41", "900", "38 to 44")
    assert "320" in explosion  # where it first passed the limit
    spike = sentence(verdict, "gradient norm", "9.00", "600", "18 times")
    calm = sentence(verdict, "loss and gradient norm", "finite")
    assert [explosion, spike, calm] == verdict.sentences[:3]  # the gravest first
    sentence(verdict, "composite forward, single-layer forward and single-layer backward", "at 1")
    sentence(verdict, "not doubly stochastic", "0.70")
    assert verdict.not_judged == []
    assert (summary.gradient.median, summary.gradient.largest, summary.gradient.step) == (
        0.5, 9.0, 600,
    )  # fmt: skip


def test_a_gap_is_a_sentence_with_its_side_and_interval(judged):
    for name in ("hc", "mhc"):
        summary, verdict = judged[name]
        loss = summary.gap.loss
        comparison = sentence(verdict, "residual", loss.interval)
        assert ("below" in comparison) == loss.resolved


def test_a_calm_run_is_steady_and_a_killed_one_incomplete(judged):
    summary, verdict = judged["mhc"]
    assert verdict.label == "steady"
    assert summary.ending.state == "incomplete"
    assert "800 of 1,000" in summary.ending.sentence
    assert verdict.not_judged == ["validation loss", "stream diversity", "Sinkhorn residual"]
    assert judged["residual"][1].state == "steady"
    sentence(judged["residual"][1], "one stream")


def test_unlogged_metrics_are_not_judged(judged):
    summary, verdict = judged["foreign"]
    assert verdict.state == "finite" and "gains" in verdict.not_judged
    assert not any("gain" in s or "stream" in s.lower() for s in verdict.sentences)
    assert summary.ending.state == "unknown"
    assert summary.speed is summary.memory is summary.gradient is summary.validation is None


@pytest.mark.parametrize(
    ("last", "state", "words"),
    [
        (float("nan"), "diverged", ("training loss", "not finite", "1,000")),
        (float("inf"), "diverged", ("training loss", "not finite", "1,000")),
        (2.0, "finite", ("loss", "finite at every")),
    ],
)
def test_a_loss_that_is_not_finite_is_divergence(tmp_path, write, last, state, words):
    values = [*np.linspace(4, 2, 99), last]
    write.table(tmp_path, {"train/loss": dict(zip(STEPS, values, strict=True))})
    ((_, verdict),) = judge_runs(tmp_path).values()
    assert verdict.state == state and sentence(verdict, *words) == verdict.sentences[0]


def test_a_recorded_end_by_a_non_finite_loss_is_divergence(tmp_path, write):
    write.run(tmp_path, "hc", {"train/loss": {10: 3.0, 20: 2.9}})
    record = json.loads((tmp_path / "environment.json").read_text())
    record["ended"] = {"reason": "the loss became NaN at step 28", "non_finite": True, "step": 27}
    (tmp_path / "environment.json").write_text(json.dumps(record))
    ((_, verdict),) = judge_runs(tmp_path).values()
    assert verdict.state == "diverged"
    words = ("step 27 of 1,000", record["ended"]["reason"])
    assert sentence(verdict, *words) == verdict.sentences[0]


def test_a_loss_that_rises_again_is_unsteady_and_one_that_wavers_is_not(tmp_path, write):
    noise = 0.05 * np.random.default_rng(0).normal(size=100)
    fall = 2 + 2 * np.exp(-np.arange(100) / 10)
    rise = 0.02 * np.maximum(0, np.arange(100) - 60)
    for name, values in (("up", fall + noise + rise), ("flat", fall + noise)):
        write.table(tmp_path / name, {"train/loss": dict(zip(STEPS, values, strict=True))})
    found = judge_runs(tmp_path)
    assert found["up"][1].reasons == ["loss rose"]
    lowest = found["up"][0].lowest
    sentence(found["up"][1], f"{lowest.value:.2f}", f"{lowest.first_step} to {lowest.last_step}")
    assert found["flat"][1].state == "finite"
