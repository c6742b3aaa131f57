"""A checkpoint file is complete, or not there."""

import resource
import signal

import pytest
import torch

from mhc_lightning.checkpoints.file_writing import write_checkpoint


def test_a_file_that_cannot_grow_leaves_nothing_behind(tmp_path):
    path = tmp_path / "step_00000001.ckpt"
    write_checkpoint({"state_dict": {"a": torch.zeros(3)}}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint({"state_dict": {"a": torch.zeros(100_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
