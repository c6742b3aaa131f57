"""Every command with a memory of n-grams, from all forms of a checkpoint, and what is refused."""

import json
import os
import shutil
from itertools import cycle

import pytest
import torch

from mhc_lightning.checkpoints.reading import load_checkpoint
from mhc_lightning.interchange import load_exported

ENGRAM = ("memory=engram", "memory.rows=300", "memory.num_heads=2", "memory.dim=8")
OVER_ENCODING = ("memory=over_encoding", "memory.rows=301", "memory.num_heads=2", "memory.dim=8")
COMMON = ("callbacks=minimal", "optimizer.schedule=constant", "trainer.max_steps=4",
          "optimizer.lr=0.01")  # fmt: skip
SHARDED = "checkpoint.sharded=true"
RUNS = {
    "engram": ENGRAM,
    "engram_folder": (*ENGRAM, SHARDED),
    "over_encoding": OVER_ENCODING,
    "none": (),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, command_in):
    """Runs with each memory, and their exported folders; to be read only."""
    command = command_in(tmp_path_factory.mktemp("saved"))
    for name, words in RUNS.items():
        assert command.inside("fit", *COMMON, *words, f"output_dir={name}") == 0
        last = (*COMMON, *words, f"output_dir={name}", "ckpt_path=last")
        assert command.inside("export", *last, f"output={name}_exported") == 0
    return command


@pytest.fixture
def runs(command, saved):
    """Copies of these runs."""
    shutil.copytree(saved.folder, command.folder, symlinks=True, dirs_exist_ok=True)
    return command


def state(command, name):
    last = (command.folder / name / "checkpoints/last").resolve()
    return dict(load_checkpoint(last, trusted=True)["state_dict"])


@pytest.mark.parametrize("kind", ["engram", "over_encoding"])
def test_commands_give_the_same_from_all_forms(saved, capsys, kind):
    memory = RUNS[kind]
    forms = [(f"output_dir={kind}", "ckpt_path=last"), (f"ckpt_path={kind}_exported",)]
    forms += [("output_dir=engram_folder", "ckpt_path=last")] if kind == "engram" else []
    given = []
    for form in forms:
        capsys.readouterr()
        assert saved.inside("validate", *COMMON, *memory, *form, "--json") == 0
        measured = json.loads(capsys.readouterr().out)
        drawing = ("prompt=the gain", "max_new_tokens=20", "temperature=0.9")
        assert saved.inside("generate", *COMMON, *memory, *form, *drawing) == 0
        given.append(({**measured, "checkpoint": ""}, capsys.readouterr().out))
    assert all(one == given[0] for one in given)
    weights = load_exported(saved.folder / f"{kind}_exported").state_dict()
    kept = {name.removeprefix("model."): tensor for name, tensor in state(saved, kind).items()}
    assert list(weights) == list(kept)
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    assert any(name.endswith("memory.table.weight") for name in weights)
    assert int(weights["memory.hash.document_end"]) == 256


def test_a_folder_of_shards_is_exported_as_a_file_is(saved):
    files = [f"{name}_exported/model.safetensors" for name in ("engram", "engram_folder")]
    one, two = ((saved.folder / file).read_bytes() for file in files)
    assert one == two


def test_inspect_reads_checkpoints_with_a_memory(saved, capsys):
    from mhc_lightning.cli.main import main

    for kind in ("engram", "over_encoding"):
        given = []
        for path in (f"{kind}/checkpoints/last", f"{kind}_exported"):
            for more in ([], ["input=the gain of the"]):
                assert main(["inspect", str(saved.folder / path), *more, "--json"]) == 0
                given.append({**json.loads(capsys.readouterr().out), "checkpoint": ""})
        assert given[:2] == given[2:]


@pytest.mark.parametrize("name", ["engram", "engram_folder", "over_encoding"])
def test_a_run_goes_on_as_if_nothing_had_stopped_it(runs, name):
    words = (*COMMON, *RUNS[name], "trainer.max_steps=7")
    assert runs.inside("fit", *words, "output_dir=whole") == 0
    assert runs.inside("fit", *words, f"output_dir={name}", "ckpt_path=last") == 0
    assert runs.metrics(name) == runs.metrics("whole")
    one, two = state(runs, name), state(runs, "whole")
    assert list(one) == list(two) and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("kind", ["engram", "over_encoding"])
def test_an_import_starts_with_the_memory(runs, kind):
    words = (*COMMON, *RUNS[kind], "output_dir=new")
    assert runs.inside("import", *words, f"input={kind}_exported") == 0
    before, after = state(runs, kind), state(runs, "new")
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
    assert runs.inside("fit", *words, "ckpt_path=last", "trainer.max_steps=1") == 0
    assert runs.inside("fit", *words, f"ckpt_path={kind}_exported", "trainer.max_steps=1",
                       "output_dir=newer") == 0  # fmt: skip
    assert runs.metrics("new") == runs.metrics("newer")


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_a_trained_model_gets_a_memory_and_starts_as_the_same_function(runs, capsys, strategy):
    start = (*COMMON, f"strategy={strategy}", "ckpt_path=none_exported", "trainer.max_steps=2")
    assert runs.inside("fit", *start, *ENGRAM, "output_dir=more") == 0
    said = "the memory begins with its initial values"
    assert said in capsys.readouterr().err
    assert runs.inside("fit", *start, "output_dir=same") == 0
    assert said not in capsys.readouterr().err
    with_memory, without = runs.metrics("more"), runs.metrics("same")
    assert with_memory[1]["train/loss"] == without[1]["train/loss"]
    assert with_memory[2]["train/loss"] != without[2]["train/loss"], "from then on it learns"
    assert int(state(runs, "more")["model.memory.hash.document_end"]) == 256


REFUSED = {
    "without a memory": (("output_dir=engram",), "memory=engram (not none)"),
    "with a memory": (
        (*ENGRAM, "output_dir=none"),
        "memory=none (not engram); use the settings it was trained with (config.yaml of its run);"
        " to add a memory, export it, and begin by fit ckpt_path=FOLDER",
    ),
    "another kind": ((*OVER_ENCODING, "output_dir=engram"), "memory=engram (not over_encoding)"),
    "blocks": (
        (*ENGRAM, "memory.layers=[1]", "output_dir=engram"), "memory.layers=[0, 1] (not [1])",
    ),
    "orders in a folder": (
        (*ENGRAM, "memory.orders=[2,4]", "output_dir=engram_folder"),
        "memory.orders=[2, 3] (not [2, 4])",
    ),
    "heads": ((*ENGRAM, "memory.num_heads=4", "output_dir=engram"), "memory.num_heads=2 (not 4)"),
    "rows": (
        (*ENGRAM, "memory.rows=500", "output_dir=engram"), "memory.rows=[307, 313] (not [503,",
    ),
    "width": ((*ENGRAM, "memory.dim=4", "output_dir=engram_folder"), "memory.dim=8 (not 4)"),
    "seed": ((*ENGRAM, "memory.seed=2", "output_dir=engram_folder"), "of memory.seed=2)"),
    "word scale": (
        (*OVER_ENCODING, "memory.word_scale=mean", "output_dir=over_encoding"),
        "memory.word_scale=full (not mean)",
    ),
    "compression": (
        (*ENGRAM, "memory.compress=false", "output_dir=engram"), "memory.compress=True (not False)",
    ),
    "documents": (
        (*OVER_ENCODING, "memory.documents=false", "output_dir=over_encoding"),
        "memory.documents=True (not False)",
    ),
}  # fmt: skip


COMMANDS = {
    "fit": ("trainer.max_steps=9",),
    "validate": (),
    "generate": ("prompt=x",),
    "export": ("output=nothing",),
}


@pytest.mark.parametrize(("case", "name"), [*zip(REFUSED, cycle(COMMANDS), strict=False)])
def test_another_memory_is_refused_by_name(saved, capsys, case, name):
    words, expected = REFUSED[case]
    before = sorted(os.listdir(saved.folder))
    assert saved.inside(name, *COMMON, *words, "ckpt_path=last", *COMMANDS[name]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors and "going on" not in errors
    error = errors.splitlines()[-1]
    assert error.startswith("error: the memory of ") and expected in error
    assert sorted(os.listdir(saved.folder)) == before
    run = next(word.removeprefix("output_dir=") for word in words if "output_dir" in word)
    assert list(saved.metrics(run)) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["fit", "import", "validate"])
def test_another_memory_than_an_exported_one_is_refused(saved, capsys, name):
    for words, source, expected in (
        ((), "engram", "memory=engram (not none)"),
        ((*ENGRAM, "memory.num_heads=4"), "engram", "memory.num_heads=2 (not 4)"),
        ((*ENGRAM, "memory.seed=2"), "engram", "of memory.seed=2)"),
        (ENGRAM, "over_encoding", "memory=over_encoding (not engram)"),
        (ENGRAM, "none", "memory=none (not engram)"),
    ):
        if name == "fit" and source == "none":
            continue  # there a memory is added
        key = "input" if name == "import" else "ckpt_path"
        path = f"{key}={source}_exported"
        assert saved.inside(name, *COMMON, *words, "output_dir=nothing", path) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: the memory of ") and expected in error
        assert not list(saved.folder.glob("nothing/*")), "nothing is written"


def test_a_tokenizer_whose_tokens_are_alike_in_another_way_is_refused(saved, capsys, monkeypatch):
    """As with another version of the library: the ids are the same, their classes are not."""
    from mhc_lightning.data import token_classes

    honest = token_classes.token_classes

    def other(tokens):
        classes = honest(tokens).copy()
        classes[7] = classes[9]
        return classes

    monkeypatch.setattr(token_classes, "token_classes", other)
    token_classes._classes_of.cache_clear()
    for form in (("output_dir=engram", "ckpt_path=last"), ("ckpt_path=engram_exported",)):
        for name, more in (
            ("validate", ()),
            ("generate", ("prompt=x",)),
            ("export", ("output=x",)),
        ):
            assert saved.inside(name, *COMMON, *ENGRAM, *form, *more) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert "another tokenizer, with 1 of 257 tokens of another class" in error
    resumed = (*COMMON, *ENGRAM, "output_dir=engram", "ckpt_path=last", "trainer.max_steps=9")
    assert saved.inside("fit", *resumed) == 2
    assert "another tokenizer, with 1 of 257" in capsys.readouterr().err.splitlines()[-1]
    token_classes._classes_of.cache_clear()


@pytest.mark.slow
def test_a_run_with_a_memory_goes_on_in_any_layout(command):
    """Two stages, one device, two shards: files and folders, and the same memory everywhere."""
    words = (*COMMON, *ENGRAM, "memory.layers=[0,1]", "data.micro_batch_size=2",
             "optimizer.eps=1e-6", "checkpoint.every_n_steps=1", "output_dir=moving")  # fmt: skip
    layouts = (
        ("strategy=pipeline", "trainer.devices=2"),
        (),
        ("strategy=fsdp", "trainer.devices=2"),
        ("strategy=ddp", "trainer.devices=2"),
    )
    for steps, layout in enumerate(layouts, 1):
        resumed = ("ckpt_path=last",) if steps > 1 else ()
        command("fit", *words, *layout, *resumed, f"trainer.max_steps={steps}")
    command("fit", *words, "output_dir=still", "trainer.max_steps=4")
    moving, still = command.metrics("moving"), command.metrics("still")
    assert list(moving) == list(still) == [1, 2, 3, 4]
    for step, row in still.items():
        for tag in ("train/loss", "train/grad_norm"):
            assert float(moving[step][tag]) == pytest.approx(float(row[tag]), rel=1e-4), (step, tag)
    one, two = state(command, "moving"), state(command, "still")
    assert list(one) == list(two)
    for name, tensor in two.items():
        if tensor.dtype == torch.int64:
            assert torch.equal(one[name], tensor), name
    for layout in layouts[::2]:
        refused = (*words, *layout, "memory.seed=5", "ckpt_path=last")
        _, errors = command("validate", *refused, code=2)
        assert "of memory.seed=5)" in errors.splitlines()[-1]
