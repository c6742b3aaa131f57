"""The pages' commands, typed one after another in one folder; and what they leave there.

Tiny networks and short runs take the place of the experiments' own.
"""

import csv
import json
import re
import shlex
import sys
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from documents import DOCS, IN_ORDER, blocks, json_keys, write_inputs
from in_process import run_main

pytestmark = pytest.mark.slow

TINY = [
    *("model.dim=32", "model.num_layers=1", "model.ffn_dim=32"),
    *("data.sequence_length=32", "data.batch_size=4", "trainer.accelerator=cpu"),
]
OVERRIDES = {
    "prepare": ["prepare.validation_fraction=0.2", "prepare.num_workers=1"],
    "fit": [*TINY, "trainer.log_every_n_steps=1", "trainer.val_check_interval=2"],
    "validate": TINY,
    "generate": [*TINY, "max_new_tokens=20"],
    "export": TINY,
    "import": TINY,
    "evaluate": [*TINY, "tasks=local", "include_path=tasks"],
}


@dataclass
class Followed:
    """What following the pages left: a folder, and what each command printed, by page."""

    folder: Path
    printed: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def printed_by(self, page: str, command: str) -> str:
        """What the first such command of a page printed."""
        return next(text for line, text in self.printed[page] if f" {command} " in line)


@pytest.fixture(scope="module")
def followed(tmp_path_factory, commands_in) -> Followed:
    everything = Followed(tmp_path_factory.mktemp("reader"))
    folder = everything.folder
    write_inputs(folder)
    steps: dict[str, int] = {}  # by run
    for page in IN_ORDER:
        for line in commands_in(page):
            program, *words = shlex.split(line)
            if program == "make":
                continue
            if program == "tensorboard":
                assert words == ["--logdir", "runs"]
                assert Path(sys.executable).with_name("tensorboard").is_file()
                assert list(folder.glob("runs/*/events.out.tfevents.*"))
                continue
            words = words[2:]
            command = words[0]
            more = list(OVERRIDES.get(command, []))
            if command == "fit" and "--print-config" not in words:
                run = next((word for word in words if word.startswith("output_dir=")), "")
                steps[run] = steps.get(run, 0) + 2  # a run that goes on has more to do
                more.append(f"trainer.max_steps={steps[run]}")
            given = {word.partition("=")[0] for word in more}
            kept = [word for word in words if word.partition("=")[0] not in given]
            output, _ = run_main(*kept, *more, folder=folder)
            everything.printed.setdefault(page, []).append((line, output))
    return everything


def test_each_command_does_what_its_page_says(followed):
    assert "val/loss" in followed.printed_by("docs/start/first_run.md", "validate")
    assert followed.printed_by("docs/start/first_run.md", "generate").startswith("Once upon")
    assert "wrote report/index.html" in followed.printed_by("docs/train/report.md", "report")
    assert "largest composite gain" in followed.printed_by("docs/train/watch.md", "inspect")
    assert "exact_match" in followed.printed_by("docs/train/exchange.md", "evaluate")
    assert (followed.folder / "pictures").is_dir()
    assert "hc" in (followed.folder / "runs/mine_hc/config.yaml").read_text()
    last = (followed.folder / "runs/more/checkpoints/last").resolve().name
    assert last == "step_00000000.ckpt"


def test_plans_are_printed(followed):
    plans = dict(followed.printed["docs/train/paper_models.md"])
    assert any("tokens/s" in text for text in plans.values())
    (printed,) = (text for line, text in plans.items() if "--json" in line)
    assert json.loads(printed)["parameters"]["total"] == 2972931976


def test_the_page_on_configuration_makes_an_experiment_of_a_file(followed):
    config = (followed.folder / "runs/from_file/config.yaml").read_text()
    assert "HyperConnection" in config and "ManifoldHyperConnection" not in config


def test_a_runs_configuration_is_an_experiment(followed):
    file = "runs/mine/config.yaml"
    printed, _ = run_main("fit", "--config", file, "--print-config", folder=followed.folder)
    assert "output_dir: runs/mine" in printed


def test_python_of_the_page_on_exchange(followed):
    names: dict = {}
    with chdir(followed.folder):
        for block in blocks("docs/train/exchange.md", "python"):
            exec(block, names)
    assert names["settings"].hc_mult == 4 and "hc_head_base" in names["tensors"]


def test_python_of_the_page_on_hugging_face(followed, capsys):
    from mhc_lightning.interchange import load_exported

    names: dict = {}
    with chdir(followed.folder):
        for block in blocks("docs/train/huggingface.md", "python"):
            exec(block, names)
        assert load_exported("my_tuned_model").vocab_size == names["model"].vocab_size
    assert all(
        begun in text
        for begun, text in zip(("Once upon a", "There were"), names["texts"], strict=True)
    )
    assert "Once upon a time" in capsys.readouterr().out


def tags_on_the_page() -> set[str]:
    """Patterns of the tags of docs/reference/tags.md."""
    text = (DOCS / "reference/tags.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", text, flags=re.MULTILINE)
    return {tag for row in rows for tag in re.findall(r"`([^`]+)`", row)}


def pattern_of(tag: str) -> str:
    pattern = re.escape(tag).replace("<k>", r"\d+").replace("<first>", r"\d+")
    pattern = pattern.replace("<last>", r"\d+").replace("<tag>", r"[a-z_/]+").replace("…", ".+")
    return pattern


def test_the_page_of_tags_has_every_logged_tag(followed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged: set[str] = set()
    for run in ("mine", "watched"):
        events = EventAccumulator(str(followed.folder / "runs" / run))
        events.Reload()
        logged |= {*events.Tags()["scalars"], *events.Tags()["images"]}
        with open(followed.folder / "runs" / run / "metrics.csv", encoding="utf-8") as file:
            logged |= set(next(csv.reader(file))) - {"step"}
    patterns = [pattern_of(tag) for tag in tags_on_the_page()]
    for tag in logged:
        assert any(re.fullmatch(pattern, tag) for pattern in patterns), tag
    elsewhere = {"train/mfu"}  # where the device's peak is known
    for tag in tags_on_the_page() - elsewhere:
        if not tag.startswith(("alarm/", "experts/", "epoch", "memory/")):
            pattern = pattern_of(tag)
            assert any(re.fullmatch(pattern, name) for name in logged), f"{tag} is not logged"


def keys_on_the_page(section: str) -> set[str]:
    """The keys in the first table of a section of docs/reference/file_formats.md."""
    text = (DOCS / "reference/file_formats.md").read_text(encoding="utf-8")
    text = text.split(section, 1)[1].split("\n## ")[0].split("\n### ")[0]
    (table,) = re.findall(r"^\| key \| .*?(?=^$|\Z)", text, flags=re.MULTILINE | re.DOTALL)[:1]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


def test_the_page_of_formats_has_every_key(followed):
    import torch

    run = followed.folder / "runs/mine"
    environment = keys_on_the_page("### `environment.json`")
    assert json_keys(run / "environment.json") == environment
    assert json_keys(followed.folder / "data/mine/prepared.json") == keys_on_the_page(
        "`prepared.json`:"
    )
    report = json.loads((followed.folder / "report/report.json").read_text())
    assert set(report) == {"baseline", "runs", "over_seeds"}
    assert set(report["runs"][0]) == keys_on_the_page("`report.json` has")
    checkpoint = torch.load(run / "checkpoints/last", weights_only=False)
    assert keys_on_the_page("**One file**") <= set(checkpoint)
    config = json_keys(followed.folder / "my_model/config.json")
    page = (DOCS / "reference/file_formats.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in page.split("`config.json` has")[1] for key in config)
