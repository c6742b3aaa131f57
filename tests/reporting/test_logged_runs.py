import math

import numpy as np
import pytest

from mhc_lightning.errors import UserError
from mhc_lightning.reporting import run_description
from mhc_lightning.reporting.logged_runs import read_runs
from mhc_lightning.reporting.metric_series import Series


def test_a_folder_of_runs_is_searched_and_each_run_read_once(runs):
    found = read_runs([str(runs / "mhc"), str(runs), f"{runs}/hc/"])
    assert [run.name for run in found] == ["mhc", "foreign", "hc", "residual"]
    killed, foreign, *_ = found
    assert killed.last_step == 800, "a line that was cut is no row"
    assert killed.setting("data.path") == "data/${mine}", "escaped interpolations are undone"
    assert foreign.config is None and foreign.environment is None
    assert (
        run_description.connection(foreign) is None
        and run_description.planned_steps(foreign) is None
    )
    assert {run_description.UNKNOWN} == set(run_description.what_was_run(foreign).values())


def test_event_files_alone_hold_the_same_numbers(runs, write):
    folder, points = runs.parent / "events", {1: 0.25, 2: math.nan, 3: math.inf, 10: -1e-30}
    write.events(folder, {"train/loss": points})
    (run,) = read_runs([str(folder)])
    series = run.scalars["train/loss"]
    assert series.steps.tolist() == [1, 2, 3, 10]
    assert np.array_equal(
        series.values, np.array(list(points.values()), np.float32), equal_nan=True
    )
    picture = run.pictures["stream_matrices/layer_0"]
    assert (picture.step, picture.width, picture.height) == (10, 5, 4)
    assert picture.png.startswith(b"\x89PNG")


def test_what_a_run_logged_before_it_went_back_to_a_checkpoint_is_forgotten(tmp_path, write):
    write.events(tmp_path, {"train/loss": {1: 1.0, 2: 2.0, 3: 3.0}}, filename_suffix=".a")
    write.events(tmp_path, {"train/loss": {2: 5.0}}, purge_step=2, filename_suffix=".b")
    (run,) = read_runs([str(tmp_path)])
    assert run.scalars["train/loss"].values.tolist() == [1.0, 5.0]
    assert run.pictures["stream_matrices/layer_0"].step == 2


def test_scalars_in_tensorflows_way_and_a_file_with_a_cut_end(tmp_path):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.scalar.metadata import create_summary_metadata
    from tensorboard.summary.writer.record_writer import RecordWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    about = create_summary_metadata(display_name=None, description=None)
    with open(tmp_path / "events.out.tfevents.1.host", "wb") as file:
        for step in (1, 2):
            tensor = make_tensor_proto(0.5 * step, dtype="float32")
            value = Summary.Value(tag="train/loss", tensor=tensor, metadata=about)
            event = Event(step=step, summary=Summary(value=[value]))
            RecordWriter(file).write(event.SerializeToString())
        file.write(b"\x12\x00\x00")
    (run,) = read_runs([str(tmp_path)])
    assert [s.values.tolist() for s in run.scalars.values()] == [[0.5, 1.0]]


def test_the_table_counts_and_event_files_add_what_it_lacks(tmp_path, write):
    write.events(tmp_path, {"train/loss": {1: 9.0}, "other": {1: 2.0}})
    write.table(tmp_path, {"train/loss": {1: 0.1}, "epoch": {1: 0}, "name": {1: "text"}})
    (run,) = read_runs([str(tmp_path)])
    assert {tag: s.values.tolist() for tag, s in run.scalars.items()} == {
        "train/loss": [0.1], "other": [2.0], "epoch": [0.0],
    }  # fmt: skip


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, write):
    for place in ("a/version_0", "b/version_0", "b/version_1"):
        write.table(tmp_path / place, {"train/loss": {1: 1.0}})
    names = [run.name for run in read_runs([str(tmp_path)])]
    assert names == ["a/version_0", "b/version_0", "version_1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "is not there"),
        (lambda folder: _text(folder / "file"), "is a file"),
        (lambda folder: folder, "holds no metrics"),
        (lambda folder: _text(folder / "metrics.csv", "step,train/loss\n").parent, "nothing is"),
        (lambda folder: _text(folder / "metrics.csv", "a,b\n1,2\n").parent, "nothing is"),
    ],
)
def test_what_is_no_run_is_a_user_error(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        read_runs([str(make(tmp_path))])


def _text(file, text="x"):
    file.write_text(text)
    return file


def test_running_means_keep_lines_straight_and_ends_in_place():
    line = Series(np.arange(50), np.linspace(0.0, 1.0, 50))
    assert np.allclose(line.smoothed(7).values, line.values)
    bump = Series(np.arange(9), np.eye(9)[4])
    assert np.allclose(bump.smoothed(3).values, np.r_[0, 0, 0, 1, 1, 1, 0, 0, 0] / 3)


def test_checkpoints_that_are_folders_are_seen_as_files_are(tmp_path, write):
    """Names follow the rule that writing and resuming go by; what only looks like it does not."""
    write.events(tmp_path, {"train/loss": {10: 1.0, 20: 0.5}})
    folder = tmp_path / "checkpoints"
    for name in ("step_00000100", "step_00000200.ckpt", "step_00000300", ".aside-step_00000400",
                 "step_x", "step_00000500.ckpt.tmp"):  # fmt: skip
        (folder / name).mkdir(parents=True)
    for name in ("step_00000050.ckpt", "step_00000300.ckpt", "step_00000600", "steps.ckpt"):
        (folder / name).touch()
    (run,) = read_runs([str(tmp_path)])
    assert run.saved_steps == (50, 100, 300)
    assert run.last_step == 300
