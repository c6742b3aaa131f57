"""`fit --config mhc_upcycle` trains a pretrained model on, and the other commands know its runs."""

import json
import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from in_process import run_main
from pretrained import pretrained_folder

from mhc_lightning.checkpoints.reading import load_checkpoint

SMALL = """
--config mhc_upcycle model.pretrained=pretrained data.path=tokens data.batch_size=4
data.sequence_length=32 data.validation_sequences=4 trainer.accelerator=cpu trainer.max_steps=4
trainer.val_check_interval=2 trainer.log_every_n_steps=1 checkpoint.every_n_steps=2
optimizer.lr=1e-2 optimizer.warmup_steps=0
""".split()  # noqa: SIM905
WORDS = "stream residual hyper connection manifold sinkhorn gain layer token the of and"
MINIMAL = ("callbacks=minimal", "logger=csv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny pretrained model, tokens by its tokenizer, and a run `straight`."""
    folder = tmp_path_factory.mktemp("upcycle")
    generator = random.Random(5)
    words = [" ".join(generator.choice(WORDS.split()) for _ in range(200)) for _ in range(12)]
    (folder / "texts").mkdir()
    for number, text in enumerate(words):
        (folder / "texts" / f"{number}.txt").write_text(text)
    pretrained_folder(folder / "pretrained", " ".join(words))
    more = ("input=texts", "num_workers=1", "prepare.validation_fraction=0.25")
    run_main("prepare", *SMALL, *more, folder=folder)
    assert (folder / "tokens/tokenizer.json").is_file(), "it is the model's own, not bytes"
    run_main("fit", *SMALL, "output_dir=straight", folder=folder)
    return folder


def run(folder, command, *words, **options):
    return run_main(command, *SMALL, *words, folder=folder, **options)


@pytest.fixture
def metrics(folder, command_in):
    """Gives the metrics of a run, by step."""
    return command_in(folder).metrics


def test_a_run_begins_with_the_pretrained_function(folder, metrics):
    """The loss of the first step is that of the pretrained model itself, on the same tokens."""
    rows = metrics("straight")
    plain = ("connection=residual", "output_dir=residual", *MINIMAL, "trainer.max_steps=2")
    run(folder, "fit", *plain)
    first, expected = rows[1], metrics("residual")[1]
    assert float(first["train/loss"]) == pytest.approx(float(expected["train/loss"]), rel=1e-5)
    assert float(rows[4]["val/loss"]) < float(rows[2]["val/loss"])
    for tag in ("amax_gain/composite/forward/layer_5", "stream_diversity/layer_5"):
        assert any(tag in row for row in rows.values()), sorted(rows[4])


def test_a_resumed_run_is_the_straight_one(folder, metrics):
    more = ("output_dir=resumed", *MINIMAL)
    run(folder, "fit", *more, "ckpt_path=straight/checkpoints/step_00000002.ckpt")
    assert metrics("resumed")[4]["val/loss"] == metrics("straight")[4]["val/loss"]


def test_the_connections_alone_learn_if_asked_to(folder):
    run(folder, "fit", "output_dir=alone", *MINIMAL, "train=connections")
    trained = saved(folder, "alone")
    from transformers import AutoModelForCausalLM

    pretrained = AutoModelForCausalLM.from_pretrained(folder / "pretrained").state_dict()
    for name, value in pretrained.items():
        assert torch.equal(trained[f"model.network.{name}"], value), name
    moved = [name for name, value in saved(folder, "straight").items()
             if "connections" in name and not torch.equal(value, trained[name])]  # fmt: skip
    assert moved, "connections that learn alone learn something else"


def saved(folder, name) -> Any:
    path = (folder / name / "checkpoints/last").resolve()
    return load_checkpoint(path, trusted=True)["state_dict"]


def test_the_other_commands_know_the_run(folder, metrics):
    words = ("output_dir=straight", "ckpt_path=last")
    output, _ = run(folder, "validate", *words, "--json")
    measured, rows = json.loads(output), metrics("straight")
    assert measured["val/loss"] == pytest.approx(float(rows[4]["val/loss"]), rel=1e-6)
    greedy = ("prompt=stream residual", "max_new_tokens=4", "temperature=0")
    output, _ = run(folder, "generate", *words, *greedy)
    assert output.startswith("stream residual") and len(output) > len("stream residual\n")
    for more in ((), ("input=stream residual hyper",)):
        output, _ = run_main("inspect", "straight/checkpoints/last", "--json", *more, folder=folder)
        assert len(json.loads(output)["sub_layers"]) == 6
    output, _ = run_main("report", "straight", "output=page", folder=folder)
    assert "straight" in output and (folder / "page/index.html").is_file()
    record = folder / "straight/config.yaml"
    again = ("--config", str(record), "train=connections", "--print-config")
    output, errors = run_main("fit", *again, folder=folder)
    assert "  train: connections" in output and errors == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train=some"], "train must be all or connections, not 'some'"),
        (["memory=engram"], "config mhc_upcycle has no memory to choose; leave out memory=…"),
        (["model.pretrained=nothing"], "pretrained=nothing is not here"),
        (["connection=residual", "train=connections"], "leaves nothing to train"),
        (["recompute=3"], "recompute=3 is not possible with a pretrained model"),
        (["strategy=pipeline", "trainer.devices=2"], "one network that can be cut into stages"),
    ],
)
def test_what_is_not_possible_is_one_line(folder, words, expected):
    _, errors = run(folder, "fit", "output_dir=none", *words, code=2)
    assert expected in errors.splitlines()[-1]


def test_the_pretrained_model_must_be_named(tmp_path):
    asked = "config mhc_upcycle needs model.pretrained=…: a folder, a name on the Hugging Face hub"
    for command in ("prepare", "fit"):
        _, errors = run_main(command, "--config", "mhc_upcycle", folder=tmp_path, code=2)
        assert asked in errors


def test_there_is_no_plan_of_it(folder):
    _, errors = run(folder, "plan", code=2)
    assert "what PretrainedNetwork needs is not known" in errors


@pytest.mark.slow
def test_two_processes_train_as_one(folder, metrics):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for strategy in ("ddp", "fsdp"):
        words = (f"output_dir={strategy}", f"strategy={strategy}", "trainer.devices=2")
        result = subprocess.run(
            [sys.executable, *launcher, "-m", "mhc_lightning", "fit", *SMALL, *MINIMAL, *words],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        rows = metrics(strategy)
        assert list(rows) == [1, 2, 3, 4]
        for step, row in metrics("straight").items():
            for tag in set(row) & {"train/loss", "train/grad_norm", "val/loss"}:
                value = float(rows[step][tag])
                assert value == pytest.approx(float(row[tag]), rel=1e-5), (strategy, step, tag)
    words = ("output_dir=fsdp", "ckpt_path=last", "trainer.max_steps=5")
    _, errors = run(folder, "fit", *MINIMAL, *words)
    assert "going on from step 4" in errors
