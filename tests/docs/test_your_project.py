"""The pages on your own Lightning project and on extensions, followed word by word."""

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import wandb as lightnings_wandb
from pages import follow

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PROJECT = [DOCS / "your_project/index.md", DOCS / "your_project/connections.md"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a reader is: with some texts, and the examples of this repository."""
    (tmp_path / "texts").mkdir()
    for number in range(40):
        text = f"Once upon a time there were {number} streams.\n" * 40
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "your_project/index",
        "your_project/trainer",
        "your_project/connections",
        "your_project/memory",
        "your_project/upcycling",
        "your_project/upcycling_families",
        "your_project/language_model",
        "your_project/lightning_cli",
        "your_project/hydra",
        "extend/connection",
        "extend/instrument",
    ],
)
def test_a_page_works_as_it_is_written(name: str, folder: Path) -> None:
    follow(DOCS / f"{name}.md", folder, before=PROJECT)


def test_gains_multiply_along_the_layers_of_another_project(folder: Path) -> None:
    printed = follow(DOCS / "your_project/callbacks.md", folder, before=PROJECT)
    assert "Peak(value=4.29" in printed  # 1.2 to the eighth


def test_the_alarm_saves_a_run(folder: Path) -> None:
    printed = follow(DOCS / "your_project/alarm.md", folder, before=PROJECT)
    spoilt, saved = (float(loss) for loss in re.findall(r"^loss (.*)$", printed, re.MULTILINE))
    assert saved < 0.5 * spoilt


def test_rows_alone_bound_the_forward_gain_alone(folder: Path) -> None:
    printed = follow(DOCS / "extend/kernel.md", folder, before=PROJECT)
    assert "forward 1.000" in printed
    assert float(printed.partition("backward ")[2].split()[0]) > 1.1


def test_the_pipeline_page_works(folder: Path) -> None:
    """Two devices are in tests/examples, by the same command."""
    printed = follow(DOCS / "your_project/pipeline.md", folder, skip="--devices 2")
    assert "validation loss" in printed


def test_both_namespaces_get_the_same_pictures(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(DOCS / "your_project/namespace.md", folder, before=PROJECT)
    (events,) = folder.glob("runs/old/**/events.out.tfevents.*")
    accumulator = EventAccumulator(str(events), size_guidance={"images": 0})
    accumulator.Reload()
    assert "stream_matrices/composite_0_to_7" in accumulator.Tags()["images"]


def test_numbers_and_pictures_arrive_at_wandb(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's library is not installed for tests: what Lightning's logger calls of it is noted."""
    logged: dict[str, Any] = {}

    def note(values: dict[str, Any], **_: Any) -> None:
        logged.update(values)

    run = SimpleNamespace(
        log=note,
        config=SimpleNamespace(update=lambda *_, **__: None),
        id="run",
    )
    stand_ins: dict[str, dict[str, Any]] = {
        "wandb": {"run": None, "init": lambda **_: run, "require": lambda _: None, "Image": tuple},
        "wandb.sdk": {},
        "wandb.sdk.lib": {"RunDisabled": type("RunDisabled", (), {})},
        "wandb.wandb_run": {"Run": type("Run", (), {})},
    }
    for name, members in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lightnings_wandb, "_WANDB_AVAILABLE", True)
    follow(DOCS / "your_project/loggers.md", folder, before=PROJECT)
    assert {"amax_gain/composite/backward", "stream_diversity/mean", "train/loss"} <= set(logged)
    assert {"amax_gain/profile", "stream_matrices/layer_0"} <= set(logged)
