"""Every command reads a folder of shards as it reads a file."""

import json
import os
import shutil

import pytest
import torch

COMMON = ("callbacks=minimal", "model.num_experts=4", "model.num_active_experts=2",
          "model.num_shared_experts=1", "optimizer.schedule=constant",
          "trainer.max_steps=4")  # fmt: skip
SHARDED = "checkpoint.sharded=true"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, command_in):
    """Runs named as the forms that they were saved in; to be read only."""
    command = command_in(tmp_path_factory.mktemp("saved"))
    for name, words in (("file", ()), ("folder", (SHARDED,))):
        assert command.inside("fit", *COMMON, *words, f"output_dir={name}") == 0
    names = sorted(path.name for path in (command.folder / "folder/checkpoints").iterdir())
    assert names == ["last", "step_00000002", "step_00000004"]
    return command


@pytest.fixture
def runs(command, saved):
    """Copies of these runs."""
    shutil.copytree(saved.folder, command.folder, symlinks=True, dirs_exist_ok=True)
    return command


def test_commands_give_the_same_from_both_forms(runs, capsys):
    given = []
    capsys.readouterr()
    for name in ("file", "folder"):
        words = (*COMMON, f"output_dir={name}", "ckpt_path=last")
        assert runs.inside("validate", *words, "--json") == 0
        measured = json.loads(capsys.readouterr().out)
        assert measured.pop("checkpoint").endswith("step_00000004" + ".ckpt" * (name == "file"))
        assert runs.inside("generate", *words, "prompt=the", "max_new_tokens=20") == 0
        text = capsys.readouterr().out
        assert runs.inside("export", *words, f"output={name}_exported") == 0
        exported = runs.folder / f"{name}_exported/model.safetensors"
        given.append((measured, text, exported.read_bytes()))
    assert given[0] == given[1]
    other_width = "model.ffn_dim=32"
    code = runs.inside("validate", *COMMON, "output_dir=folder", "ckpt_path=last", other_width)
    assert code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "of another shape: model.blocks." in error and "step_00000004" in error


def test_a_run_goes_on_in_the_other_form_and_past_a_damaged_folder(runs, capsys):
    assert runs.inside("fit", *COMMON, SHARDED, "output_dir=whole", "trainer.max_steps=8") == 0
    longer = (*COMMON, "ckpt_path=last", "trainer.max_steps=8")
    os.truncate(runs.folder / "folder/checkpoints/step_00000004/__0_0.distcp", 5000)
    capsys.readouterr()
    assert runs.inside("fit", *longer, "output_dir=folder") == 0
    errors = capsys.readouterr().err
    assert "step_00000004 is not a complete checkpoint (__0_0.distcp is cut short" in errors
    assert "going on from step 2" in errors
    assert runs.inside("fit", *longer, SHARDED, "output_dir=file") == 0
    for name in ("folder", "file"):
        assert runs.metrics(name) == runs.metrics("whole"), name
        ending = ".ckpt" if name == "folder" else ""
        assert os.readlink(runs.folder / name / "checkpoints/last") == f"step_00000008{ending}"
    damaged = "ckpt_path=folder/checkpoints/step_00000004"
    (runs.folder / "folder/checkpoints/step_00000004").mkdir()
    (runs.folder / "folder/checkpoints/step_00000004/run.ckpt").write_bytes(b"")
    assert runs.inside("validate", *COMMON, "output_dir=folder", damaged) == 2
    assert ".metadata is missing" in capsys.readouterr().err.splitlines()[-1]


def test_overwriting_a_run_deletes_its_folders_and_starting_from_one_leaves_it(runs):
    source = "ckpt_path=folder/checkpoints/step_00000004"
    assert runs.inside("fit", *COMMON, SHARDED, "output_dir=more", source,
                       "trainer.max_steps=5") == 0  # fmt: skip
    assert os.readlink(runs.folder / "more/checkpoints/last") == "step_00000005"
    assert (runs.folder / "folder/checkpoints/step_00000004").is_dir()
    assert runs.inside("fit", *COMMON, "output_dir=folder", "trainer.max_steps=3",
                       "overwrite=true") == 0  # fmt: skip
    names = sorted(path.name for path in (runs.folder / "folder/checkpoints").iterdir())
    assert names == ["last", "step_00000002.ckpt", "step_00000003.ckpt"]


def test_both_forms_hold_what_rebuilds_their_module_and_data(saved, prepared):
    from mhc_lightning import LanguageModel, TextDataModule
    from mhc_lightning.modules import ManifoldHyperConnection

    loaded = {}
    for name in ("file", "folder"):
        path = (saved.folder / name / "checkpoints/last").resolve()
        loaded[name] = LanguageModel.load_from_checkpoint(path)
        data = TextDataModule.load_from_checkpoint(path)
        assert (data.batch_size, data.micro_batch_size, data.sequence_length) == (4, 2, 32)
        assert data.sources[0].path == str(prepared)
    tokens = data.training_sequences[0][None, :-1]
    logits = [module(tokens) for module in loaded.values()]
    assert torch.equal(*logits) and float(logits[0].std()) > 0
    for module in loaded.values():
        assert module.optimizer.warmup_steps == 2
        assert len(module.model.blocks) == 2
        assert isinstance(module.model.blocks[0].attention_connection, ManifoldHyperConnection)
