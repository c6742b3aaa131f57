"""The index of a checkpoint folder: its tensors, and the files that their bytes lie in.

A folder has the format of `torch.distributed.checkpoint`: each process's tensors are in a file
`__<process>_0.distcp`, and the index is in `.metadata`. All other content is in `run.ckpt`, a file
of `torch.save`.

The classes of an index are imported where one is read: `torch.distributed.checkpoint` takes half a
second, and a checkpoint in one file needs none of it.
"""

import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.serialization import _get_layout

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

INDEX = ".metadata"
RUN = "run.ckpt"


def is_checkpoint_folder(path: Path) -> bool:
    """True if `path` is a checkpoint folder, complete or not."""
    return any((path / name).is_file() for name in (INDEX, RUN)) or any(path.glob("*.distcp"))


def read_index(folder: Path) -> "Metadata":
    """The index of a folder's tensors.

    Raises:
        OSError: The index cannot be read.
        ValueError: The file is no index of this package; the message says why.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    content = (folder / INDEX).read_bytes()
    try:
        index = _IndexUnpickler(io.BytesIO(content)).load()
        entries = index.state_dict_metadata.values()
        names = {part.relative_path for part in index.storage_data.values()}
    except Exception as error:
        raise ValueError(f"{INDEX} cannot be read ({error})") from error
    # Anything else than tensors would be unpickled without asking.
    if not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
        raise ValueError(f"{INDEX} names values that are no tensors")
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{INDEX} names files outside of the folder")
    return index


def missing_bytes(folder: Path, index: "Metadata") -> str | None:
    """The first file of an index that its folder lacks, or has cut short; None if all are there."""
    ends: dict[str, int] = {}
    for part in index.storage_data.values():
        name = part.relative_path
        ends[name] = max(ends.get(name, 0), part.offset + part.length)
    for name, end in sorted(ends.items()):
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"not a complete checkpoint ({name} is missing)"
        if size < end:
            return f"not a complete checkpoint ({name} is cut short: {size} of {end} bytes)"
    return None


class _IndexUnpickler(pickle.Unpickler):
    """Rebuilds an index and nothing else, whoever wrote it."""

    def find_class(self, module: str, name: str) -> Any:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import Metadata

        if module.startswith("torch") and "." not in name:
            kind = super().find_class(module, name)
            described = isinstance(kind, type) and kind.__module__ == Metadata.__module__
            known = kind in (_StorageInfo, torch.Size, _get_layout)
            if described or known or isinstance(kind, torch.dtype):
                return kind
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")
