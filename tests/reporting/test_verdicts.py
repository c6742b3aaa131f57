import json

import numpy as np
import pytest

from mhc_lightning.errors import UserError
from mhc_lightning.reporting.logged_runs import read_runs
from mhc_lightning.reporting.summary import choose_baseline, over_seeds, summarise
from mhc_lightning.reporting.verdicts import judge

STEPS = range(10, 1001, 10)


def summaries(*folders, baseline=None):
    runs = read_runs([str(folder) for folder in folders])
    return {s.run.name: s for s in summarise(runs, choose_baseline(runs, baseline))}


@pytest.fixture(scope="module")
def judged(runs):
    return {name: (s, judge(s)) for name, s in summaries(runs).items()}


def test_an_explosion_is_told_with_step_and_sub_layers(judged):
    summary, verdict = judged["hc"]
    assert verdict.state == "unsteady" and verdict.reasons == ["gains left 1", "gradient spike"]
    assert verdict.sentences[:3] == [
        "Composite backward gain reached 41 at step 900, in sub-layers 38 to 44;"
        " it first passed 2 at step 320.",
        "The gradient norm spiked to 9.00 at step 600, 18 times its median.",
        "Loss and gradient norm were finite at every logged step.",
    ]
    assert (
        "Composite forward, single-layer forward and single-layer backward gains stayed at 1"
        in (verdict.sentences[3])
    )
    assert "The mixing matrices are not doubly stochastic: sums were up to 0.70 off 1." in (
        verdict.sentences
    )
    assert verdict.not_judged == []
    assert (summary.gradient.median, summary.gradient.largest, summary.gradient.step) == (
        0.5, 9.0, 600,
    )  # fmt: skip


def test_gaps_hold_the_truth_and_say_so(judged):
    for name, truth in (("hc", -0.016), ("mhc", -0.021)):
        summary, verdict = judged[name]
        loss = summary.gap.loss
        assert summary.gap.baseline == "residual" and summary.gap.same_batches
        assert loss.low <= truth <= loss.high and loss.high - loss.low < 0.05
        (told,) = (s for s in verdict.sentences if "residual" in s)
        assert ("below" in told) == loss.resolved
    assert judged["hc"][0].gap.validation == (1000, pytest.approx(-0.01))
    assert judged["mhc"][0].gap.validation is None
    assert (judged["mhc"][0].gap.loss.first_step, judged["mhc"][0].gap.loss.last_step) == (610, 800)


def test_a_calm_run_is_steady_and_one_that_was_killed_says_so(judged):
    summary, verdict = judged["mhc"]
    assert verdict.label == "steady"
    assert summary.ending == (
        "incomplete", "Incomplete: 800 of 1,000 steps; still running, or killed.",
    )  # fmt: skip
    assert verdict.not_judged == ["validation loss", "stream diversity", "Sinkhorn residual"]
    assert judged["residual"][1].state == "steady"
    assert "It has one stream, so there is nothing to mix." in judged["residual"][1].sentences


def test_nothing_is_said_of_what_another_project_did_not_log(judged):
    summary, verdict = judged["foreign"]
    assert verdict.state == "finite" and "gains" in verdict.not_judged
    assert not any("gain" in s or "stream" in s.lower() for s in verdict.sentences)
    assert summary.ending[0] == "unknown" and summary.gap.same_batches is None
    assert summary.speed is summary.memory is summary.gradient is summary.validation is None


def only_loss(folder, write, values, **more):
    return write.table(folder, {"train/loss": dict(zip(STEPS, values, strict=True)), **more})


@pytest.mark.parametrize(
    ("last", "state", "sentence"),
    [
        (float("nan"), "diverged", "The training loss was not finite at step 1,000."),
        (float("inf"), "diverged", "The training loss was not finite at step 1,000."),
        (2.0, "finite", "Loss was finite at every logged step."),
    ],
)
def test_a_loss_that_is_no_number_is_divergence(tmp_path, write, last, state, sentence):
    only_loss(tmp_path, write, [*np.linspace(4, 2, 99), last])
    (summary,) = summaries(tmp_path).values()
    verdict = judge(summary)
    assert verdict.state == state and verdict.sentences[0] == sentence


def test_a_recorded_end_by_a_non_finite_loss_is_divergence(tmp_path, write):
    write.run(tmp_path, "hc", {"train/loss": {10: 3.0, 20: 2.9}})
    record = json.loads((tmp_path / "environment.json").read_text())
    record["ended"] = {"reason": "the loss became NaN at step 28", "non_finite": True, "step": 27}
    (tmp_path / "environment.json").write_text(json.dumps(record))
    (summary,) = summaries(tmp_path).values()
    verdict = judge(summary)
    assert verdict.state == "diverged"
    assert verdict.sentences[0] == "Ended after step 27 of 1,000: the loss became NaN at step 28."


def test_a_loss_that_rises_again_is_noticed_and_one_that_wavers_is_not(tmp_path, write):
    noise = 0.05 * np.random.default_rng(0).normal(size=100)
    fall = 2 + 2 * np.exp(-np.arange(100) / 10)
    only_loss(tmp_path / "up", write, fall + noise + 0.02 * np.maximum(0, np.arange(100) - 60))
    only_loss(tmp_path / "flat", write, fall + noise)
    found = {name: judge(s) for name, s in summaries(tmp_path).items()}
    assert found["up"].reasons == ["loss rose"]
    assert found["up"].sentences[0].startswith("The training loss rose again: it was 2.0")
    assert found["flat"].state == "finite"


def test_over_seeds_the_gap_is_that_of_pairs(tmp_path, write):
    for seed in (1, 2, 3):
        for kind, offset in (("residual", 0.0), ("mhc", -0.02)):
            scalars = {"train/loss": write.losses(seed + 10 * (kind == "mhc"), offset)}
            write.run(tmp_path / f"{kind}_{seed}", kind, scalars, seed)
    found = summaries(tmp_path)
    for seed in (1, 2, 3):
        assert found[f"mhc_{seed}"].gap.baseline == f"residual_{seed}"
        assert found[f"residual_{seed}"].gap is None
    (group,) = over_seeds(list(found.values()))
    gaps = [found[f"mhc_{seed}"].gap.loss.value for seed in (1, 2, 3)]
    assert group.runs == ["mhc_1", "mhc_2", "mhc_3"]
    assert group.value == pytest.approx(np.mean(gaps))
    assert group.high - group.value == pytest.approx(4.303 * np.std(gaps, ddof=1) / 3**0.5)


def test_runs_that_cannot_be_compared_are_a_user_error(tmp_path, write, runs):
    write.table(tmp_path / "a", {"train/loss": {1: 2.0, 3: 2.0}})
    write.table(tmp_path / "b", {"train/loss": {2: 2.0, 4: 2.0}})
    with pytest.raises(UserError, match="have no step with a train/loss in common"):
        summaries(tmp_path)
    with pytest.raises(UserError, match="baseline=hc is not among the runs"):
        summaries(runs / "mhc", runs / "residual", baseline="hc")
    assert summaries(runs / "mhc", runs / "hc", baseline=str(runs / "hc"))["hc"].gap is None
    assert summaries(runs / "mhc")["mhc"].gap is None
