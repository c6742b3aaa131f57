"""`export form=huggingface`: what transformers and every other command make of the folder."""

import json
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mhc_lightning.huggingface  # noqa: F401  (registers the models)

LAST = ("output_dir=run", "ckpt_path=last")


@pytest.fixture(scope="module")
def folder(trained):
    assert trained.inside("export", *LAST, "output=hf", "form=huggingface") == 0
    return trained.folder / "hf"


def printed(capfd, command, *words):
    capfd.readouterr()
    assert command.inside(*words) == 0
    return capfd.readouterr()[0]


def test_commands_take_the_folder_as_a_checkpoint(trained, folder, capfd, tmp_path):
    told = ("prompt=the gain", "max_new_tokens=12", "temperature=0")
    expected = printed(capfd, trained, "generate", *LAST, *told)
    found = printed(capfd, trained, "generate", f"ckpt_path={folder}", *told)
    assert found == expected
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("the gain", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == expected.removesuffix("\n")
    losses = [
        json.loads(printed(capfd, trained, "validate", *words, "--json"))["val/loss"]
        for words in (LAST, ("output_dir=run", f"ckpt_path={folder}"))
    ]
    assert losses[0] == losses[1]


def test_training_goes_on_from_the_folder(trained, folder, tmp_path):
    assert trained.inside("export", *LAST, f"output={tmp_path / 'own'}") == 0
    for source, run in ((folder, "a"), (tmp_path / "own", "b")):
        assert trained.inside("import", f"input={source}", f"output_dir={tmp_path / run}") == 0
    a, b = (
        torch.load(tmp_path / run / "checkpoints/last", weights_only=True)["state_dict"]
        for run in ("a", "b")
    )
    assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_other_forms_and_damaged_folders_are_refused(trained, folder, capfd, tmp_path):
    def last_error(*words):
        capfd.readouterr()
        assert trained.inside(*words) == 2
        return capfd.readouterr()[1].splitlines()[-1]

    error = last_error("export", *LAST, "output=never", "form=gguf")
    assert error == "error: export.form must be mhc_lightning or huggingface, not gguf"
    assert not (trained.folder / "never").exists()
    error = last_error("export", *LAST, "output=hf", "form=huggingface")
    assert "hf already holds a model" in error
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    record = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**record, "network": {"model": {}}}))
    error = last_error("generate", f"ckpt_path={copy}", "prompt=a")
    assert "config.json is incomplete: KeyError('connection')" in error


def test_without_transformers_the_extra_is_named(trained, capfd, monkeypatch):
    import importlib.util
    import sys

    for name in [n for n in sys.modules if n.startswith("mhc_lightning.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else find(name)
    )
    capfd.readouterr()
    assert trained.inside("export", *LAST, "output=none", "form=huggingface") == 2
    error = capfd.readouterr()[1].splitlines()[-1]
    assert error.endswith("`huggingface`: pip install 'mhc-lightning[huggingface]'")
