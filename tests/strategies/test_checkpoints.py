"""Checkpoints of several processes: exact in the same layout, and good for any other."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_lightning.checkpoints.names import candidates_for_last, saved_steps
from mhc_lightning.checkpoints.reading import load_whole_folder
from mhc_lightning.checkpoints.refusals import fault_in

SCRIPT = Path(__file__).with_name("checkpoints_in_processes.py")
FOLDERS: dict[str, Any] = {"sharded": True}
BACKGROUND = {"asynchronous": True}
FSDP = {"strategy": "fsdp", "devices": 2}
PIPELINE = {"strategy": "pipeline", "devices": 2, "layout": {"schedule": "1f1b"}}


def launch(folder: Path, processes: int, *legs: dict[str, Any], code: int = 0) -> str:
    """Run legs in one launch of so many processes; gives what was written to standard error."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [
            sys.executable,
            *(launcher if processes > 1 else []),
            str(SCRIPT),
            json.dumps([{"save": {}, **leg} for leg in legs]),
            str(folder),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == code, done.stderr[-5000:]
    return done.stderr


def metrics(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def flat(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested values, by their places in them."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if not isinstance(value, dict | list | tuple):
        return {}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: t for key, v in items for k, t in flat(v, f"{name}/{key}").items()}


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """In the same layout, noise of each process included; written in the background or not."""
    legs = []
    for name, layout in (("fsdp", FSDP), ("pipeline", PIPELINE)):
        common = {**layout, "noise": True, "muon": True}
        legs += [
            {**common, "folder": f"{name}/whole", "steps": 7},
            {**common, "folder": f"{name}/background", "steps": 7, "save": BACKGROUND},
            {**common, "folder": f"{name}/resumed", "steps": 4, "save": BACKGROUND},
            {**common, "folder": f"{name}/resumed", "steps": 7, "resume": "last"},
        ]
    launch(tmp_path, 2, *legs)
    for name in ("fsdp", "pipeline"):
        text = (tmp_path / name / "whole/metrics.csv").read_text()
        assert len(text.splitlines()) == 8
        ends = {}
        for way in ("whole", "background", "resumed"):
            assert (tmp_path / name / way / "metrics.csv").read_text() == text, (name, way)
            path = (tmp_path / name / way / "checkpoints/last").resolve()
            assert path.name == "step_00000007" and fault_in(path) is None
            sizes = [shards.stat().st_size for shards in path.glob("*.distcp")]
            assert len(sizes) == 2 and max(sizes) < 0.7 * sum(sizes), "each has written its own"
            ends[way] = flat(load_whole_folder(path, trusted=True))
        for way in ("background", "resumed"):
            assert ends[way].keys() == ends["whole"].keys()
            for key, tensor in ends["whole"].items():
                assert torch.equal(tensor, ends[way][key]), (name, way, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "save"),
    [
        (FSDP, FOLDERS),
        (FSDP, {"sharded": False}),
        (PIPELINE, BACKGROUND),
        ({"strategy": "ddp", "devices": 2}, {}),
    ],
    ids=["fsdp", "fsdp file", "pipeline background", "ddp"],
)
def test_what_one_process_holds_and_is_not_finite_stops_all(
    tmp_path: Path, layout: dict[str, Any], save: dict[str, Any]
) -> None:
    """In the same step, with the same words, and before anything is written."""
    launch(tmp_path, 2, {**layout, "folder": "run", "steps": 6, "spoils_step": 4, "save": save})
    words = {(tmp_path / f"run-{rank}").read_text() for rank in (0, 1)}
    assert len(words) == 1
    assert re.match(
        r"a checkpoint was refused because parameter model\..* is NaN in (\d+) of \1 values"
        r" on rank 1 at step 4 ",
        words.pop(),
    )
    folder = tmp_path / "run/checkpoints"
    assert (
        saved_steps(folder) == [2] and candidates_for_last(folder)[0].name[:13] == "step_00000002"
    )


@pytest.mark.slow
def test_any_layout_goes_on_with_any_others_folder(tmp_path: Path) -> None:
    """Optimizer state and all: a run that moves is the run that stays."""
    moving = {"folder": "moving", "resume": "last"}
    launch(
        tmp_path,
        2,
        {**moving, **PIPELINE, "steps": 2, "resume": None, "layout": {"schedule": "zbv"}},
    )
    launch(tmp_path, 1, {**moving, "strategy": "single", "steps": 4, "save": FOLDERS},
           {"folder": "still", "strategy": "single", "steps": 14})  # fmt: skip
    four: dict[str, Any] = {**moving, "strategy": "pipeline", "devices": 4}
    launch(
        tmp_path,
        4,
        {**four, "layout": {"schedule": "1f1b", "pipeline_size": 2}, "steps": 6},
        {**four, "layout": {"schedule": "gpipe"}, "steps": 8},
        {**moving, "strategy": "fsdp", "devices": 4, "steps": 9, "save": BACKGROUND},
    )
    launch(
        tmp_path,
        2,
        {**moving, **FSDP, "steps": 10},
        {**moving, "strategy": "ddp", "devices": 2, "steps": 11, "save": FOLDERS},
        {**moving, **PIPELINE, "steps": 12, "save": {"sharded": False}},
        {**moving, **FSDP, "steps": 13, "save": BACKGROUND},
    )
    launch(tmp_path, 1, {**moving, "strategy": "single", "steps": 14})
    ours, expected = metrics(tmp_path / "moving"), metrics(tmp_path / "still")
    assert [row["step"] for row in ours] == list(range(1, 15))
    for row, wanted in zip(ours, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)
    ends = [
        flat(torch.load(tmp_path / name / "checkpoints/step_00000014.ckpt", weights_only=False))
        for name in ("moving", "still")
    ]
    tensors = [{k: t for k, t in end.items() if "/random_states" not in k} for end in ends]
    assert tensors[0].keys() == tensors[1].keys()
    for key, tensor in tensors[1].items():
        difference = torch.linalg.vector_norm(tensors[0][key].double() - tensor.double())
        assert difference <= 1e-6 * torch.linalg.vector_norm(tensor.double()), key


@pytest.mark.slow
@pytest.mark.parametrize("save", [FOLDERS, BACKGROUND], ids=["folder", "background"])
def test_a_process_killed_while_it_writes_loses_that_checkpoint_alone(
    tmp_path: Path, save: dict[str, Any]
) -> None:
    run = {**FSDP, "folder": "run", "save": save}
    launch(tmp_path, 2, {**run, "steps": 7, "kill_at": 4}, code=1)
    folder = tmp_path / "run/checkpoints"
    assert os.readlink(folder / "last") == "step_00000002"
    assert candidates_for_last(folder) == [folder / "step_00000002"]
    assert (folder / ".aside-step_00000004/__1_0.distcp").exists()
    launch(tmp_path, 2, {**run, "steps": 7, "resume": "last"},
           {**run, "folder": "whole", "steps": 7})  # fmt: skip
    texts = [(tmp_path / name / "metrics.csv").read_text() for name in ("run", "whole")]
    assert texts[0] == texts[1]
    assert sorted(path.name for path in folder.iterdir()) == [
        "last",
        "step_00000006",
        "step_00000007",
    ]
