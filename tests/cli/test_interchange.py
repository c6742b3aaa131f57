"""`export` and `import`: weights out and in again, and their refusals."""

import contextlib
import io
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhc_lightning.interchange import load_exported

LAST = ("output_dir=run", "ckpt_path=last")


def state(file):
    saved = torch.load(file, weights_only=True)
    return {name.removeprefix("model."): t for name, t in saved["state_dict"].items()}


def identical(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def exported(trained):
    """A folder that the command exported; the weights of its last run."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        assert trained.inside("export", *LAST, "output=my model, = {1}") == 0
    assert output.getvalue() == "" and "wrote my model, = {1}" in errors.getvalue()
    return trained.folder / "my model, = {1}"


def error_of(code, capfd):
    _, errors = capfd.readouterr()
    assert code == 2, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_out_and_in_again_bit_for_bit(trained, exported, command, capfd):
    saved = torch.load(trained.folder / "run/checkpoints/last", weights_only=False)
    weights = {k.removeprefix("model."): v for k, v in saved["state_dict"].items()}
    assert identical(weights, load_exported(exported).state_dict())
    assert json.loads((exported / "config.json").read_text())["step"] == 6

    assert command.inside("import", f"input={exported}", "output_dir=new") == 0
    folder = command.folder / "new"
    assert os.readlink(folder / "checkpoints/last") == "step_00000000.ckpt"
    assert identical(weights, state(folder / "checkpoints/step_00000000.ckpt"))
    assert "model:" in (folder / "config.yaml").read_text()

    assert trained.inside("validate", *LAST, "--json") == 0
    expected = json.loads(capfd.readouterr()[0])
    for words in (["output_dir=new", "ckpt_path=last"], [f"ckpt_path={exported}"]):
        assert command.inside("validate", *words, "--json") == 0
        measured = json.loads(capfd.readouterr()[0])
        assert {**measured, "checkpoint": ""} == {**expected, "checkpoint": ""}


def test_generate_from_an_exported_folder_needs_no_data(trained, exported, capfdbinary):
    words = ("prompt=the gain", "max_new_tokens=15", "temperature=0")
    assert trained.inside("generate", *LAST, *words) == 0
    expected, _ = capfdbinary.readouterr()
    assert trained.inside("generate", f"ckpt_path={exported}", "data.path=nowhere", *words) == 0
    assert capfdbinary.readouterr()[0] == expected


@pytest.mark.parametrize("source", ["an imported checkpoint", "an exported folder"])
def test_fit_starts_at_step_0_with_the_weights(exported, command, capfd, source):
    start = f"ckpt_path={exported}"
    if source == "an imported checkpoint":
        assert command.inside("import", f"input={exported}", "output_dir=new") == 0
        start = "ckpt_path=last"
    words = ("output_dir=new", "callbacks=minimal", "optimizer.lr=1e-12")
    assert command.inside("fit", *words, start, "trainer.max_steps=3") == 0
    assert "starting at step 0 with the weights of" in capfd.readouterr()[1]
    assert list(command.metrics("new")) == [1, 2, 3]
    before = load_exported(exported).state_dict()
    file = command.folder / "new/checkpoints/step_00000003.ckpt"
    after = torch.load(file, weights_only=False)["state_dict"]
    assert not torch.equal(before["output.weight"], after["model.output.weight"])
    assert torch.allclose(before["output.weight"], after["model.output.weight"], atol=1e-9)

    if source == "an exported folder":
        assert command.inside("fit", *words, "ckpt_path=last", "trainer.max_steps=5") == 0
        assert "going on from step 3" in capfd.readouterr()[1]
        assert list(command.metrics("new")) == [1, 2, 3, 4, 5]
        assert command.inside("fit", *words, start) == 2
        assert "already holds a run" in capfd.readouterr()[1]
        assert list(command.metrics("new")) == [1, 2, 3, 4, 5]
    else:
        back = "ckpt_path=new/checkpoints/step_00000000.ckpt"
        assert command.inside("import", f"input={exported}", "output_dir=new") == 2
        assert "already holds a run" in capfd.readouterr()[1]
        again = ("output_dir=new", "overwrite=true")
        assert command.inside("import", f"input={exported}", *again) == 0
        assert command.inside("fit", *words, back, "trainer.max_steps=2") == 0
        assert command.inside("fit", *words, back, "trainer.max_steps=1") == 0
        assert list(command.metrics("new")) == [1], "rows of the start given up are gone"


def test_large_models_come_in_several_files(trained, command):
    words = ("shard_bytes=20000", f"output={command.folder / 'big'}")
    assert trained.inside("export", *LAST, *words) == 0
    assert len(list((command.folder / "big").glob("model-*.safetensors"))) > 1
    assert command.inside("import", "input=big", "output_dir=new") == 0
    imported = state(command.folder / "new/checkpoints/last")
    assert identical(imported, load_exported(command.folder / "big").state_dict())


def test_an_import_names_the_tensors_that_do_not_fit(exported, command, capfd):
    tensors = load_file(exported / "model.safetensors")
    shape = list(tensors["blocks.1.feed_forward.norm.weight"].shape)
    del tensors["blocks.0.attention_connection.phi"]
    tensors["blocks.1.feed_forward.norm.weight"] = torch.ones(7)
    tensors["blocks.9.stray"] = torch.ones(1)
    folder = command.folder / "changed"
    folder.mkdir()
    (folder / "config.json").write_text((exported / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors")
    error = error_of(command.inside("import", "input=changed", "output_dir=new"), capfd)
    assert "missing: blocks.0.attention_connection.phi [64, 24]" in error
    assert f"blocks.1.feed_forward.norm.weight is [7], not {shape}" in error
    assert "not in the model: blocks.9.stray [1]" in error
    assert not (command.folder / "new").exists()


IMPORT, EXPORT = ("import", "output_dir=new"), ("export", *LAST)
SOUND = (*IMPORT, "input={exported}")
BAD = {
    "no input": (IMPORT, "import needs input="),
    "nothing there": ((*IMPORT, "input=nowhere, really"), "nowhere, really is no folder"),
    "another width": ((*SOUND, "model.dim=24"), "embedding.weight is [257, 16], not [257, 24]"),
    "another connection": ((*SOUND, "connection=residual"), "not in the model: blocks.0."),
    "settings no tensor shows": ((*SOUND, "model.rope_theta=5"), "model.rope_theta=10000.0 (not 5"),
    "a connection's setting": ((*SOUND, "connection.eps=1e-6"), "connection.eps=1e-20 (not 1e-06)"),
    "no output": (EXPORT, "export needs output="),
    "no checkpoint": (("export", "output=x"), "export needs ckpt_path="),
    "output taken": ((*EXPORT, "output={exported}"), "already holds a model"),
    "shards of nothing": ((*EXPORT, "output=x", "shard_bytes=0"), "export.shard_bytes must be at"),
    "output not writable": ((*EXPORT, "output=/proc/x"), "cannot write /proc/x"),
    "some other folder": (("validate", "ckpt_path=run"), "run is no checkpoint; name one"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line(trained, exported, capfd, case):
    (name, *words), expected = BAD[case]
    words = [word.replace("{exported}", str(exported)) for word in words]
    assert expected in error_of(trained.inside(name, *words), capfd)
    assert not (trained.folder / "new").exists() and not (trained.folder / "x").exists()


def test_a_tokenizer_other_than_the_checkpoints_is_refused(trained, command, capfd):
    import tokenizers

    words = {chr(97 + k): k for k in range(26)} | {"[UNK]": 26, "<eos>": 27}
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    other.save(str(command.folder / "tokenizer.json"))
    other_tokenizer = f"data.tokenizer={command.folder / 'tokenizer.json'}"
    error = error_of(trained.inside(*EXPORT, "output=x", other_tokenizer), capfd)
    assert "tokenizer mismatch" in error and "bytes-257" in error
    assert not (trained.folder / "x").exists()

    (command.folder / "text").mkdir()
    lines = [json.dumps({"text": " ".join("abc" * k)}) for k in range(1, 60)]
    (command.folder / "text/a.jsonl").write_text("\n".join(lines))
    tokenizer = f"tokenizer={command.folder / 'tokenizer.json'}"
    prepare = ("input=text", "output=tokens", "num_workers=1", "validation_fraction=0.5", tokenizer)
    command.data = None
    assert command.inside("prepare", *prepare) == 0
    path = f"data.path={command.folder / 'tokens'}"
    error = error_of(trained.inside("validate", *LAST, path, "data.sequence_length=2"), capfd)
    assert "tokenizer mismatch" in error
