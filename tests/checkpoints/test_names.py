"""Which checkpoint is the last one."""

import shutil

from mhc_lightning.checkpoints.file_writing import write_checkpoint
from mhc_lightning.checkpoints.names import candidates_for_last
from mhc_lightning.files.atomic import point_link


def test_last_follows_the_link_and_falls_back_downwards(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint({"state_dict": {}}, tmp_path / f"step_{step:08d}.ckpt")
    assert [p.name[5:13] for p in candidates_for_last(tmp_path)] == [
        "00000030",
        "00000020",
        "00000010",
    ]
    point_link(tmp_path / "last", "step_00000020.ckpt")
    assert candidates_for_last(tmp_path)[0].name == "step_00000020.ckpt"
    assert len(candidates_for_last(tmp_path)) == 2


def test_last_falls_back_over_both_forms(tmp_path, saved):
    for step in (2, 3):
        write_checkpoint({"state_dict": {}}, tmp_path / f"step_{step:08d}.ckpt")
    shutil.copytree(saved, tmp_path / "step_00000003")
    point_link(tmp_path / "last", "step_00000003")
    names = [path.name for path in candidates_for_last(tmp_path)]
    assert names == ["step_00000003", "step_00000003.ckpt", "step_00000002.ckpt", "step_00000001"]
    point_link(tmp_path / "last", "step_00000002.ckpt")
    assert len(candidates_for_last(tmp_path)) == 2
