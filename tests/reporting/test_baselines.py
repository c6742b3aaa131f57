"""Baselines: which run is compared with which, and gaps that hold the truth."""

import numpy as np
import pytest

from mhc_lightning.errors import UserError
from mhc_lightning.reporting.baselines import choose_baseline, gaps_over_seeds
from mhc_lightning.reporting.logged_runs import read_runs
from mhc_lightning.reporting.summary import summarise


def summaries(*folders, baseline=None):
    runs = read_runs([str(folder) for folder in folders])
    return {s.run.name: s for s in summarise(runs, choose_baseline(runs, baseline))}


def test_gaps_are_taken_at_common_steps_and_hold_the_truth(runs):
    found = summaries(runs)
    for name, truth in (("hc", -0.016), ("mhc", -0.021)):
        gap = found[name].gap
        assert gap.baseline == "residual" and gap.same_batches
        assert gap.loss.low <= truth <= gap.loss.high and gap.loss.high - gap.loss.low < 0.05
    assert found["hc"].gap.validation == (1000, pytest.approx(-0.01))
    assert found["mhc"].gap.validation is None
    assert (found["mhc"].gap.loss.first_step, found["mhc"].gap.loss.last_step) == (610, 800)
    assert found["foreign"].gap.same_batches is None


def test_over_seeds_the_gap_is_that_of_pairs(tmp_path, write):
    for seed in (1, 2, 3):
        for kind, offset in (("residual", 0.0), ("mhc", -0.02)):
            scalars = {"train/loss": write.losses(seed + 10 * (kind == "mhc"), offset)}
            write.run(tmp_path / f"{kind}_{seed}", kind, scalars, seed)
    found = summaries(tmp_path)
    for seed in (1, 2, 3):
        assert found[f"mhc_{seed}"].gap.baseline == f"residual_{seed}"
        assert found[f"residual_{seed}"].gap is None
    (group,) = gaps_over_seeds([(s.run, s.gap) for s in found.values()])
    gaps = [found[f"mhc_{seed}"].gap.loss.value for seed in (1, 2, 3)]
    assert group.runs == ["mhc_1", "mhc_2", "mhc_3"]
    assert group.value == pytest.approx(np.mean(gaps))
    assert group.high - group.value == pytest.approx(4.303 * np.std(gaps, ddof=1) / 3**0.5)


def test_the_baseline_is_the_residual_run_or_the_one_that_is_named(runs):
    found = read_runs([str(runs / "hc"), str(runs / "residual"), str(runs / "mhc")])
    assert choose_baseline(found, None).name == "residual"
    assert choose_baseline(found, "mhc").name == "mhc"
    assert choose_baseline(found, str(runs / "hc")).name == "hc"
    assert choose_baseline(found[::2], None).name == "hc"  # without a residual run the first
    assert choose_baseline(found[:1], None) is None
    with pytest.raises(UserError, match="baseline=hc is not among the runs"):
        choose_baseline(found[1:], "hc")


def test_runs_without_a_common_step_cannot_be_compared(tmp_path, write):
    write.table(tmp_path / "a", {"train/loss": {1: 2.0, 3: 2.0}})
    write.table(tmp_path / "b", {"train/loss": {2: 2.0, 4: 2.0}})
    with pytest.raises(UserError, match="no step with a train/loss in common"):
        summaries(tmp_path)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda config, environment: None, True),
        (lambda config, environment: config["data"].update(batch_size=4), False),
        (lambda config, environment: config["data"].update(path="elsewhere"), True),
        (lambda config, environment: environment["data"].update(content=["0" * 32]), False),
        (lambda config, environment: environment.pop("data"), True),
        (lambda config, environment: config.pop("data"), None),
    ],
)
def test_batches_are_the_same_where_data_and_order_are(runs, change, same):
    from copy import deepcopy
    from dataclasses import replace

    from mhc_lightning.reporting.settings_comparison import same_batches

    run, other = read_runs([str(runs / "hc"), str(runs / "mhc")])
    config, environment = deepcopy((other.config, other.environment))
    change(config, environment)
    assert same_batches(run, replace(other, config=config, environment=environment)) is same
