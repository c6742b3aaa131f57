"""Checkpoints that are folders, whose shards each process writes and reads by itself.

The tensors are in the format of ``torch.distributed.checkpoint``: ``__<process>_0.distcp`` files
and their index, ``.metadata``, in which the model's are named ``state_dict.<name>`` and an
optimizer's ``optimizer_states.<number>.<entry>.<name of the parameter>``. All else is in
``run.ckpt``, which the first process writes.
"""

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.serialization import _get_layout

from mhc_lightning.checkpoints.whole_file import fault_in_file, load_file
from mhc_lightning.errors import UserError

INDEX = ".metadata"
RUN = "run.ckpt"


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder, each read from the disk when it is asked for.

    Args:
        folder: The checkpoint.
        prefix: What the names of those that are meant begin with; it is left out here.

    Raises:
        UserError: The index is missing or damaged.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        try:
            self._index = _read_index(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint {folder} cannot be loaded: {error}") from error
        self.folder = folder
        self._prefix = prefix
        self._on_meta = {
            name.removeprefix(prefix): torch.empty(
                entry.size, dtype=entry.properties.dtype, device="meta"
            )
            for name, entry in self._index.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def below(self, prefix: str) -> "SavedTensors":
        """Those whose names go on with `prefix`."""
        return SavedTensors(self.folder, self._prefix + prefix)

    def on_meta(self) -> dict[str, Tensor]:
        """Their shapes and dtypes, in tensors on ``meta``."""
        return dict(self._on_meta)

    def load_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors by name; of a DTensor, the part that this process holds.

        Raises:
            UserError: There is none of a name or shape, or it cannot be read.
        """
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(
                {f"{self._prefix}{name}": tensor for name, tensor in targets.items()},
                storage_reader=_Reader(self.folder, self._index),
                no_dist=True,  # each process reads what it needs, and need not wait for others
            )
        except dcp.CheckpointException as error:
            cause = next(cause for cause, _ in error.failures.values())
            raise UserError(f"checkpoint {self.folder} cannot be loaded: {cause}") from cause

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty_like(self._on_meta[name], device="cpu")
        self.load_into({name: tensor})
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._on_meta)

    def __len__(self) -> int:
        return len(self._on_meta)


def is_checkpoint_folder(path: Path) -> bool:
    """Whether `path` is a checkpoint of this form, complete or not."""
    return any((path / name).is_file() for name in (INDEX, RUN)) or any(path.glob("*.distcp"))


def load_folder(path: Path, *, trusted: bool) -> dict[str, Any]:
    """Read a checkpoint folder but for its tensors.

    Args:
        path: The folder.
        trusted: Whether pickled Python objects in it may be rebuilt, which can run code.

    Returns:
        What a checkpoint file holds, but ``state_dict`` is read when it is looked at, and the
        ``optimizer_states`` are their ``param_groups`` alone, with the names of the parameters.

    Raises:
        UserError: As `load_file`.
    """
    checkpoint = load_file(path / RUN, trusted=trusted)
    return {**checkpoint, "state_dict": SavedTensors(path, "state_dict.")}


def load_whole_folder(path: Path, *, trusted: bool) -> dict[str, Any]:
    """Read a checkpoint folder into CPU memory, as if one process had written one file.

    Raises:
        UserError: As `load_file`.
    """
    checkpoint = load_folder(path, trusted=trusted)
    saved = checkpoint["state_dict"]
    checkpoint["state_dict"] = _read_all(saved)
    for number, state in enumerate(checkpoint["optimizer_states"]):
        groups = state["param_groups"]
        numbers = {name: k for k, name in enumerate(n for g in groups for n in g["params"])}
        state["param_groups"] = [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in groups
        ]
        entries: dict[int, dict[str, Tensor]] = {}
        tensors = _read_all(SavedTensors(path, f"optimizer_states.{number}."))
        for key, tensor in tensors.items():
            entry, name = key.split(".", 1)
            entries.setdefault(numbers[name], {})[entry] = tensor
        state["state"] = dict(sorted(entries.items()))
    return checkpoint


def fault_in_folder(path: Path) -> str | None:
    """Why the checkpoint folder at `path` cannot be trusted, or None if it is complete.

    Reads all of it: each tensor's checksum is compared.
    """
    for name in (INDEX, RUN):
        if not (path / name).is_file():
            return f"not a complete checkpoint ({name} is missing)"
    fault = fault_in_file(path / RUN)
    if fault:
        return f"damaged: {RUN} is {fault}"
    try:
        index = _read_index(path)
        return shortfall(path, index) or _false_checksum(path, index)
    except ValueError as error:
        return f"damaged: {error}"
    except OSError as error:
        return f"unreadable ({error.strerror or error})"


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _IndexUnpickler(pickle.Unpickler):
    """Rebuilds an index and nothing else, whoever wrote it."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch") and "." not in name:
            found = super().find_class(module, name)
            described = isinstance(found, type) and found.__module__ == Metadata.__module__
            known = found in (_StorageInfo, torch.Size, _get_layout)
            if described or known or isinstance(found, torch.dtype):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")


def _read_index(folder: Path) -> Metadata:
    """The index of a folder's tensors.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not one of this package; says why.
    """
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


def shortfall(folder: Path, index: Metadata) -> str | None:
    """What a folder lacks of what its index names."""
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


def _false_checksum(folder: Path, index: Metadata) -> str | None:
    parts = sorted((p.relative_path, p.offset, p.length) for p in index.storage_data.values())
    for name, offset, length in parts:
        with open(folder / name, "rb") as file:
            file.seek(offset)
            content = io.BytesIO(file.read(length))  # torch.save has written each tensor
        try:
            with zipfile.ZipFile(content) as archive:
                damaged = archive.testzip()
        except zipfile.BadZipFile:
            damaged = "a tensor"
        if damaged is not None:
            return f"damaged: {damaged} in {name} does not match its checksum"
    return None


def _read_all(saved: SavedTensors) -> dict[str, Tensor]:
    tensors = {name: torch.empty_like(t, device="cpu") for name, t in saved.on_meta().items()}
    saved.load_into(tensors)
    return tensors
