"""TensorBoard's event files: no step twice after resuming, and none lost on a full disk."""

import pytest
from full_disk import file_size_limit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhc_lightning.loggers import TensorBoard


def points(folder, tag):
    """All points in the files, as a reader sees them that knows nothing of restarts."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    # Files that begin in the same second are read in the order of their names.
    return sorted((event.step, event.value) for event in events.Scalars(tag))


def test_tensorboard_forgets_points_after_the_step_resumed_from(tmp_path):
    first = TensorBoard(tmp_path)
    for step in range(1, 8):
        first.log_metrics({"loss": float(step)}, step)
    first.save()
    file = next(tmp_path.glob("events.*"))
    file.write_bytes(file.read_bytes()[:-5])  # killed while writing step 7

    second = TensorBoard(tmp_path)
    _ = second.experiment  # Lightning makes it before it restores anything
    second.resume_from(4)
    assert points(tmp_path, "loss") == [(k, float(k)) for k in range(1, 5)]
    for step in range(5, 8):
        second.log_metrics({"loss": 10.0 * step}, step)
    second.finalize("success")
    assert points(tmp_path, "loss")[3:] == [(4, 4.0), (5, 50.0), (6, 60.0), (7, 70.0)]
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {"events"}


def test_tensorboard_survives_a_full_disk(tmp_path):
    log = TensorBoard(tmp_path)
    log.log_metrics({"loss": 1.0}, 1)
    log.save()
    size = next(tmp_path.glob("events.*")).stat().st_size
    with file_size_limit(size + 20), pytest.warns(RuntimeWarning, match="events") as warned:
        for step in range(2, 6):
            log.log_metrics({"loss": float(step)}, step)
            log.save()
    assert len(warned) == 1
    log.log_metrics({"loss": 6.0}, 6)
    log.save()
    assert points(tmp_path, "loss") == [(k, float(k)) for k in range(1, 7)]
