"""Event files of torch and TensorFlow: scalars, pictures, restarts and cut ends."""

import math

import numpy as np

from mhc_lightning.reporting.logged_runs import read_runs


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
    first = {"train/loss": {1: 1.0, 2: 2.0, 3: 3.0}, "val/loss": {1: 0.5, 2: 0.6}}
    write.events(tmp_path, first, filename_suffix=".a")
    write.events(tmp_path, {"train/loss": {2: 5.0}}, purge_step=2, filename_suffix=".b")
    (run,) = read_runs([str(tmp_path)])
    assert run.scalars["train/loss"].values.tolist() == [1.0, 5.0]
    assert run.scalars["val/loss"].steps.tolist() == [1]
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
