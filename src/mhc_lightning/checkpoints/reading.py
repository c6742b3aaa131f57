"""Reading checkpoints: files and folders, lazily or whole."""

from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mhc_lightning.checkpoints.folder_index import RUN
from mhc_lightning.checkpoints.refusals import load_error, require_model
from mhc_lightning.checkpoints.saved_tensors import SavedTensors


def load_checkpoint(path: Path, *, trusted: bool) -> dict[str, Any]:
    """Read a checkpoint, its tensors only as they are used.

    Args:
        path: The file or folder.
        trusted: True to rebuild pickled Python objects in it, which can run code.

    Raises:
        UserError: `path` is not a checkpoint of this package, or it holds pickled objects and is
            not trusted.
    """
    return (load_folder if path.is_dir() else load_file)(path, trusted=trusted)


def load_file(file: Path | IO[bytes], *, trusted: bool) -> dict[str, Any]:
    """`load_checkpoint` of a file: into CPU memory, mapped where the file system can."""
    mmap = isinstance(file, Path)
    path = file if isinstance(file, Path) else Path(str(getattr(file, "name", "in memory")))
    try:
        checkpoint = torch.load(file, map_location="cpu", mmap=mmap, weights_only=not trusted)
    except Exception as error:
        raise load_error(path, error) from error
    require_model(path, checkpoint)
    return checkpoint


def load_folder(path: Path, *, trusted: bool) -> dict[str, Any]:
    """`load_checkpoint` of a folder.

    Returns:
        The content of a checkpoint file, with two differences: a tensor of `state_dict` is read
        when it is looked up, and `optimizer_states` hold only their `param_groups`, with the names
        of the parameters.
    """
    checkpoint = load_file(path / RUN, trusted=trusted)
    return {**checkpoint, "state_dict": SavedTensors(path, "state_dict.")}


def load_whole_folder(path: Path, *, trusted: bool) -> dict[str, Any]:
    """Read a checkpoint folder into CPU memory, as if one process had written one file.

    Raises:
        UserError: As for `load_checkpoint`.
    """
    from mhc_lightning.checkpoints.row_state import joined  # with the optimizers

    checkpoint = load_folder(path, trusted=trusted)
    checkpoint["state_dict"] = checkpoint["state_dict"].read()
    for number, state in enumerate(checkpoint["optimizer_states"]):
        tensors = joined(SavedTensors(path, f"optimizer_states.{number}.").read())
        state.update(numbered_state(tensors, state["param_groups"]))
    return checkpoint


def numbered_state(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's state as torch keeps it: by the numbers of parameters, not their names.

    Args:
        tensors: By `<entry>.<name of the parameter>`.
        groups: Parameter groups, whose `params` are names.

    Returns:
        `state` and `param_groups`, in which parameters are numbered in the groups' order.
    """
    numbers = {name: k for k, name in enumerate(n for g in groups for n in g["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        entry, name = key.split(".", 1)
        state.setdefault(numbers[name], {})[entry] = tensor
    numbered = [{**group, "params": [numbers[n] for n in group["params"]]} for group in groups]
    return {"state": dict(sorted(state.items())), "param_groups": numbered}
