"""`strategy=fsdp` on the command line: shards are built alone, and all else stays the same."""

import json

import pytest
import torch

from mhc_lightning.checkpoints.reading import load_checkpoint
from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.components import build_model_for, build_trainer
from mhc_lightning.cli.composition import compose_experiment

EXPERTS = ("model.num_experts=4", "model.num_active_experts=2", "model.num_shared_experts=1")


@pytest.mark.parametrize(("strategy", "on_meta"), [("auto", False), ("ddp", True), ("fsdp", True)])
def test_a_model_that_may_be_shared_out_is_built_on_meta(command, strategy, on_meta):
    words = command.words("fit", *EXPERTS, "output_dir=run", f"strategy={strategy}")
    experiment = compose_experiment(parse_arguments(words))
    trainer = build_trainer(experiment, logger=False, enable_checkpointing=False)
    model = build_model_for(experiment, trainer).model
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.is_meta for tensor in tensors} == {on_meta}


@pytest.mark.slow
def test_an_import_and_a_resumed_run_are_those_of_one_process(command):
    common = (*EXPERTS, "callbacks=minimal", "data.micro_batch_size=2")
    assert command.inside("fit", *common, "output_dir=source", "trainer.max_steps=4") == 0
    assert command.inside("export", *common, "output_dir=source", "ckpt_path=last",
                          "output=exported") == 0  # fmt: skip
    runs = {"one": (), "two": ("strategy=fsdp", "trainer.devices=2")}
    measured = {}
    for name, words in runs.items():
        words = (*common, *words, f"output_dir={name}")
        command("fit", *words, "ckpt_path=exported", "trainer.max_steps=2")
        _, errors = command("fit", *words, "ckpt_path=last", "trainer.max_steps=6")
        assert "going on from step 2" in errors
        output, _ = command("validate", *words, "ckpt_path=last", "--json")
        measured[name] = json.loads(output)
    one, two = (command.metrics(name) for name in runs)
    assert list(one) == list(two) == [1, 2, 3, 4, 5, 6]
    for step, row in one.items():
        for tag in set(row) & {"train/loss", "train/grad_norm", "val/loss"}:
            assert float(two[step][tag]) == pytest.approx(float(row[tag]), rel=1e-4), (step, tag)
    assert measured["two"]["val/loss"] == pytest.approx(measured["one"]["val/loss"], rel=1e-4)

    states = {
        name: load_checkpoint((command.folder / name / "checkpoints/last").resolve(), trusted=True)
        for name in ("source", *runs)
    }
    bias = "model.blocks.1.feed_forward.body.balance.bias"
    source, one, two = (states[name]["state_dict"][bias] for name in states)
    assert torch.equal(one, two) and not torch.equal(one, source)
    assert (one - source).abs().max() < 0.007, "six updates of 0.001 from where it started"
    assert sorted(states["one"]["state_dict"]) == sorted(states["two"]["state_dict"])
