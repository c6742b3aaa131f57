"""The commands that use a finished run, and mistakes: one line and exit code 2."""

import json
import math
import os
import resource
import subprocess
import sys

import pytest
import torch

LAST = ("output_dir=run", "ckpt_path=last")


def test_generate_prints_the_text_and_nothing_else(trained):
    prompt = "It's ${y}, def f(x): = {1}"
    words = (*LAST, f"prompt={prompt}", "max_new_tokens=30", "temperature=1.5")
    first, _ = trained.run("generate", *words, "seed=4")
    assert first.startswith(prompt) and first.endswith("\n") and len(first) > len(prompt) + 1


def test_generation_is_repeatable_and_follows_its_settings(trained, capfdbinary):
    def generate(*words):
        code = trained.inside("generate", *LAST, "prompt=the gain", "max_new_tokens=20", *words)
        output, errors = capfdbinary.readouterr()
        assert code == 0, errors
        return output

    assert generate("seed=4") == generate("seed=4")
    assert generate("seed=4", "temperature=1.5") != generate("seed=5", "temperature=1.5")
    greedy = generate("temperature=0")
    assert generate("top_k=1", "seed=9") == greedy
    assert generate("top_p=1e-9", "seed=9") == greedy
    assert generate("temperature=0", "echo=false") == greedy.removeprefix(b"the gain")
    assert generate("max_new_tokens=0") == b"the gain\n"


def test_generate_streams_and_stops_when_nobody_reads(trained):
    process = trained.start(
        "generate", *LAST, "prompt=the", "max_new_tokens=100000", "temperature=0"
    )
    assert process.stdout.read(8).startswith("the")  # long before the end
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert process.returncode == 0


def test_validate_repeats_what_the_run_measured(trained, capfd):
    assert trained.inside("validate", *LAST, "--json") == 0
    output, _ = capfd.readouterr()
    measured = json.loads(output)
    written = trained.metrics()[6]
    assert measured["step"] == 6
    assert measured["val/loss"] == float(written["val/loss"])
    assert measured["val/perplexity"] == float(written["val/perplexity"])
    bits_per_token = measured["val/loss"] / math.log(2)
    assert bits_per_token < measured["val/bits_per_byte"] < 1.02 * bits_per_token  # document ends
    for size in (1, 3):
        words = (f"data.micro_batch_size={size}", f"data.batch_size={size}")
        assert trained.inside("validate", *LAST, *words, "--json") == 0
        again = json.loads(capfd.readouterr()[0])
        assert again["val/tokens"] == measured["val/tokens"] > 100
        assert again["val/loss"] == pytest.approx(measured["val/loss"], rel=1e-6)
    assert trained.inside("validate", "output_dir=run", "ckpt_path=best") == 0
    output, _ = capfd.readouterr()
    assert "val/perplexity" in output and "val/bits_per_byte" in output


def test_prepare_then_fit_on_its_output(command, capfd):
    (command.folder / "my texts, = {1}").mkdir()
    for number in range(4):
        (command.folder / "my texts, = {1}" / f"{number}.txt").write_text("word " * 400)
    words = ("input=my texts, = {1}", "output=my tokens", "validation_fraction=0.2")
    assert command.inside("prepare", *words, "num_workers=1") == 0
    output, _ = capfd.readouterr()
    assert "my tokens is prepared" in output and "tokens" in output
    assert command.inside("prepare", *words, "num_workers=1") == 0
    assert "was prepared already" in capfd.readouterr()[0]
    assert command.inside("prepare", *words, "num_workers=1", "text_field=body") == 2
    assert "overwrite=true" in capfd.readouterr()[1].splitlines()[-1]
    assert command.inside("fit", "data.path=my tokens", "output_dir=run", "callbacks=minimal") == 0
    assert list(command.metrics()) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "mistake", ["data.path=nowhere", "model.rope_dim=3", "data.batch_size=5", "data.num_workers=-1"]
)
def test_a_run_to_be_overwritten_survives_a_mistake(trained, capfd, mistake):
    before = sorted(trained.folder.glob("run/**/*"))
    assert trained.inside("fit", "output_dir=run", "overwrite=true", mistake) == 2
    assert "error: " in capfd.readouterr()[1]
    assert sorted(trained.folder.glob("run/**/*")) == before


def test_another_runs_checkpoint_does_not_take_over_a_folder(trained, capfd):
    """Only the run in the folder may go on there; another one's state needs overwrite=true."""
    assert (
        trained.inside("fit", "output_dir=other", "callbacks=minimal", "trainer.max_steps=2") == 0
    )
    theirs = next((trained.folder / "other/checkpoints").glob("step_*.ckpt"))
    before = (trained.folder / "run/metrics.csv").read_text()
    words = [f"ckpt_path={theirs}", "callbacks=minimal"]
    assert trained.inside("fit", "output_dir=run", *words) == 2
    assert "already holds a run" in capfd.readouterr()[1]
    assert (trained.folder / "run/metrics.csv").read_text() == before
    assert trained.inside("fit", "output_dir=third", *words, "trainer.max_steps=3") == 0
    assert (trained.folder / "third/checkpoints/step_00000003.ckpt").exists()


def test_a_run_shorter_than_its_intervals_is_logged_and_validated(command):
    words = ("output_dir=run", "callbacks=minimal", "trainer.max_steps=2")
    assert command.inside("fit", *words, "trainer.log_every_n_steps=50",
                          "trainer.val_check_interval=100") == 0  # fmt: skip
    rows = command.metrics()
    assert list(rows) == [2]
    assert rows[2]["train/loss"] and rows[2]["val/loss"]


def test_any_lightning_logger_and_a_mixture_in_the_config(command, prepared):
    config = command.folder / "mine.yaml"
    config.write_text(
        "defaults: [mhc_quickstart, _self_]\n"
        "logger:\n"
        "  tensorboard: null\n"
        "  more: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: more}\n"
        f"data: {{path: [{{path: {json.dumps(str(prepared))}, weight: 2}}]}}\n"
    )
    command.data = None  # it is in the file
    assert command.inside("fit", "output_dir=run", "callbacks=minimal", config=config) == 0
    assert not list((command.folder / "run").glob("events.*"))
    assert list((command.folder / "more").rglob("metrics.csv"))


def test_a_full_disk_does_not_stop_a_run(command):
    big = ("output_dir=run", "callbacks=minimal", "model.dim=64", "checkpoint.every_n_steps=1")
    command.run("fit", *big, "trainer.max_steps=2")
    folder = command.folder / "run/checkpoints"
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    limit = 200_000  # bytes: less than a checkpoint, more than everything else
    assert min(map(len, before.values())) > limit
    process = command.start(
        "fit", *big, "trainer.max_steps=5", "ckpt_path=last",
        preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    warnings = [line for line in errors.splitlines() if "could not save" in line]
    assert len(warnings) == 3 and all(line.startswith("warning: ") for line in warnings)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    assert list(command.metrics()) == [1, 2, 3, 4, 5]


BAD = {
    "n = 0": (["model.num_streams=0"], "model.num_streams"),
    "odd rotary dimension": (["model.rope_dim=5"], "rope_dim"),
    "negative width": (["model.dim=-8"], "model.dim"),
    "vocabulary too small": (["model.vocab_size=100"], "=100; set it to 257 or more"),
    "no data": (["data.path=nowhere, really"], "nowhere, really"),
    "sequences too long": (["data.sequence_length=1000000"], "sequence_length"),
    "uneven batch": (["data.batch_size=3"], "data.batch_size=3"),
    "no such recompute": (["recompute=true"], "recompute=True"),
    "no recompute block": (["recompute=0"], "recompute=0"),
    "null where a number belongs": (["model.dim=null"], "model.dim must be a whole number"),
    "no steps": (["trainer.max_steps=0"], "trainer.max_steps"),
    "bad precision": (["trainer.precision=bf17"], "trainer.precision"),
    "no such device": (["trainer.accelerator=quantum"], "quantum"),
    "bad interval": (["trainer.val_check_interval=0"], "trainer.val_check_interval"),
    "no such device here": (["trainer.accelerator=gpu"], "gpu"),
    "no devices": (["trainer.devices=0"], "devices"),
    "devices in words": (["trainer.devices=abc"], "devices"),
    "ascent by clipping": (["trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val"),
    "scaled gradients": (["trainer.precision=16-mixed"], "bf16-mixed"),
    "micro-batch in words": (["data.micro_batch_size=abc"], "data.micro_batch_size"),
    "half a micro-batch": (["data.micro_batch_size=2.0"], "data.micro_batch_size"),
    "bad seed": (["seed=-1"], "seed"),
    "no whole number that one has": (["data.batch_size=1e30"], "data.batch_size"),
    "too large a whole number": ([f"trainer.max_steps={10**24}"], "(too large)"),
    "betas in words": (["optimizer.betas=[a,b]"], "optimizer.betas"),
    "no callback": (["+callbacks.x._target_=builtins.dict"], "callbacks.x is a dict"),
    "no logger": (["+logger.x._target_=builtins.dict"], "logger.x is a dict"),
    "strategy of the trainer": (["+trainer.strategy=ddp"], "trainer.strategy"),
    "accumulation": (["+trainer.accumulate_grad_batches=2"], "data.micro_batch_size"),
    "only a trial": (["+trainer.fast_dev_run=true"], "trainer.fast_dev_run"),
    "name too long": (["output_dir=" + 300 * "x"], "name too long"),
    "one beta": (["optimizer.betas=[0.9]"], "optimizer.betas"),
    "beta above one": (["optimizer.betas=[0.9,1.5]"], "optimizer.betas"),
    "growth instead of decay": (["optimizer.weight_decay=-1"], "optimizer.weight_decay"),
    "no validation": (["data.validation_sequences=-5"], "data.validation_sequences"),
    "bad initialisation": (["model.init_std=-1"], "model.init_std"),
    "bad recomputation": (["recompute=banana"], "recompute"),
    "bad schedule": (["optimizer.schedule=often"], "optimizer.schedule"),
    "added key nobody takes": (["+model.depth=3"], "model.depth"),
    "bad checkpoint interval": (["checkpoint.every_n_steps=0"], "checkpoint.every_n_steps"),
    "class that is not there": (["+logger.x._target_=lightning.Nothing"], "lightning.Nothing"),
    "missing checkpoint": (["ckpt_path=no such, file.ckpt"], "no such, file.ckpt"),
    "nothing to go on with": (["ckpt_path=last"], "holds no run"),
    "folder in the way": (["output_dir=/proc/nope"], "/proc/nope"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_users_mistake_is_one_line_and_exit_code_2(command, capfd, case):
    words, expected = BAD[case]
    code = command.inside("fit", "output_dir=run", "callbacks=minimal", *words)
    _, errors = capfd.readouterr()
    assert code == 2, errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and expected in last
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("generate", ["ckpt_path=last"], "prompt"),
        ("generate", ["prompt=a"], "ckpt_path"),
        ("generate", ["prompt=a", "ckpt_path=last", "temperature=-1"], "temperature"),
        ("generate", ["prompt=a", "ckpt_path=last", "top_k=1.5"], "generate.top_k"),
        ("validate", [], "ckpt_path"),
        ("validate", ["ckpt_path=last", "trainer.limit_val_batches=0"], "nothing was validated"),
        ("validate", ["ckpt_path=no_model.ckpt"], "no_model.ckpt has no model in it"),
        ("plan", ["trainer.num_nodes=0"], "trainer.num_nodes"),
        ("plan", ["recompute=banana"], "recompute"),
        ("prepare", [], "input"),
        ("prepare", ["input=nowhere", "output=x"], "nowhere"),
        ("prepare", ["input=.", "output=x", "tokenizer=none, (1).json"], "none, (1).json"),
    ],
)
def test_mistakes_in_other_commands(trained, capfd, name, words, expected):
    torch.save({"state_dict": 7}, trained.folder / "no_model.ckpt")
    code = trained.inside(name, "output_dir=run", *words)
    output, errors = capfd.readouterr()
    assert code == 2, errors
    assert output == ""
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and expected in last


@pytest.mark.parametrize(
    ("words", "saved"),
    [
        (["model.rope_theta=100.0"], "model.rope_theta=10000.0 (not 100.0)"),
        (["connection.sinkhorn_iterations=1"], "connection.sinkhorn_iterations=20 (not 1)"),
        (["connection=mhc_single_pass"], "connection._target_=mhc_lightning.modules.Manifold"),
        (["model.init_std=0.5"], None),  # says nothing of a trained model
        ([], None),
    ],
)
def test_a_checkpoint_of_another_model_whose_tensors_fit_is_told(trained, capfd, words, saved):
    assert trained.inside("validate", "output_dir=run", "ckpt_path=last", *words) == 0
    warnings = [line for line in capfd.readouterr()[1].splitlines() if "another model" in line]
    assert len(warnings) == (saved is not None)
    assert all(saved in line and line.startswith("warning: ") for line in warnings)


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_fault(closed):
    line = f"exec '{sys.executable}' -m mhc_lightning --version {closed}"
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_output_that_finds_no_room_is_the_machines_fault():
    line = f"exec '{sys.executable}' -m mhc_lightning --help >/dev/full"
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert ended.returncode == 4
    assert ended.stderr.startswith("error: No space left on device; make room")
    assert ended.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(command):
    config = command.folder / "buggy.yaml"
    config.write_text(
        "defaults: [mhc_quickstart, _self_]\nlogger: {bug: {_target_: json.loads, s: 'not json'}}\n"
    )
    with pytest.raises(json.JSONDecodeError):
        command.inside("fit", "output_dir=run", config=config)
