"""The search for block sizes, with a timer that knows the answer."""

import json
import math

import pytest
import torch

from mhc_lightning.kernels.triton_support import tuning
from mhc_lightning.kernels.triton_support.block_sizes import (
    Config,
    Lookup,
    add_to_table,
    read_table,
)
from mhc_lightning.kernels.triton_support.workloads import workloads

START = Config(8, 64, 4, 2)


def distance(config, goal):
    return sum(abs(math.log2(a / b)) for a, b in zip(config, goal, strict=True))


def test_the_search_walks_to_the_fastest_and_around_what_does_not_compile():
    goal, tried = Config(16, 128, 8, 2), []

    def seconds(config):
        tried.append(config)
        return math.inf if config.num_warps == 4 and config != START else 1 + distance(config, goal)

    choice = tuning.search(Lookup("merge_forward", "shape", START), seconds)
    assert choice.config == goal
    assert (choice.before, choice.after) == (4, 1)
    assert len(tried) == len(set(tried)) == choice.tried < 30


def test_a_gain_within_the_noise_changes_nothing():
    def seconds(config):
        return 1.0 if config == START else 0.99

    choice = tuning.search(Lookup("merge_forward", "shape", START), seconds)
    assert choice.config == START and choice.before == choice.after == 1


def test_neighbours_stay_within_what_a_kernel_can_take():
    products = tuning.neighbours("merge_project", Config(16, 16, 1, 1))
    assert set(products) == {
        Config(32, 16, 1, 1), Config(16, 32, 1, 1), Config(16, 16, 2, 1), Config(16, 16, 1, 2)
    }  # fmt: skip
    assert {c.block_width for c in tuning.neighbours("sinkhorn_forward", Config(8, 1, 1, 1))} == {1}


def test_kernels_are_measured_with_what_is_tried_and_wrong_results_are_refused(monkeypatch):
    """In the interpreter; the timer sees which block sizes the launch was made with."""
    from mhc_lightning.kernels.triton_support import launch

    launched = []
    run = launch.Launch.run

    def noted(item):
        launched.append(item)
        run(item)

    def seconds(call):
        launched.clear()
        with launch.intercept(noted):
            call()
        return 1.0 / launched[0].num_warps

    work = workloads(5, 2, 32, torch.float32)
    wrong = 8  # warps, with which the kernel shall compute something else

    def agree(results, expected, honest=tuning._agree):
        with launch.intercept(noted):
            work["merge_forward"].run()
        if launched[-1].num_warps == wrong:
            results = results + 1
        return honest(results, expected)

    monkeypatch.setattr(tuning, "_agree", agree)
    (choice,) = tuning.tune(work, ["merge_forward"], seconds)
    assert choice.lookup.kernel == "merge_forward" and choice.lookup.key == "n2-c32-float32"
    assert choice.config.num_warps == wrong // 2
    assert choice.after <= choice.before


@pytest.mark.parametrize("name", sorted(workloads(1, 1, 16, torch.bfloat16)))
def test_every_workload_can_be_tuned(name):
    work = workloads(3, 2, 32, torch.bfloat16)
    (choice,) = tuning.tune(work, [name], lambda call: 1.0)
    assert choice.lookup.kernel == name
    assert choice.tried > 3


def test_a_table_takes_one_choice_after_the_other(tmp_path):
    path = tmp_path / "cache" / "gpu.json"
    for kernel, key in (("a", "n4"), ("b", "n4"), ("a", "n2"), ("a", "n4")):
        add_to_table(path, kernel, key, START, {"device": "a GPU"})
    assert read_table(path) == {"a": {"n4": START, "n2": START}, "b": {"n4": START}}
    assert json.loads(path.read_text())["device"] == "a GPU"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "values",
    [[-16, 64, 4, 2], [0, 64, 4, 2], [16, 48, 4, 2], [16, 64, 64, 2], [16, 64, 4, 0], [16]],
)
def test_sizes_that_no_kernel_can_have_are_left_out(tmp_path, values):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"choices": {"merge_forward": {"n4-c64-float32": values}}}))
    with pytest.warns(UserWarning, match="which is no table of block sizes"):
        assert read_table(file) == {}
