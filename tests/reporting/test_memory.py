"""Memories of n-grams on the page: table, figures, JSON, and runs with and without one."""

import json
import re

import pytest
import yaml

from mhc_lightning.reporting.baselines import choose_baseline
from mhc_lightning.reporting.figures.memory_panels import memory_panels
from mhc_lightning.reporting.logged_runs import read_runs
from mhc_lightning.reporting.memory_summary import memory_summary
from mhc_lightning.reporting.report import make_report
from mhc_lightning.reporting.report_folder import write_report
from mhc_lightning.reporting.report_json import report_values
from mhc_lightning.reporting.settings_comparison import differing_settings, same_but_for_the_seed

STEPS = range(10, 1001, 10)
MEMORIES = {
    "none": {"_target_": "mhc_lightning.modules.Memory", "_partial_": True},
    "engram": {"_target_": "mhc_lightning.modules.Engram", "_partial_": True, "rows": 99},
    "over_encoding": {"_target_": "mhc_lightning.modules.OverEncoding", "rows": 77},
}


def constant(value):
    return dict.fromkeys(STEPS, value)


def rising(end):
    """A line from 0 to `end`, flat in the last tenth or the last 20 points."""
    return {step: end * min(1.0, step / 700) for step in STEPS}


GATED = {
    "memory/gate/layer_1": rising(0.4),
    "memory/gate/layer_1/stream_0": rising(0.3),
    "memory/gate/layer_1/stream_1": rising(0.5),
    "memory/gate/layer_14": rising(0.6),
    "memory/added_norm/layer_1": rising(0.02),
    "memory/added_norm/layer_14": rising(0.04),
    "memory/rows_touched": constant(1234.0),
    "memory/rows_touched/layer_1": constant(600.0),
    "memory/collisions": constant(0.125),
    "memory/collisions/order_2": constant(0.1),
}
AT_INPUT = {
    "memory/added_norm/input": rising(0.5),
    "memory/rows_touched": constant(99.0),
    "memory/collisions": constant(0.0),
}


@pytest.fixture(scope="module")
def memories(tmp_path_factory, write):
    """Runs of mhc: before there were memories, without one, and with each."""
    folder = tmp_path_factory.mktemp("memories")
    kinds = {"before": None, "engram": "engram", "none": "none", "over_encoding": "over_encoding"}
    logged = {"engram": GATED, "over_encoding": AT_INPUT}
    for name, memory in kinds.items():
        scalars = {"train/loss": write.losses(1), **logged.get(name, {})}
        run = write.run(folder / name, "mhc", scalars)
        if memory is not None:
            config = yaml.safe_load((run / "config.yaml").read_text())
            config["memory"] = config["model"]["memory"] = MEMORIES[memory]
            (run / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_numbers_are_means_over_the_end(memories):
    report = make_report([str(memories)])
    values = {run["name"]: run["memory_of_ngrams"] for run in report_values(report)["runs"]}
    assert values["before"] is None and values["none"] is None
    engram = values["engram"]
    assert engram["gates"] == pytest.approx({1: 0.4, 14: 0.6})
    assert engram["streams"][1] == pytest.approx([0.3, 0.5]) and engram["streams"][14] == []
    assert engram["added"] == pytest.approx({1: 0.02, 14: 0.04})
    assert (engram["rows_touched"], engram["collisions"]) == (1234, 0.125)
    assert engram["added_at_input"] is None
    assert values["over_encoding"] == {
        "gates": {}, "streams": {}, "added": {}, "added_at_input": pytest.approx(0.5),
        "rows_touched": 99, "collisions": 0,
    }  # fmt: skip
    assert json.loads(json.dumps(values))["engram"]["gates"]["14"] == pytest.approx(0.6)


def test_the_page_has_a_table_and_a_section(memories, tmp_path):
    report = make_report([str(memories)])
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    table = page.split('aria-label="Memories of n-grams"')[1].split("</table>")[0]
    rows = [
        [" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in re.findall(
            r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
    ]  # fmt: skip
    assert rows[1:] == [
        ["engram", "0.500 block 1: 0.400 block 14: 0.600",
         "0.0300 block 1: 0.0200 block 14: 0.0400", "1,234", "12.5%"],
        ["over_encoding", "not logged", "0.500 at the embedding", "99", "0.0%"],
    ]  # fmt: skip
    assert "Memory of n-grams</h2>" in page and "Memory of n-grams.</b>" in page
    names = {file.stem for file in (tmp_path / "figures").glob("memory_*.png")}
    assert names == {
        "memory_gate_block_1", "memory_gate_block_14", "memory_added_norm_block_1",
        "memory_added_norm_block_14", "memory_added_norm_input", "memory_rows_touched",
        "memory_collisions",
    }  # fmt: skip


def test_a_page_without_memories_says_nothing_of_them(memories, tmp_path):
    page = write_report(make_report([str(memories / "none")]), tmp_path).read_text(encoding="utf-8")
    assert "Memories of n-grams" not in page and "Memory of n-grams</h2>" not in page
    assert "<dt>Memory of n-grams</dt><dd>none</dd>" in page


def test_of_many_blocks_some_are_drawn_by_step_and_all_at_the_end(tmp_path, write):
    scalars = {f"memory/gate/layer_{k}": constant(k / 10) for k in (0, 1, 2, 3, 5, 8)}
    write.run(tmp_path / "many", "mhc", scalars)
    report = make_report([str(tmp_path / "many")])
    names = [panel.name for panel in memory_panels(report.runs, report.styles)]
    assert names == [
        "memory_gate_block_0", "memory_gate_block_2", "memory_gate_block_3", "memory_gate_block_8",
        "memory_gate_by_block",
    ]  # fmt: skip
    page = write_report(report, tmp_path / "page").read_text(encoding="utf-8")
    assert "0.317<small>" in re.sub(r"\s", "", page)
    assert "block 0: 0.00<" in page and "block 8: 0.800<" in page and "block 3:" not in page
    assert memory_summary({}) is None


def test_runs_without_a_memory_are_alike_and_are_the_baseline(memories):
    before, engram, none, over_encoding = read_runs(
        [str(memories / name) for name in ("before", "engram", "none", "over_encoding")]
    )
    assert same_but_for_the_seed(before, none)
    assert not same_but_for_the_seed(none, engram)
    assert choose_baseline([engram, over_encoding, none], None) is none
    assert choose_baseline([engram, over_encoding], None) is engram
    settings = differing_settings([none, engram, over_encoding])
    assert settings.pop("output_dir", None) is None and settings.pop("logger", None) is None
    assert settings == {
        "memory._target_": [None, MEMORIES["engram"]["_target_"],
                            MEMORIES["over_encoding"]["_target_"]],
        "memory.rows": [None, 99, 77],
    }  # fmt: skip
