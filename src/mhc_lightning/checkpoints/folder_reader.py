"""Reads the tensors of a checkpoint folder by an index that was checked."""

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata


class FolderReader(dcp.FileSystemReader):
    """Torch's reader, with the index given to it in place of unpickling it again.

    Args:
        folder: The checkpoint.
        index: Its index (`read_index`).
    """

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, as it was given."""
        return self._index
