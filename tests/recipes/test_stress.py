"""The recipe stress: rates that rise until a run fails, and the judgement of runs."""

import json

import library_text
import numpy as np
import pytest
import sweep
from outcome import FORGOT, NOT_FINITE, STALLED, TRAINED, judge

import stress
from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.reporting.metric_series import Series

INFINITY = float("inf")


def losses(*values):
    return Series.of(range(1, 1 + len(values)), values)


def test_how_a_run_ended():
    falling = np.linspace(5, 2, 30)
    assert judge(losses(*falling), False, INFINITY).state == TRAINED
    assert judge(losses(*falling), True, INFINITY).state == NOT_FINITE
    assert judge(losses(5, 4, float("nan"), 3), False, INFINITY).state == NOT_FINITE
    assert judge(losses(), True, INFINITY) == judge(losses(), False, INFINITY)
    forgot = judge(losses(*falling, *np.linspace(2, 4, 10)), False, INFINITY)
    assert forgot.state == FORGOT and not forgot.stable
    assert forgot.loss == pytest.approx(np.linspace(2, 4, 10)[-4:].mean())
    assert forgot.lowest == pytest.approx(np.mean([*falling[-3:], 2]))
    slow = losses(*np.linspace(5, 3, 30))
    assert judge(slow, False, 2.4).state == STALLED
    assert judge(slow, False, 2.7).state == TRAINED
    assert judge(slow, False, 2.7).loss == pytest.approx(slow.values[-3:].mean())
    assert judge(losses(*[5.55] * 24), False, INFINITY).state == STALLED


@pytest.mark.parametrize("size", stress.SIZES)
def test_runs_of_a_rung_differ_in_what_is_varied_alone(size):
    cells = stress.cells_of(stress.SIZES[size], [], [], [])
    assert {"residual", "hc", "mhc"} <= {cell.connection for cell in cells}
    found = []
    for cell in (cells[0], cells[-1]):
        run = cell.run(0.5, str(stress.HERE / f"{size}.yaml"), ("seed=7",))
        words = ["fit", "--config", run.config, *run.overrides]
        values = compose_experiment(parse_arguments(words)).values()
        assert values["optimizer"]["lr"] == 0.5 and values["seed"] == 7
        assert values["model"].pop("num_layers") == cell.depth
        assert values["trainer"].pop("precision") == cell.precision
        for key in ("connection", "output_dir", "logger", "checkpoint"):
            values.pop(key)
        values["model"].pop("connection")
        found.append(values)
    assert found[0] == found[1]


def test_rates_rise_until_a_run_fails(tmp_path, monkeypatch):
    """hc survives 0.03 and then forgets, mhc nothing: its first loss is not finite."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(library_text, "run", lambda *words: None)
    tried = []

    def run_all(runs, folder, slurm, jobs):
        tried.append([run.name for run in runs])
        ended = {}
        for run in runs:
            own = folder / run.name
            own.mkdir(parents=True)
            name, rate = run.name.split("_")[0], float(run.name.split("_")[-1])
            if name == "hc":
                end = 4.0 if rate > 0.03 else 2.0
                rows = [f"{k},{v},{k},1" for k, v in enumerate([5.0] * 5 + [2.0] * 5 + [end] * 5)]
                tags = "step,train/loss,amax_gain/composite/forward,amax_gain/composite/backward"
                (own / "metrics.csv").write_text("\n".join([tags, *rows, ""]))
            ended[run.name] = sweep.Outcome(own, name == "mhc")
        return ended

    monkeypatch.setattr(stress, "run_all", run_all)
    stress.main(
        ["only=hc,mhc", "depths=3", "precisions=32-true", "rates=0.01,0.02,0.04,0.08", "output=out"]
    )
    assert tried == [
        ["hc_3_32-true_0.01", "mhc_3_32-true_0.01"],
        ["hc_3_32-true_0.02"],
        ["hc_3_32-true_0.04"],
        [],
        ["hc_3_32-true_0.0283"],
    ]
    found = json.loads((tmp_path / "out/results/stress.json").read_text())
    hc, mhc = found["cells"]
    assert hc["largest_stable_learning_rate"] == 0.0283 and hc["failed"]
    assert [run["outcome"] for run in hc["runs"]] == ["trained", "trained", "trained", "forgot"]
    assert hc["runs"][0]["largest_composite_gain_forward"] == 14
    assert mhc["largest_stable_learning_rate"] is None
    assert mhc["runs"][0]["last_loss"] == "inf"
    assert len(list((tmp_path / "out/results").glob("*.png"))) == 2


@pytest.mark.parametrize(
    "word", ["size=huge", "only=mch", "depths=0", "depths=2.5", "rates=fast", "rates=-1"]
)
def test_a_word_that_means_nothing_is_one_line(word):
    with pytest.raises(SystemExit, match=f"^error: {word} is not"):
        stress.main([word])
