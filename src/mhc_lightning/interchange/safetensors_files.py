"""Tensors in safetensors files: one file, or several shards with an index.

File names and the index follow the convention of the Hugging Face libraries, which can read them:
`model.safetensors`, or `model-00001-of-00003.safetensors` … and
`model.safetensors.index.json`.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mhc_lightning.checkpoints.saved_tensors import describe
from mhc_lightning.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "BF16", "F16")  # of weights, as the format names them
_INTEGERS = ("I64",)
_METADATA = {"format": "pt"}  # readers of the Hugging Face libraries ask for it


def write_tensors(
    tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int, prefix: str = ""
) -> None:
    """Write tensors to `folder`, in their order, as they are (dtype and bits).

    Args:
        tensors: Tensors by name. Each of several tensors that share memory (tied weights) is
            written: `huggingface_hub.save_torch_state_dict` would drop all but one.
        folder: Folder for the files.
        shard_bytes: Largest number of bytes of tensors in one file; a larger tensor gets a file of
            its own.
        prefix: What the names in the files begin with.

    Raises:
        UserError: `shard_bytes` is below 1.
        OSError: A file could not be written.
    """
    if shard_bytes < 1:
        raise UserError(f"export.shard_bytes must be at least 1, not {shard_bytes}")
    described = describe(tensors)
    sizes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in described.items()
    }
    shards = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_bytes)
    for file, names in shards.filename_to_tensors.items():
        _save(tensors, names, folder / file, prefix)
    if shards.is_sharded:
        files = {f"{prefix}{name}": file for name, file in shards.tensor_to_filename.items()}
        index = {"metadata": shards.metadata, "weight_map": files}
        text = json.dumps(index, indent=2)
        (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def read_shapes(folder: Path, integers: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in `folder`, without reading the tensors.

    Args:
        folder: The folder.
        integers: Names of tensors that are int64; the others are weights.

    Raises:
        UserError: A file is missing or damaged, a tensor is in two files, or a tensor is quantised
            (not of a floating-point type of at least 16 bits).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _files(folder):
        with _opened(file) as content:
            for name in content.keys():  # noqa: SIM118  (not a mapping)
                if name in shapes:
                    raise UserError(f"{folder} holds {name} twice, in {file.name} too")
                part = content.get_slice(name)
                if part.get_dtype() not in (_INTEGERS if name in integers else _DTYPES):
                    raise UserError(
                        f"{name} in {file} is {part.get_dtype()}, not one of "
                        f" {', '.join(_INTEGERS if name in integers else _DTYPES)}: quantised"
                        " weights are not read"
                    )
                shapes[name] = tuple(part.get_shape())
    return shapes


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in `folder` by name, in CPU memory, as they were written.

    Raises:
        UserError: A file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        with _opened(file) as content:
            for name in content.keys():  # noqa: SIM118
                tensors[name] = content.get_tensor(name)
    return tensors


def _save(tensors: Mapping[str, Tensor], names: list[str], file: Path, prefix: str) -> None:
    chosen: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in names:
        tensor = tensors[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory.
        chosen[f"{prefix}{name}"] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    try:
        save_file(chosen, file, metadata=_METADATA)
    except SafetensorError as error:  # raised when the disk is full
        raise OSError(str(error)) from error


def _files(folder: Path) -> list[Path]:
    """The files that hold the tensors.

    Raises:
        UserError: There are no files, or a file of the index is missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise UserError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of safetensors files") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder} is incomplete: {INDEX_FILE} names {name}, which is missing")
    return [folder / name for name in names]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a complete safetensors file: {error}") from error


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file or folder by name, each read when it is looked up (memory-mapped).

    Args:
        path: One `.safetensors` file, or a folder as `write_tensors` and the Hugging Face
            libraries write them.
        prefix: Left out of names that begin with it.

    Attributes:
        on_meta: Shapes and dtypes by name, in tensors on `meta`.

    Raises:
        UserError: A file is missing or damaged.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        self._files: dict[str, tuple[Path, str]] = {}  # the file, and the name in it
        for file in _files(path) if path.is_dir() else [path]:
            with _opened(file) as content:
                for name in content.keys():  # noqa: SIM118
                    self._files[name.removeprefix(prefix)] = file, name

    @cached_property
    def on_meta(self) -> dict[str, Tensor]:
        """See the class."""
        found = {}
        for name, (file, stored) in self._files.items():
            with _opened(file) as content:
                part = content.get_slice(stored)
                shape = part.get_shape()
                nothing = part[:0] if shape else content.get_tensor(stored)
                found[name] = torch.empty(shape, dtype=nothing.dtype, device="meta")
        return found

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._files[name]
        with _opened(file) as content:
            tensor: Tensor = content.get_tensor(stored)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
