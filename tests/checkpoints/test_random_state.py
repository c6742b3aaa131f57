"""Random number generators go on where a checkpoint left them."""

import random

import numpy as np
import torch

from mhc_lightning.checkpoints.file_writing import write_checkpoint
from mhc_lightning.checkpoints.random_state import capture_random_state, restore_random_state
from mhc_lightning.checkpoints.reading import load_checkpoint


def test_random_state_survives_a_checkpoint(tmp_path):
    device = torch.device("cpu")
    path = tmp_path / "x.ckpt"
    write_checkpoint({"state_dict": {}, "random": capture_random_state(device)}, path)
    draw = lambda: (random.random(), np.random.rand(), float(torch.rand(())))  # noqa: E731
    first = draw()
    assert draw() != first
    restore_random_state(load_checkpoint(path, trusted=False)["random"], device)
    assert draw() == first
