"""Gaps and fits against numbers worked out by hand."""

import math

import pytest
from gaps import Cost, Measured, estimate, fit_line, last_step, points_at, read_measured

CONFIG = """
data: {batch_size: 8, sequence_length: 128, validation_sequences: 256}
trainer: {max_steps: 40}
"""
COSTS = {"residual": Cost({"total": 9, "active": 5}, 100), "mhc": Cost({"total": 9}, 110)}


def run(losses, diverged=False):
    return Measured(losses, tokens_per_step=10, max_steps=40, diverged=diverged)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def test_a_run_is_read_from_its_folder(folder):
    table = "step,train/loss,val/loss\n10,5.0,\n20,4.0,4.25\n40,3.0,3.125\n"
    (folder / "metrics.csv").write_text(table)
    found = read_measured(folder, diverged=False)
    assert found.losses == {20: 4.25, 40: 3.125} and not found.diverged
    assert (found.tokens_per_step, found.max_steps) == (1024, 40)
    assert found.validation_tokens == 256 * 128
    assert found.folder == folder


def test_a_validation_that_is_not_finite_is_a_divergence(folder):
    (folder / "metrics.csv").write_text("step,val/loss\n20,4.25\n40,nan\n")
    found = read_measured(folder, diverged=False)
    assert found.diverged and found.losses == {20: 4.25}


def test_a_run_without_a_validation_is_a_mistake_unless_it_diverged(folder):
    assert read_measured(folder, diverged=True).losses == {}
    (folder / "metrics.csv").write_text("step,train/loss\n20,4.25\n")
    assert read_measured(folder, diverged=True).losses == {}
    with pytest.raises(SystemExit, match=r"^error: .* was never validated; set .*$"):
        read_measured(folder, diverged=False)


def test_gaps_pair_the_same_seed():
    runs = {
        ("residual", 1): run({40: 2.0}),
        ("mhc", 1): run({40: 1.9}),
        ("residual", 2): run({40: 3.0}),
        ("mhc", 2): run({40: 2.8}),
        ("residual", 3): run({40: 4.0}),
        ("mhc", 3): run({40: 3.7}),
    }
    baseline, point = points_at("small", 40, runs, COSTS)
    assert not baseline.gaps and baseline.flops == 100 * 40 * 10
    assert point.tokens == 400 and point.flops == 110 * 400
    assert point.gaps == pytest.approx({1: -0.1, 2: -0.2, 3: -0.3})
    assert point.ratios == pytest.approx({1: 95.0, 2: 280 / 3, 3: 92.5})
    gap = estimate(point.gaps.values())
    half = 4.303 * 0.1 / math.sqrt(3)  # t of two degrees of freedom
    assert (gap.mean, gap.low, gap.high) == pytest.approx((-0.2, -0.2 - half, -0.2 + half))


def test_a_diverged_seed_is_named_and_not_paired():
    runs = {
        ("residual", 1): run({20: 3.0}, diverged=True),
        ("mhc", 1): run({20: 2.9, 40: 1.9}),
        ("residual", 2): run({20: 3.5, 40: 3.0}),
        ("mhc", 2): run({20: 3.4, 40: 2.8}),
    }
    assert last_step(runs) == 40
    early = points_at("small", 20, runs, COSTS)
    assert [p.diverged for p in early] == [(), ()] and set(early[1].gaps) == {1, 2}
    baseline, point = points_at("small", 40, runs, COSTS)
    assert baseline.diverged == (1,) and not point.diverged
    assert set(point.losses) == {1, 2} and set(point.gaps) == {2}
    found = estimate(point.gaps.values())
    assert (found.low, found.high) == (None, None)
    assert estimate([]) is None


def test_where_all_diverged_the_end_is_the_one_asked_for():
    assert last_step({("residual", 1): run({20: 3.0}, True), ("mhc", 1): run({}, True)}) == 40


def points_on(lines):
    """Points at 10, 100 and 1000 steps whose gap is level + slope · (log10(step) - 2)."""
    runs = {}
    for seed, (level, slope) in lines.items():
        runs["residual", seed] = run({10**k: 3.0 for k in (1, 2, 3)})
        runs["mhc", seed] = run({10**k: 3.0 + level + slope * (k - 2) for k in (1, 2, 3)})
    return [points_at("small", 10**k, runs, COSTS)[1] for k in (1, 2, 3)]


def test_a_line_for_each_seed_and_the_spread_of_these():
    line = fit_line(points_on({1: (-0.02, -0.01), 2: (-0.03, -0.02)}), lambda p: p.gaps)
    assert line.seeds == (1, 2) and line.points == 3
    assert line.centre == pytest.approx(110 * 100 * 10)
    half = 12.706 * 0.005  # t of one degree of freedom; the deviation of ±0.005, over √2
    for found, mean in ((line.value, -0.025), (line.slope, -0.015)):
        assert (found.mean, found.low, found.high) == pytest.approx(
            (mean, mean - half, mean + half)
        )
    assert line.deviation == pytest.approx(0, abs=1e-12)
    assert line.at(line.first) == pytest.approx(-0.01) and line.at(line.last) == pytest.approx(
        -0.04
    )


def test_a_seed_that_misses_a_point_is_left_out_of_the_line():
    points = points_on({1: (-0.02, -0.01), 2: (-0.03, -0.02)})
    del points[1].gaps[2]
    line = fit_line(points, lambda p: p.gaps)
    assert line.seeds == (1,) and line.slope.mean == pytest.approx(-0.01)
    assert (line.slope.low, line.slope.high) == (None, None)


def test_what_is_not_straight_shows_as_deviation():
    points = points_on({1: (0.0, 0.0)})
    points[1].gaps[1] = 0.03  # leaves 0.01 above, 0.01 above, 0.02 below the middle
    line = fit_line(points, lambda p: p.gaps)
    assert line.deviation == pytest.approx(math.sqrt((0.01**2 + 0.01**2 + 0.02**2) / 3))


def test_no_line_through_one_point():
    assert fit_line(points_on({1: (0.0, 0.0)})[:1], lambda p: p.gaps) is None
    assert fit_line([], lambda p: p.gaps) is None
