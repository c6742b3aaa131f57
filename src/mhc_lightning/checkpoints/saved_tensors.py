"""Tensors by name, in memory or in a checkpoint folder: their shapes, and loading them."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mhc_lightning.checkpoints.folder_index import read_index
from mhc_lightning.checkpoints.refusals import load_error
from mhc_lightning.errors import UserError
from mhc_lightning.modules.initialisation import held_rows


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder, each read from the disk when it is looked up.

    `describe` gives shapes without reading, and `load_weights` reads into a module in place.

    Args:
        folder: The checkpoint.
        prefix: Take only tensors whose names begin with this prefix, which is left out.

    Attributes:
        on_meta: Shapes and dtypes by name, in tensors on `meta`.

    Raises:
        UserError: The index is missing or damaged.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        try:
            self._index = read_index(folder)
        except (OSError, ValueError) as error:
            raise load_error(folder, error) from error
        self.folder = folder
        self.prefix = prefix
        self.on_meta = {
            name.removeprefix(prefix): torch.empty(
                entry.size, dtype=entry.properties.dtype, device="meta"
            )
            for name, entry in self._index.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def load_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors by name; of a DTensor, the part that this process holds.

        Raises:
            UserError: A target has no saved tensor of its name and shape, or it cannot be read.
        """
        import torch.distributed.checkpoint as dcp  # half a second

        from mhc_lightning.checkpoints.folder_reader import FolderReader

        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(
                {f"{self.prefix}{name}": tensor for name, tensor in targets.items()},
                storage_reader=FolderReader(self.folder, self._index),
                no_dist=True,  # each process reads what it needs, and need not wait for others
            )
        except dcp.CheckpointException as error:
            cause = next(cause for cause, _ in error.failures.values())
            raise UserError(f"checkpoint {self.folder} cannot be loaded: {cause}") from cause

    def read(self) -> dict[str, Tensor]:
        """All tensors, in CPU memory."""
        tensors = {n: torch.empty_like(t, device="cpu") for n, t in self.on_meta.items()}
        self.load_into(tensors)
        return tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty_like(self.on_meta[name], device="cpu")
        self.load_into({name: tensor})
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.on_meta)

    def __len__(self) -> int:
        return len(self.on_meta)


def describe(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the same names, shapes and dtypes, for which nothing is read from the disk."""
    on_meta: Mapping[str, Tensor] = getattr(tensors, "on_meta", tensors)
    return on_meta


def below(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """The tensors whose names begin with a prefix, which is left out; nothing is read."""
    if isinstance(tensors, SavedTensors):
        return SavedTensors(tensors.folder, tensors.prefix + prefix)
    return {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}


@torch.no_grad()
def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    stays: Callable[[str], bool] = lambda name: False,
) -> None:
    """Copy whole tensors into a module, sharded or not; each process reads the rows it holds.

    Args:
        module: The module.
        weights: A whole state dict of it, in memory, mapped from a file, or in a folder.
        stays: True for a tensor, by its name, that keeps its present value.
    """
    targets = {name: t for name, t in module.state_dict().items() if not stays(name)}
    if isinstance(weights, SavedTensors):
        weights.load_into(targets)
        return
    for name, tensor in targets.items():
        rows, first = held_rows(tensor)
        whole = weights[name]
        rows.copy_(whole if rows is tensor else whole[first : first + len(rows)])
