"""`plan` and `fit`'s check of memory for `strategy=pipeline`."""

import dataclasses
import inspect
import json
import time

import numpy as np
import pytest

from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.cli.main import main
from mhc_lightning.cli.plan import check_room
from mhc_lightning.cli.strategy_settings import PipelineSettings, is_sharded
from mhc_lightning.errors import UserError
from mhc_lightning.strategies import PipelineStrategy

SMALL = ("plan", "--config", "mhc_quickstart", "strategy=pipeline", "model.num_layers=4",
         "machine=2xh100", "data.micro_batch_size=8")  # fmt: skip
LARGE = ("plan", "--config", "mhc_27b", "strategy=pipeline", "machine=8xh200", "recompute=auto",
         "data.micro_batch_size=16")  # fmt: skip
SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev"]


def planned(capsys, *words):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    assert main(list(words)) == 2
    output = capsys.readouterr()
    assert output.out == "" or "DOES NOT FIT" in output.out
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_papers_largest_model_in_a_pipeline(capsys):
    start = time.process_time()
    record = planned(capsys, *LARGE)
    assert time.process_time() - start < 10
    pipeline, memory = record["pipeline"], record["memory_bytes_per_device"]
    assert record["devices"] == 8 and record["micro_batches_per_step"] == 80
    kinds = "weights gradients optimizer activations logits rebuilt communication row_update total"
    assert set(memory) == set(kinds.split())
    assert memory["total"] == sum(memory.values()) / 2

    # The fullest device's, and every device has its own.
    devices = pipeline["devices"]
    totals = [device["memory_bytes"]["total"] for device in devices]
    assert memory == devices[pipeline["fullest_device"]]["memory_bytes"]
    assert max(totals) == memory["total"] and len(set(totals)) > 3
    assert [device["in_flight"] for device in devices] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert sum(pipeline["blocks_per_stage"]) == 30 == sum(d["blocks"] for d in devices)
    parameters = sum(device["memory_bytes"]["gradients"] for device in devices) / 4
    assert parameters == record["parameters"]["total"]
    assert pipeline["boundary_bytes"] == 4096 * 4 * 2560 * 2
    # Blocks of sub-layers within stages of at most 8, as eq. 20 has it.
    assert record["recompute_block"] == 8
    kept = record["activation_bytes_per_device"]
    assert kept["with_recompute"] < kept["without_recompute"]

    seconds = record["step_seconds"]
    assert record["tokens_per_second"] == pytest.approx(1280 * 4096 / seconds["total"])
    assert seconds["total"] == pytest.approx(pipeline["sequential"]["step_seconds"])
    assert seconds["waiting"] > 0
    assert list(pipeline["schedules"]) == SCHEDULES
    for name, each in pipeline["schedules"].items():
        slow, fast = each["sequential"], each["overlapped"]
        assert fast["step_seconds"] < slow["step_seconds"]
        # More traffic than the baseline's, which overlap hides some of.
        assert 0 < fast["overhead_over_residual"] < slow["overhead_over_residual"] < 0.2, name
    bubbles = {name: each["sequential"]["bubble"] for name, each in pipeline["schedules"].items()}
    assert bubbles["dualpipev"] < bubbles["1f1b"] < bubbles["gpipe"]


def test_sharing_stages_shares_their_state(capsys):
    words = (*SMALL, "data.batch_size=16")
    one = planned(capsys, *words)["memory_bytes_per_device"]
    two = planned(capsys, *words, "machine=4xh100", "strategy.pipeline_size=2")
    memory = two["memory_bytes_per_device"]
    assert two["devices"] == 4 and two["pipeline"]["pipeline_size"] == 2
    for kind in ("gradients", "optimizer"):
        assert memory[kind] == pytest.approx(one[kind] / 2, rel=1e-3)
    assert memory["communication"] > one["communication"]
    assert two["step_seconds"]["communication"] > 0


def test_the_report_has_devices_and_schedules(capsys):
    assert main(list(SMALL)) == 0
    text = capsys.readouterr().out
    assert "a pipeline of 2 devices under 1f1b" in text
    assert "memory of the fullest device, " in text and "fits in 79.0 GiB" in text
    rows = {line.split()[0].rstrip("*"): line for line in text.splitlines() if line.strip()}
    assert set(SCHEDULES) <= set(rows)
    assert rows["1f1b"].count("%") == 4 and "GiB" not in rows["device"]
    assert max(map(len, text.splitlines())) <= 100
    assert main([*SMALL, "connection=residual", "strategy.schedule=gpipe"]) == 0
    plain = capsys.readouterr().out
    assert "ordinary residual" not in plain
    assert main([*SMALL, "data.micro_batch_size=1", "strategy.schedule=gpipe"]) == 0
    assert "1f1b              does not fit: strategy.schedule=1f1b with 2" in (
        capsys.readouterr().out
    )


def test_a_picture_is_drawn_at_the_literal_path(capsys, tmp_path):
    from matplotlib.image import imread

    file = tmp_path / "a = {b}, $c$.png"
    planned(capsys, *SMALL, "strategy.schedule=dualpipev", f"picture={file}")
    image = imread(file)
    height, width, _ = image.shape
    assert width == 1650 and 300 < height < 1200
    colours = {tuple(c) for c in (255 * image[..., :3]).round().astype(int).reshape(-1, 3)[::7]}
    for code in ("4a9ab8", "1f6f8b", "d1495b", "d96575", "ececec"):
        wanted = np.array([int(code[k : k + 2], 16) for k in (0, 2, 4)])
        assert min(np.abs(np.array(c) - wanted).max() for c in colours) <= 1, code


def test_measured_times_replace_the_rooflines(capsys, tmp_path):
    file = tmp_path / "times, 1.json"
    stage = {"forward": 1.0, "backward": 2.0}
    file.write_text(json.dumps({"stages": [stage, stage], "update": 0.5}))
    words = (*SMALL, "data.batch_size=8", f"times={file}")
    record = planned(capsys, *words)
    assert record["step_seconds"]["total"] == pytest.approx((8 + 1) * 3.0 + 0.5)
    assert record["pipeline"]["sequential"]["bubble"] == pytest.approx(1 / 9)
    schedules = record["pipeline"]["schedules"]
    assert schedules["gpipe"]["sequential"]["overhead_over_residual"] is None
    assert "has 2 stages, but the layout has 4" in schedules["zbv"]["refusal"]
    assert main(list(words)) == 0
    assert f"time per step, from {file}" in capsys.readouterr().out
    file.write_text(json.dumps({"stages": [stage] * 4}))
    split = refused(capsys, *SMALL, f"times={file}", "strategy.schedule=zbv")
    assert "needs backward_weight beside backward" in split


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["strategy.pipeline_size=3"], "2 devices cannot be shared out"),
        (["model.num_layers=1"], "blocks fill at most as many; use fewer devices"),
        (["strategy.schedule=chimera"], "must be one of gpipe, 1f1b"),
        (["strategy.schedule=dualpipev", "strategy.microbatches=2"], "at least 4 micro-batches"),
        (["strategy.microbatches=3"], "use a divisor of 8"),
        (["strategy.microbatches=many"], "strategy.microbatches must be a whole number or null"),
        (["strategy.blocks_per_stage=[1,2]"], "with the sum of model.num_layers=4"),
        (["data.micro_batch_size=3"], "is not a multiple of data.micro_batch_size=3"),
        (["times=nowhere.json"], "times=nowhere.json cannot be read"),
        (["picture=timeline.pdf"], "must be the name of a .png file"),
        (["picture=no/such/folder/timeline.png"], "there is no folder no/such/folder"),
        (["strategy=ddp", "picture=timeline.png"], "is for pipelines; add strategy=pipeline"),
        (["strategy=ddp", "times=times.json"], "is for pipelines; add strategy=pipeline"),
    ],
)
def test_mistakes_end_in_one_line(words, expected, capsys):
    assert expected in refused(capsys, *SMALL, *words)


def test_what_does_not_fit_is_refused_with_what_would(capsys):
    words = ("machine=8xh200", "strategy.schedule=dualpipev", "recompute=off")
    line = refused(capsys, *LARGE, *words)
    assert "(8xh200); what would make it fit: strategy.schedule=1f1b; or " in line
    assert planned(capsys, *LARGE, *words, "strategy.schedule=1f1b")["fits"]
    nodes = "trainer.devices=8 trainer.num_nodes=2 strategy.pipeline_size=8"
    assert nodes in line
    assert planned(capsys, *LARGE, *words, "machine=16xh200", nodes.split()[2])["fits"]


def test_fit_asks_for_the_memory_that_is_free(capsys, monkeypatch):
    import torch

    words = (*SMALL[1:], "machine=2xcpu", "strategy.schedule=gpipe")
    needed = planned(capsys, "plan", *words)["memory_bytes_per_device"]["total"]
    experiment = compose_experiment(parse_arguments(["fit", *words, "machine=null"]))
    cpu = torch.device("cpu")
    check_room(experiment, 2, cpu)
    monkeypatch.setattr("mhc_lightning.planning.machine._available_memory", lambda: 2 * needed - 4)
    with pytest.raises(UserError, match=r"\(2xcpu\); what would make it fit: recompute=auto; or"):
        check_room(experiment, 2, cpu)


def test_the_settings_are_those_of_the_strategy():
    fields = {field.name: field.default for field in dataclasses.fields(PipelineSettings)}
    parameters = inspect.signature(PipelineStrategy).parameters
    assert fields == {name: parameter.default for name, parameter in parameters.items()}


@pytest.mark.parametrize(
    ("target", "sharded"),
    [
        ("mhc_lightning.strategies.FullyShardedStrategy", True),
        ("mhc_lightning.strategies.DataParallelStrategy", False),
        ("lightning.pytorch.strategies.FSDPStrategy", True),
        ("lightning.pytorch.strategies.ModelParallelStrategy", True),
        ("lightning.pytorch.strategies.DDPStrategy", False),
        ("no.such.ShardedStrategy", False),
    ],
)
def test_a_strategy_that_shards_is_known_by_its_class(target, sharded):
    assert is_sharded({"_target_": target}) is sharded
    assert not is_sharded({"name": "auto"})


EXPERTS = ("plan", "--config", "mhc_3b", "machine=16xh200", "data.batch_size=64")


def test_experts_spread_over_devices(capsys):
    words = (*EXPERTS, "strategy=pipeline", "strategy.pipeline_size=2", "recompute=auto",
             "data.micro_batch_size=8", "strategy.schedule=dualpipev")  # fmt: skip
    whole = planned(capsys, *words)
    spread = planned(capsys, *words, "++strategy.expert_parallel_size=8")
    devices = (each["pipeline"]["devices"] for each in (whole, spread))
    for one, other in zip(*devices, strict=True):
        assert one["memory_bytes"]["weights"] == other["memory_bytes"]["weights"]
        assert one["memory_bytes"]["communication"] > other["memory_bytes"]["communication"]
    assert whole["step_seconds"]["exchange"] == 0 < spread["step_seconds"]["exchange"]
    assert spread["step_seconds"]["communication"] < whole["step_seconds"]["communication"] / 2
    schedules = spread["pipeline"]["schedules"]
    hidden = {
        name: each["overlapped"]["exchange_seconds"] / each["sequential"]["exchange_seconds"]
        for name, each in schedules.items()
        if "refusal" not in each
    }
    assert hidden.pop("dualpipev") < 0.7 and set(hidden.values()) == {1.0}
    assert main([*EXPERTS, "strategy=fsdp", "++strategy.expert_parallel_size=4"]) == 0
    text = capsys.readouterr().out
    assert "the experts of a layer over 4 devices" in text and "  all-to-all " in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("strategy=fsdp", "++strategy.expert_parallel_size=5"), "use one of 1, 2, 4, 8"),
        (("strategy=fsdp", "++strategy.expert_parallel_size=0"), "a whole number from 1 on"),
        (
            ("strategy=ddp", "++strategy.expert_parallel_size=2"),
            "needs strategy=fsdp or strategy=p",
        ),
        (("strategy=fsdp", "routing_imbalance=0.5"), "must be 1, even routing, or more"),
    ],
)
def test_experts_that_cannot_be_spread_so_are_refused(capsys, words, said):
    assert said in refused(capsys, *EXPERTS, *words)


SEARCH = ("plan", "--config", "mhc_quickstart", "model.num_layers=4", "data.batch_size=8",
          "search=true")  # fmt: skip


@pytest.mark.parametrize("words", [("machine=2xl40s",), ("machine=3xh100", "data.batch_size=4")])
def test_the_settings_found_are_those_of_a_plan_with_that_memory(capsys, words):
    record = planned(capsys, *SEARCH, *words)
    layouts = record["layouts"]
    seconds = [each["step_seconds"] for each in layouts]
    assert seconds == sorted(seconds) and 4 <= len(seconds) <= 10
    first = layouts[0]
    plan = planned(capsys, *SEARCH[:-1], *words, *first["settings"].split())
    assert plan["memory_bytes_per_device"]["total"] == first["memory_bytes"]
    assert ("pipeline" in plan) == (first["pipeline_size"] > 1) == (words[0] == "machine=3xh100")
    if "pipeline" in plan:
        overlapped = plan["pipeline"]["overlapped"]
        assert overlapped["step_seconds"] == pytest.approx(first["step_seconds"])
        assert overlapped["bubble"] == pytest.approx(first["bubble"])
    else:
        assert plan["step_seconds"]["total"] == pytest.approx(first["step_seconds"])
    assert main([*SEARCH, *words]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[-1] == f"with: {first['settings']}" and text[-2] == record["why"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("machine=2xh999",), "kinds: cpu, a100"),
        (("machine=2xh100", "times=x.json"), "leave out search=true"),
        (("machine=3xh100", "data.batch_size=2", "model.num_layers=2"), "use a multiple of 3"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(capsys, words, said):
    assert said in refused(capsys, *SEARCH, *words)


@pytest.mark.slow
def test_the_papers_largest_model_on_eight_nodes_in_under_a_minute(capsys):
    start = time.process_time()
    words = ("plan", "--config", "mhc_27b", "machine=64xh200", "search=true")
    record = planned(capsys, *words)
    assert time.process_time() - start < 60
    assert len(record["layouts"]) == 10
    assert record["simulated"] < record["tried"] / 2
