"""A checkpoint folder that no run had to write."""

import pytest
import torch

from mhc_lightning.checkpoints.folder_writing import save_folder


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "step_00000001"
    tensors = {"state_dict": {"a": torch.randn(50, 20), "b": torch.randn(3)}}
    save_folder(tensors, {"state_dict": {}}, path, lambda: None, group=None,
                asynchronous=False).result()  # fmt: skip
    return path
