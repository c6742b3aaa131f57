"""`strategy=pipeline_or_fsdp`: which devices and batches get pipelines, and what is said of it."""

import pytest

from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.components import build_trainer
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.cli.main import main
from mhc_lightning.cli.strategy_choice import (
    EVEN,
    Pipelines,
    Work,
    choose_pipelines,
    evenness,
    resolve_strategy,
)
from mhc_lightning.errors import UserError
from mhc_lightning.planning.stages import plan_stages
from mhc_lightning.strategies import FullyShardedStrategy, PipelineStrategy
from mhc_lightning.strategies.layout import layout_of


def compose(name, *words):
    return compose_experiment(parse_arguments(["fit", "--config", name, *words]))


def work(blocks, head=1.0, batch=64, micro=1):
    return Work([1.0] * blocks, 0.0, head, batch, micro)


@pytest.mark.parametrize(
    ("task", "devices", "per_node", "schedule", "expected"),
    [
        (work(31), 8, 8, "1f1b", Pipelines(1, 8, 32)),
        (work(32), 8, 8, "1f1b", Pipelines(2, 4, 16)),  # of 8 devices one would have 5, seven 4
        (work(31), 16, 8, "1f1b", Pipelines(2, 8, 32)),  # a pipeline stays on its node
        (work(31), 3, 1, "gpipe", Pipelines(1, 3, 8)),  # unless nodes have one device
        (work(31, batch=16), 8, 8, "dualpipev", Pipelines(1, 8, 16)),
        (work(31, batch=48), 8, 8, "1f1b", Pipelines(1, 8, 24)),
        (work(31, batch=64, micro=4), 8, 8, "1f1b", Pipelines(1, 8, 16)),
    ],
)
def test_the_longest_even_pipeline_on_a_node_is_chosen(task, devices, per_node, schedule, expected):
    found = choose_pipelines(task, devices, per_node, schedule=schedule)
    assert found == expected
    plan = plan_stages(task.costs, schedule=schedule, devices=found.size, after=task.after)
    assert evenness(plan, task) >= EVEN
    plan.check_micro_batches(found.microbatches, found.microbatches * task.micro_batch_size)
    assert task.batch_size % (found.count * found.microbatches * task.micro_batch_size) == 0


@pytest.mark.parametrize(
    ("task", "devices", "reason"),
    [
        (work(31), 1, "one device"),
        (work(3), 8, "model.num_layers=3"),
        (work(8, head=9.0), 4, "share the blocks unevenly"),
        (work(31, batch=8), 8, "at least 4 micro-batches"),
        (work(31, micro=3), 8, "not shared evenly by 4 pipelines"),
    ],
)
def test_what_will_not_do_has_a_reason(task, devices, reason):
    with pytest.raises(UserError, match=reason):
        choose_pipelines(task, devices, devices, schedule="dualpipev")


@pytest.mark.parametrize("family", ["mhc", "hc", "baseline"])
@pytest.mark.parametrize(("size", "expected"), [("9b", (2, 4, 16)), ("27b", (1, 8, 32))])
def test_the_papers_large_models_use_pipelines_where_there_are_gpus(family, size, expected):
    count, length, parts = expected
    experiment, line = resolve_strategy(compose(f"{family}_{size}"), 8, 8)
    values = experiment.values()
    assert values["strategy"]["_target_"].endswith("PipelineStrategy")
    assert values["strategy"]["pipeline_size"] == length
    assert values["strategy"]["microbatches"] == values["data"]["micro_batch_size"] == parts
    pipelines = f"{count} pipeline{'s' * (count > 1)}"
    assert line.startswith(f"strategy: {pipelines} of {length} devices, schedule 1f1b")
    assert resolve_strategy(experiment) == (experiment, None)


def test_one_device_and_compiled_code_have_fsdp_and_are_told_why():
    split = ("compile=true", "strategy.schedule=dualpipev")
    for words, devices, reason in (
        ((), 1, "there is one device"),
        (split, 8, "compile=true does not go with strategy.schedule=dualpipev"),
    ):
        experiment, line = resolve_strategy(compose("mhc_9b", *words), devices, devices)
        assert experiment.values()["strategy"]["_target_"].endswith("FullyShardedStrategy")
        assert experiment.values()["data"]["micro_batch_size"] == 1
        assert line == f"strategy: fsdp, not pipeline, since {reason}"
    compiled, _ = resolve_strategy(compose("mhc_9b", "compile=true"), 8, 8)
    assert compiled.values()["strategy"]["pipeline_size"] == 4


def test_what_was_asked_for_is_done_or_refused():
    asked, _ = resolve_strategy(compose("mhc_9b", "strategy.pipeline_size=8"), 8, 8)
    assert asked.values()["strategy"]["microbatches"] == 32
    for word, reason in (
        ("strategy.schedule=chimera", "must be one of gpipe"),
        ("strategy.pipeline_size=3", "use a divisor of 8"),
        ("strategy.microbatches=7", "does not divide the 128 micro-batches"),
    ):
        with pytest.raises(UserError, match=reason):
            resolve_strategy(compose("mhc_9b", word), 8, 8)


def test_the_trainer_has_what_was_chosen():
    words = ("trainer.accelerator=cpu", "trainer.num_nodes=1")
    for devices, kind, replicas in ((2, PipelineStrategy, 1), (1, FullyShardedStrategy, 1)):
        experiment = compose("mhc_9b", *words, f"trainer.devices={devices}")
        strategy = build_trainer(experiment, logger=False, enable_checkpointing=False).strategy
        assert type(strategy) is kind
        assert layout_of(strategy).data_parallel_size == replicas


def test_plan_and_print_config_tell_of_the_choice(capsys):
    assert main(["plan", "--config", "mhc_9b", "machine=8xh200", "--json"]) == 0
    assert "strategy: 2 pipelines of 4 devices" in capsys.readouterr().err
    assert main(["fit", "--config", "mhc_9b", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "name: pipeline_or_fsdp" in shown and "strategy/pipeline_or_fsdp.yaml" in shown
