"""The search for layouts finds what simulating all of them would find."""

from typing import Any

import pytest

from mhc_lightning.errors import UserError
from mhc_lightning.planning import DataParallel, PlannedRun, machine_of, precision_of
from mhc_lightning.planning.layout_search import _Times, search_layouts, why_first
from mhc_lightning.planning.layouts import candidates

SIZES: dict[str, Any] = {
    "num_experts": 8,
    "num_active_experts": 2,
    "num_shared_experts": 1,
    "num_layers": 4,
    "vocab_size": 100,
    "dim": 256,
    "num_heads": 3,
    "head_dim": 16,
    "rope_dim": 8,
    "kv_rank": 24,
    "ffn_dim": 256,
}


def a_run(**changes):
    settings = {
        "batch_size": 16,
        "micro_batch_size": 1,
        "sequence_length": 512,
        "max_steps": 10,
        "precision": precision_of("bf16-mixed"),
        "replicas": DataParallel(),
        "state_per_value": lambda model, parameter: 2,
    }
    return PlannedRun(**{**settings, **changes})


@pytest.fixture(scope="module")
def searched():
    """A model and a machine, all predictions, and what is found with pruning."""
    from networks import CONNECTIONS

    from mhc_lightning.modules import Transformer

    model = Transformer(connection=CONNECTIONS["mhc"], **SIZES)
    machine = machine_of("8xh200")
    every = list(candidates(model, a_run(), machine, split_backward=True))
    times = _Times(model, machine)
    predicted = [(times.fastest(each), times.predict(each)) for each in every]
    return model, machine, predicted, search_layouts(model, a_run(), machine)


def test_layouts_are_those_that_devices_experts_and_batch_allow(searched):
    model, machine, predicted, _ = searched
    layouts = [layout for _, layout in predicted]
    assert all(layout.run.devices == 8 for layout in layouts)
    assert {layout.pipeline_size for layout in layouts} == {1, 2, 4}
    spreads = {layout.run.replicas.experts.size for layout in layouts}
    assert spreads == {1, 2, 4, 8}
    assert {layout.name for layout in layouts if layout.pipeline_size == 1} == {"ddp", "fsdp"}
    assert {layout.name for layout in layouts if layout.pipeline_size == 2} == {
        *("gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev")
    }
    assert {layout.recompute for layout in layouts} == {"off", "auto"}
    whole = list(candidates(model, a_run(), machine, split_backward=False))
    assert 0 < len(whole) < len(layouts)


def test_no_layout_is_faster_than_its_bound(searched):
    for bound, layout in searched[2]:
        assert bound <= layout.seconds * (1 + 1e-9), layout.settings


def test_the_search_finds_the_best_of_all(searched):
    _, _, predicted, found = searched
    best = sorted(layout.seconds for _, layout in predicted)[:10]
    assert [layout.seconds for layout in found.layouts] == pytest.approx(best)
    assert found.tried == len(predicted)
    assert found.simulated < found.tried


def test_it_says_why_the_first_wins(searched):
    _, _, _, found = searched
    first = found.layouts[0]
    sentence = why_first(found.layouts)
    assert sentence.startswith("The first is ") and sentence.endswith(".")
    assert sentence.count(".") <= 4 and "less per step" in sentence
    assert why_first([first]) == "It is the only layout that fits."
    record = found.record()
    assert record["layouts"][0]["tokens_per_second"] == pytest.approx(16 * 512 / first.seconds)
    assert record["why"] == sentence


def test_a_batch_that_no_layout_shares_out_is_refused(build):
    model = build("residual", num_layers=2)
    with pytest.raises(UserError, match="use a multiple of 7, or fewer devices"):
        search_layouts(model, a_run(batch_size=5), machine_of("7xh200"))


def test_a_model_that_fits_nowhere_is_refused(build):
    model = build("mhc", num_layers=2)
    with pytest.raises(UserError, match=r"no layout fits .*: use more devices"):
        search_layouts(model, a_run(sequence_length=2**28, batch_size=2), machine_of("2xh100"))
