"""Every command of README and the pages is of a known kind, and its settings exist."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from documents import DOCUMENTS, IN_ORDER, LAYOUTS, write_inputs
from in_process import run_main

from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.commands import COMMANDS
from mhc_lightning.cli.composition import compose_experiment

# Pages whose own tests follow them word by word.
FOLLOWED = ("docs/your_project/", "docs/extend/", "docs/mhc/", "docs/start/pretrained.md")
OUTSIDE = {  # run elsewhere: by the tests of the installation, of the recipes or of the kernels
    "docs/train/connections.md": ("python -m mhc_lightning.kernels.",),
    "docs/start/install.md": ("python -m pip", "python -c"),
}
PROGRAM = "-m mhc_lightning "


def words_of(line: str) -> list[str]:
    """The words behind `-m mhc_lightning`, whatever starts it."""
    return shlex.split(line.partition(PROGRAM)[2])


def run_make(line: str, cwd: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", line.replace("make ", "make --dry-run ", 1)],
        cwd=cwd,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_command_is_of_a_kind_that_is_tested(document, commands_in, repository):
    for line in commands_in(document):
        program, *words = shlex.split(line)
        if document.startswith(FOLLOWED) or line.startswith(OUTSIDE.get(document, ("\0",))):
            continue
        if PROGRAM in line:
            assert program == "python" or document in LAYOUTS, line
            assert words_of(line)[0] in (*COMMANDS, "--help"), line
        elif program == "python":
            assert (repository / words[0]).is_file(), line
        else:
            assert program in ("make", ".ci/run", "tensorboard"), line


def test_each_experiment_and_setting_exists(commands_in, tmp_path, monkeypatch):
    """All but `inspect` and `report`, which have no experiment, are composed as they are typed."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = {
        line
        for document in DOCUMENTS
        if not document.startswith(FOLLOWED)
        for line in commands_in(document)
        if PROGRAM in line
    }
    assert len(lines) > 25
    for line in sorted(lines):
        arguments = parse_arguments(words_of(line))
        if arguments.config is not None:
            compose_experiment(arguments)


def test_readmes_commands_are_those_of_pages(commands_in):
    lines = {line for document in IN_ORDER for line in commands_in(document)}
    assert set(commands_in("README.md")) <= lines | {"make quickstart", "make test"}


def test_make_targets_exist(commands_in, repository):
    lines = {line for document in DOCUMENTS for line in commands_in(document)}
    targets = " ".join(sorted(line[5:] for line in lines if line.startswith("make ")))
    assert "quickstart" in targets and "docs" in targets
    run_make(f"make {targets}", repository)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document, repository):
    text = (repository / document).read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (repository / document).parent.joinpath(target).exists(), target


def test_the_layouts_for_many_devices_fit(commands_in):
    """All but starting the processes."""
    from mhc_lightning.cli.components import build_model_for, build_trainer, check_layout, replicas
    from mhc_lightning.cli.strategy_choice import resolve_strategy

    layouts, module = [], None
    lines = [line for document in LAYOUTS for line in commands_in(document) if PROGRAM in line]
    for line in lines:
        arguments = parse_arguments([*words_of(line), "trainer.accelerator=cpu"])
        experiment, _ = resolve_strategy(compose_experiment(arguments))
        trainer = build_trainer(experiment, logger=False, enable_checkpointing=False)
        module = module or build_model_for(experiment, trainer)
        data = experiment.config.data
        size = data.micro_batch_size or data.batch_size // replicas(trainer)
        settings: Any = SimpleNamespace(micro_batch_size=size)
        check_layout(trainer, module, settings)
        assert data.batch_size % (size * replicas(trainer)) == 0, line
        layouts.append((type(trainer.strategy).__name__, trainer.world_size, replicas(trainer)))
    assert layouts == [
        ("PipelineStrategy", 8, 2),
        ("PipelineStrategy", 8, 1),
        ("FullyShardedStrategy", 8, 8),
        ("PipelineStrategy", 8, 1),
        ("FullyShardedStrategy", 8, 8),
        ("PipelineStrategy", 32, 4),
    ]


def test_tune_asks_for_a_gpu_where_there_is_none(commands_in, tmp_path):
    (line,) = (line for line in commands_in("docs/train/connections.md") if " tune " in line)
    words = [*words_of(line), "trainer.accelerator=cpu"]
    _, errors = run_main(*words, folder=tmp_path, code=2)
    assert "tune measures" in errors


def test_every_page_with_commands_is_run_somewhere(commands_in):
    known = {
        *IN_ORDER,
        *LAYOUTS,
        *("docs/start/install.md", "docs/train/plan.md", "docs/train/paper_models.md"),
        "docs/train/scale.md",
        *("docs/train/connections.md", "docs/recipes/index.md"),
    }
    for document in DOCUMENTS:
        if document.startswith("docs/") and not document.startswith(FOLLOWED):
            assert document in known or not commands_in(document), document
