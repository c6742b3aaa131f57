"""The recipe downstream: models evaluated on benchmarks, beside the paper."""

import contextlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import benchmark_scores
import pytest
import torch
from benchmark_scores import PAPER, rows_of
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import _factory
from local_tasks import write_local_tasks

import downstream
from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.components import build_model
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.cli.main import main as command
from mhc_lightning.data.tokenizers import ByteTokenizer
from mhc_lightning.evaluation import harness_tasks
from mhc_lightning.evaluation.harness_model import HarnessModel
from mhc_lightning.evaluation.harness_tasks import load_tasks, run_tasks, task_manager
from mhc_lightning.interchange import export_model, load_exported

SMALL = """
model.dim=16 model.num_layers=2 model.num_heads=2 model.head_dim=8 model.rope_dim=4 model.kv_rank=8
model.ffn_dim=24 model.init_std=0.5 data.sequence_length=128 trainer.accelerator=cpu
""".split()  # noqa: SIM905
CONNECTIONS = {
    "residual": ["connection=residual"],
    "hc": ["connection=hc", "connection.tanh=false", "model.num_streams=2"],
    "mhc": ["connection=mhc", "connection.sinkhorn_iterations=3", "model.num_streams=3"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An exported model of each kind, and the run of step 0 that `import` makes of it."""
    folder = tmp_path_factory.mktemp("models")
    for name, words in CONNECTIONS.items():
        config = ["--config", "mhc_quickstart", *SMALL, *words]
        experiment = compose_experiment(parse_arguments(["fit", *config]))
        network = build_model(experiment).model
        with torch.no_grad():
            for parameter in network.parameters():  # at first all compute the same
                parameter.add_(0.3 * torch.randn_like(parameter))
        export_model(
            network,
            folder / f"exported_{name}",
            settings=experiment.values()["model"],
            tokenizer=ByteTokenizer(),
        )
        own = (f"input={folder / f'exported_{name}'}", f"output_dir={folder / name}")
        assert command(["import", *config, *own]) == 0
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks, = {1}")
    write_local_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def words(models):
    """A run, a checkpoint, and an exported model."""
    return [
        f"residual={models / 'residual'}",
        f"hc={models / 'hc' / 'checkpoints' / 'last'}",
        f"mhc={models / 'exported_mhc'}",
    ]


def test_every_kind_of_model_is_evaluated_as_what_it_is(
    words, models, tasks, monkeypatch, tmp_path, capsys
):
    manager = task_manager(tasks)  # takes long to make
    monkeypatch.setattr(harness_tasks, "task_manager", lambda include_path: manager)

    def run(*words, capture):  # in this process
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert command(list(words)) == 0
        return printed.getvalue()

    monkeypatch.setattr(downstream, "run", run)
    names = ["local_choice", "local_text"]
    asked = [f"tasks={','.join(names)}", f"include_path={tasks}", "data.tokenizer=bytes"]
    downstream.main([*words, *asked, "limit=3", f"output={tmp_path}"])
    printed = capsys.readouterr().out

    table = json.loads((tmp_path / "table.json").read_text())
    for name in CONNECTIONS:
        network = load_exported(models / f"exported_{name}")
        model = HarnessModel(network, ByteTokenizer(), batch_size=8, max_length=128)
        expected = run_tasks(model, load_tasks(manager, names), limit=3)["results"]
        for row in table["rows"]:
            value = row["scores"][name]["value"]
            assert value == pytest.approx(expected[row["task"]][row["metric"]], rel=1e-5)
    rows = {row["metric"]: row for row in table["rows"]}
    assert set(rows) == {
        *("acc,none", "acc_norm,none"),
        *("bits_per_byte,none", "word_perplexity,none"),
    }
    bits = {name: score["value"] for name, score in rows["bits_per_byte,none"]["scores"].items()}
    assert len(set(bits.values())) == 3
    assert rows["bits_per_byte,none"]["minus_residual"]["mhc"] == {
        "value": bits["mhc"] - bits["residual"],
        "error": None,
    }
    assert table["paper"] is None and "paper" not in printed
    assert "only the first 3 documents of each task" in printed
    table = (tmp_path / "table.md").read_text()
    assert table in printed and "| local_choice | 2 | acc ↑ |" in table
    assert (tmp_path / "scores.png").stat().st_size > 10_000


def report(value, error, shots) -> dict[str, dict[str, Any]]:
    """What `evaluate` would report of the paper's group, with fewer tasks inside."""
    members = {
        "bbh_cot_fewshot": ["bbh_one", "bbh_two"],
        "hendrycks_math": ["algebra"],
        "mmlu": ["mmlu_stem", "mmlu_other"],
        "mmlu_stem": ["physics"],
        "mmlu_other": ["nutrition"],
    }
    made: dict[str, dict[str, Any]] = {
        "results": {"paper": {"alias": "paper"}},
        "n-shot": {},
        "higher_is_better": {},
    }
    for task, metric in PAPER:
        name, _, chosen = metric.partition(",")
        scores = {metric: value, f"{name}_stderr,{chosen}": error, "other,none": 0.9}
        made["results"][task] = {"alias": task, "sample_len": 9, **scores}
        made["higher_is_better"][task] = {name: True}
        for leaf in benchmark_scores._leaves(task, members):
            made["n-shot"][leaf] = shots.get(task, PAPER[task, metric].shots)
            made["results"].setdefault(leaf, {"acc,none": 0.1})
    made["group_subtasks"] = {"paper": [task for task, _ in PAPER], **members}
    return made


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands so far, all `evaluate`, which reports the same of every model."""
    seen = []

    def run(*words, capture):
        seen.append(words)
        asked = {"tasks": ["paper"], "limit": None}
        about = {"checkpoint": "here", "step": 5, "tokenizer": "bytes-257", "shortened": 0}
        same = {"settings": asked, "n-samples": {}, "versions": {"drop": 3.0}}
        return json.dumps({**report(0.5, 0.1, {}), **about, **same})

    monkeypatch.setattr(downstream, "run", run)
    monkeypatch.chdir(tmp_path)
    return seen


def test_what_was_evaluated_is_kept_and_never_taken_for_another(words, models, commands, capsys):
    residual, hc, mhc = words
    asked = ["limit=1", "output=out"]
    downstream.main([residual, hc, *asked])
    assert len(commands) == 2
    downstream.main([residual, hc, mhc, *asked, "max_length=128", "batch_size=2"])
    assert len(commands) == 3 and {"max_length=128", "batch_size=2"} <= set(commands[2])
    assert capsys.readouterr().err.count("has been evaluated before") == 2
    assert list(json.loads(Path("out/table.json").read_text())["models"]) == list(CONNECTIONS)

    with pytest.raises(SystemExit, match=r"^error: out/residual.json is with other settings \(.*1"):
        downstream.main([residual, hc, mhc, *asked, "limit=2"])
    weights = models / "hc" / "checkpoints" / "last"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(SystemExit, match=r"^error: out/hc.json is about other weights"):
        downstream.main([residual, hc, mhc, *asked])
    assert len(commands) == 3


def test_results_of_other_versions_of_a_task_are_not_compared(words, commands):
    downstream.main([*words, "output=out"])
    file = Path("out/hc.json")
    record = json.loads(file.read_text())
    record["report"]["versions"]["drop"] = 4.0
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="residual and hc were not asked the same: versions"):
        downstream.main([*words, "output=out"])


def test_mistakes_are_one_line(words, models, commands):
    residual, _, mhc = words
    for name in ("other/checkpoints", "saved", "begun"):
        Path(name).mkdir(parents=True)
    Path("other/config.yaml").write_text("data: none\n")
    Path("other/checkpoints/last").touch()
    Path("saved/config.json").write_text("{}")
    config = (models / "mhc" / "config.yaml").read_text()
    Path("begun/config.yaml").write_text(config.replace("128", "64"))

    def refused(*given):
        with pytest.raises(SystemExit) as error:
            downstream.main(list(given))
        assert "\n" not in str(error.value)
        return str(error.value)

    for given, message in (
        ([], "error: there is nothing to evaluate"),
        (["hc=nowhere"], "error: hc=nowhere is no run, no checkpoint in one, and no exported"),
        (["hc=/"], "error: hc=/ is no run"),
        (["hc=other"], "error: other/config.yaml is not that of a run"),
        (["hc=saved"], "error: saved/config.json does not describe an exported model"),
        (["hc=begun"], "error: the run hc=begun has no checkpoint yet"),
        ([mhc], "error: an exported model does not say how many tokens"),
        (
            [residual, "ckpt_path=best"],
            "error: ckpt_path= differs between the runs; say mhc=",
        ),
        ([residual, "jobs=2"], "error: this recipe has no jobs"),
        ([residual, "slurm.partition=gpu"], "error: this recipe has no jobs"),
    ):
        assert refused(*given).startswith(message)
    Path("begun/checkpoints").mkdir()
    Path("begun/checkpoints/last").touch()
    assert "residual on 128 and hc on 64 tokens at once" in refused(residual, "hc=begun")
    assert not commands


def test_the_papers_scores_stand_beside_its_tasks_alone():
    rows = rows_of({"residual": report(0.5, 0.03, {}), "mhc": report(0.46, 0.04, {})})
    assert [row.label for row in rows] == [published.name for published in PAPER.values()]
    assert [row.shots for row in rows] == [3, 3, 8, 10, 4, 5, 0, 5]
    difference = rows[1].differences["mhc"]
    assert difference.value == pytest.approx(-0.04)
    assert difference.error is not None and math.isclose(difference.error, 0.05)
    table = benchmark_scores.markdown(rows)
    measured = "0.500 ± 0.030 | 0.460 ± 0.040 | −0.040 ± 0.050"
    assert f"| DROP (drop) | 3 | f1 ↑ | {measured} | 0.470 | 0.539 |" in table.splitlines()
    assert table.splitlines()[0].endswith("| paper, 27B: residual | paper, 27B: mhc |")

    other = {"residual": report(0.5, None, {"drop": 0, "mmlu": 5})}
    assert [row.task for row in rows_of(other) if row.paper is None] == ["drop"]
    without = {**other["residual"], "group_subtasks": {}}
    rows = rows_of({"residual": without})
    assert all(row.paper is None for row in rows) and "paper" not in benchmark_scores.markdown(rows)
    assert {row.metric for row in rows if row.task == "drop"} == {"f1,none", "other,none"}


def test_a_score_that_is_not_a_number_is_said_to_be_none():
    broken = {"residual": report(None, None, {}), "hc": report(0.1, None, {})}
    row = rows_of(broken)[0]
    assert str(row.scores["residual"]) == str(row.differences["hc"]) == "not finite"
    assert str(row.scores["hc"]) == "0.100"


def test_the_harness_has_the_metrics_that_are_compared(monkeypatch):
    class Recorded(ConfigurableTask):  # which would fetch its data
        task_name = config = None

        def __init__(self, config):
            self.task_name, self.config = config["task"], config

    monkeypatch.setattr(_factory, "ConfigurableTask", Recorded)
    loaded = load_tasks(task_manager(), ["paper"])
    assert set(loaded["groups"]["paper"].child_names) == {task for task, _ in PAPER}
    for task, metric in PAPER:
        name, _, chosen = metric.partition(",")
        group = loaded["groups"].get(task)
        leaves = [loaded["tasks"][task]] if group is None else group.get_all_tasks()
        assert group is None or name in [entry.metric for entry in group.aggregate_metric_list]
        for leaf in leaves:
            assert name in [entry["metric"] for entry in leaf.config["metric_list"]]
            filters = leaf.config.get("filter_list") or [{"name": "none"}]
            assert chosen in [entry["name"] for entry in filters]
