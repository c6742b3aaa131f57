"""Tensors in safetensors files: one file, or several with an index when it would be too large.

File names and the index follow the convention of the Hugging Face libraries, which can read them:
`model.safetensors`, or `model-00001-of-00003.safetensors` … and
`model.safetensors.index.json`.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mhc_lightning.checkpoints.saved_tensors import describe
from mhc_lightning.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "BF16", "F16")  # of weights, as the format names them
_METADATA = {"format": "pt"}  # readers of the Hugging Face libraries ask for it


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write tensors to `folder`, in their order, as they are (dtype and bits).

    Args:
        tensors: By name; of those that share memory, as tied weights do, each is written.
        folder: Where the files go.
        shard_bytes: How many bytes of tensors one file holds at most; a larger tensor gets a file
            of its own.

    Raises:
        UserError: `shard_bytes` is below 1.
        OSError: A file could not be written.
    """
    if shard_bytes < 1:
        raise UserError(f"export.shard_bytes must be at least 1, not {shard_bytes}")
    described = describe(tensors)
    sizes = {name: tensor.nbytes for name, tensor in described.items()}
    shards = _shards(sizes, shard_bytes)
    if len(shards) == 1:
        _save(tensors, shards[0], folder / SINGLE_FILE)
        return
    files = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(tensors, names, folder / file)
        files.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(sizes.values())}}
    text = json.dumps({**index, "weight_map": files}, indent=2)
    (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in `folder`, without reading the tensors.

    Raises:
        UserError: A file is missing or damaged, a tensor is in two, or one holds no numbers of at
            least 16 bits with a fraction, as quantised weights do.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _files(folder):
        with _opened(file) as content:
            for name in content.keys():  # noqa: SIM118  (it is no mapping)
                if name in shapes:
                    raise UserError(f"{folder} holds {name} twice, in {file.name} too")
                part = content.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise UserError(
                        f"{name} in {file} is {part.get_dtype()}, not one of {', '.join(_DTYPES)}:"
                        " quantised weights are not read"
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


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _save(tensors: Mapping[str, Tensor], names: list[str], file: Path) -> None:
    chosen: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name in names:
        tensor = tensors[name].detach().cpu().contiguous()
        own = tensor.untyped_storage().data_ptr()
        chosen[name] = tensor.clone() if own in memory else tensor  # the format shares nothing
        memory.add(own)
    try:
        save_file(chosen, file, metadata=_METADATA)
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(str(error)) from error


def _files(folder: Path) -> list[Path]:
    """The files that hold the tensors.

    Raises:
        UserError: There are none, or one that the index names is missing.
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
    """The tensors of a file or folder by name, each read when it is asked for (memory-mapped).

    Args:
        path: One `.safetensors` file, or a folder as `write_tensors` and the Hugging Face
            libraries write them.

    Raises:
        UserError: A file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._places: dict[str, Path] = {}
        for file in _files(path) if path.is_dir() else [path]:
            with _opened(file) as content:
                self._places.update(dict.fromkeys(content.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._places[name]) as content:
            tensor: Tensor = content.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
