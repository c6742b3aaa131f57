"""Which checkpoint `ckpt_path=last` means where the folder is not as a run left it."""

import os
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mhc_lightning.checkpoints.file_writing import write_checkpoint
from mhc_lightning.cli.checkpoints import find_checkpoint
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.errors import UserError
from mhc_lightning.files.atomic import point_link


class Asked:
    """An experiment, as far as it is looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def values(self) -> dict[str, Any]:
        return {"ckpt_path": "last", "output_dir": str(self.folder)}


def find(folder: Path) -> str:
    found = find_checkpoint(cast(Experiment, Asked(folder)))
    assert found is not None
    return found.name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 4 and 8, of which `last` names the later."""
    for step in (4, 8):
        name = f"step_{step:08d}.ckpt"
        write_checkpoint({"state_dict": {"w": torch.ones(2)}}, tmp_path / "checkpoints" / name)
        point_link(tmp_path / "checkpoints/last", name)
    return tmp_path


def test_a_link_that_leads_nowhere_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find(folder) == "step_00000008.ckpt" and not capsys.readouterr().err
    (folder / "checkpoints/step_00000008.ckpt").unlink()
    assert find(folder) == "step_00000004.ckpt"
    assert "step_00000008.ckpt is missing; using step_00000004.ckpt" in capsys.readouterr().err
    (folder / "checkpoints/step_00000004.ckpt").unlink()
    with pytest.raises(UserError, match=r"no sound checkpoint.*step_00000008.ckpt is missing"):
        find(folder)


def test_a_copy_in_place_of_the_link_is_no_reason_to_start_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Starting over deletes what is there."""
    last = folder / "checkpoints/last"
    saved = last.resolve()
    last.unlink()
    shutil.copy(saved, last)
    assert find(folder) == "step_00000008.ckpt"
    assert "last is a copy instead of a link" in capsys.readouterr().err
    for name in sorted(os.listdir(folder / "checkpoints")):
        if name != "last":
            (folder / "checkpoints" / name).unlink()
    with pytest.raises(UserError, match=r"no sound checkpoint.*last is a copy instead of a link"):
        find(folder)
