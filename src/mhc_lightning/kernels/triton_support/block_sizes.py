"""Block sizes of the Triton kernels: measured ones where there are any, else the kernel's own.

A kernel looks its block sizes up by device, kernel, streams, width and dtype. The user's own table,
which `python -m mhc_lightning tune` writes, comes before the table shipped for the device
(`tuned/<device>.json`). Without a GPU, under Triton's interpreter as well, every kernel runs with
its default.
"""

import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

SHIPPED_TABLES = Path(__file__).parent / "tuned"


class Config(NamedTuple):
    """Block sizes: the way a kernel is cut into programs.

    Attributes:
        block_tokens: Tokens per program (or per step of a program that loops over them).
        block_width: Elements of the width C that are in flight at a time.
        num_warps: Warps per program.
        num_stages: Depth of software pipelining.
    """

    block_tokens: int
    block_width: int
    num_warps: int
    num_stages: int


# A table: kernel -> shape_key -> Config. Its file also names the device and versions measured.
Table = dict[str, dict[str, Config]]


class Lookup(NamedTuple):
    """A kernel that looked up its block sizes, the shape, and the block sizes that it got."""

    kernel: str
    key: str
    config: Config


_overrides: dict[str, Config] = {}
_lookups: list[Lookup] | None = None


def configured(kernel: str, n: int, width: int, dtype: torch.dtype, default: Config) -> Config:
    """The block sizes to run a kernel with.

    Args:
        kernel: The kernel's name in the tables, such as `"merge_forward"`.
        n: Number of streams.
        width: C, elements per stream.
        dtype: Dtype of the streams.
        default: The block sizes where nothing was measured.

    Returns:
        The block sizes of a surrounding `choose`, else of the device's tables, else `default`.
    """
    device, key = _current_device(), shape_key(n, width, dtype)
    config = default
    if kernel in _overrides:
        config = _overrides[kernel]
    elif device is not None:
        config = _tuned(device).get(kernel, {}).get(key, default)
    if _lookups is not None:
        _lookups.append(Lookup(kernel, key, config))
    return config


@contextmanager
def choose(kernel: str, config: Config) -> Iterator[None]:
    """Within, this process runs a kernel with `config`, whatever the tables say."""
    before = dict(_overrides)
    _overrides[kernel] = config
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


@contextmanager
def noted_lookups() -> Iterator[list[Lookup]]:
    """Within, a list of every lookup of this process."""
    global _lookups
    before, _lookups = _lookups, []
    try:
        yield _lookups
    finally:
        _lookups = before


def shape_key(n: int, width: int, dtype: torch.dtype) -> str:
    """A table's name for a shape: `"n4-c2560-bfloat16"`."""
    return f"n{n}-c{width}-{str(dtype).removeprefix('torch.')}"


def user_table(device: str) -> Path:
    """The path of the user's own table for a device; it may not exist.

    Args:
        device: The device's name, as `torch.cuda.get_device_name` gives it.
    """
    root = os.environ.get("MHC_LIGHTNING_CACHE") or Path.home() / ".cache" / "mhc_lightning"
    return Path(root) / "tuned" / _file_name(device)


def read_table(path: Path) -> Table:
    """Read a table. A missing table is empty; a damaged one is empty too, with a warning."""
    try:
        choices = json.loads(path.read_text(encoding="utf-8"))["choices"]
        return {
            kernel: {key: _config(values) for key, values in shapes.items()}
            for kernel, shapes in choices.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"left out {path}, which is no table of block sizes: {error}", stacklevel=2)
        return {}


def _config(values: Sequence[int]) -> Config:
    """The block sizes of a table's entry.

    Raises:
        ValueError, TypeError: No kernel can have these block sizes.
    """
    config = Config(*map(int, values))
    tokens, width, warps, stages = config
    powers = all(value > 0 and value & (value - 1) == 0 for value in (tokens, width, warps))
    if not powers or warps > 32 or stages < 1:
        raise ValueError(f"{list(values)} are no block sizes")
    return config


def add_to_table(path: Path, kernel: str, key: str, config: Config, measured_on: dict) -> None:
    """Enter block sizes in a table's file, made if need be; the file is never half written.

    Args:
        path: The file.
        kernel: The kernel's name.
        key: The shape's `shape_key`.
        config: The block sizes.
        measured_on: Device and versions, for the file.
    """
    table = read_table(path)
    table.setdefault(kernel, {})[key] = config
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps({**measured_on, "choices": table}, indent=1), encoding="utf-8")
    beside.replace(path)


def forget_tables() -> None:
    """Read the tables again when they are next needed."""
    _tuned.cache_clear()


def _current_device() -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        return None
    return _device_name(torch.cuda.current_device())


_device_name = functools.cache(torch.cuda.get_device_name)


@functools.cache
def _tuned(device: str) -> Table:
    table = read_table(SHIPPED_TABLES / _file_name(device))
    for kernel, shapes in read_table(user_table(device)).items():
        table[kernel] = table.get(kernel, {}) | shapes
    return table


def _file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"
