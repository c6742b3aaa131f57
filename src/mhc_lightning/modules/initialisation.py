"""Initial values that do not depend on how a network is materialised and sharded.

Every module fills its own parameters in `reset_parameters()`, sharded or not. That is torch's
convention: the code that materialises a network from `meta` calls it on the modules.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mhc_lightning.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_GROUP = 2**16  # values that one generator draws, unless a single row has more


class NormalMatrices:
    """The `reset_parameters` of a module whose matrices are drawn from a normal distribution.

    Rows (along the first dimension) are drawn in groups, each from its own generator, on the CPU
    and in float32. So a device that holds some rows of a matrix draws those rows only, and they
    equal the rows of the whole matrix. A bias and an embedding's padding row become zero.

    Args:
        module: The module.
        names: The names of its matrices.
        seed: At least 0; group k of the module is drawn with seed + k.
        std: The standard deviation.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...], seed: int, std: float) -> None:
        self._module, self._names, self._seed, self._std = module, names, seed, std

    @property
    def next_seed(self) -> int:
        """The first seed that the module does not use."""
        shapes = [getattr(self._module, name).shape for name in self._names]
        return self._seed + sum(_groups(shape)[1] for shape in shapes)

    @torch.no_grad()
    def fill_rows(self, part: Tensor, first_row: int) -> None:
        """Fill a copy of some rows of the module's only matrix, from `first_row` on."""
        (name,) = self._names
        shape = getattr(self._module, name).shape
        fill_normal(part, first_row, shape, self._std, self._seed)

    @torch.no_grad()
    def __call__(self) -> None:
        """Fill the rows that this process holds; none on `meta`.

        Raises:
            UserError: The module's weights are parametrized or quantised.
        """
        module, seed = self._module, self._seed
        for name in self._names:
            parameter = getattr(module, name)
            if is_parametrized(module) or not parameter.is_floating_point():
                raise UserError(
                    f"the weights of {type(module).__name__} are parametrized or quantised, and"
                    " cannot be drawn; reset the network before that"
                )
            part, first_row = held_rows(parameter)
            fill_normal(part, first_row, parameter.shape, self._std, seed)
            seed += _groups(parameter.shape)[1]
            padding = getattr(module, "padding_idx", None)
            if padding is not None and first_row <= padding < first_row + len(part):
                part[padding - first_row].zero_()
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()  # type: ignore[operator]


def plan_normal(
    network: nn.Module, seed: int, std: float, last: Iterable[nn.Module] = ()
) -> list[NormalMatrices]:
    """Make the draws of all linear maps, embeddings and experts of a network.

    Each module's `reset_parameters` becomes its draw. Each draw has its own seeds, assigned in the
    order of `network.modules()`, so modules can be drawn in any order. Experts and tables are
    modules with `matrices`. A module's `init_std` takes the place of `std`.

    Args:
        network: The network.
        seed: Seed of the first draw.
        std: The standard deviation.
        last: Submodules that get the last seeds: the others draw what they draw without them.
    """
    planned = []
    behind = {module: None for part in last for module in part.modules()}
    before = [module for module in network.modules() if module not in behind]
    for module in (*before, *behind):
        linear = isinstance(module, nn.Linear | nn.Embedding)
        names = ("weight",) if linear else getattr(module, "matrices", ())
        if names:
            own_std: Any = getattr(module, "init_std", std)
            draw = NormalMatrices(module, names, seed, own_std)
            # On the instance: the module keeps its class, which other code tests for.
            module.reset_parameters = draw  # type: ignore[assignment]
            seed = draw.next_seed
            planned.append(draw)
    return planned


def reset_modules(network: nn.Module) -> None:
    """Reset the parameters and buffers of every module below `network`.

    Raises:
        UserError: A module owns parameters or buffers, and has no `reset_parameters()`.
    """
    for name, module in network.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if tensors and module is not network:
            reset_module(module, name)


def reset_module(module: nn.Module, name: str) -> None:
    """Call `module.reset_parameters()`, with whole parameters if it cannot fill sharded ones.

    Raises:
        UserError: The module has no such method.
    """
    reset = getattr(module, "reset_parameters", None)
    if not callable(reset):
        raise UserError(
            f"{name} ({type(module).__name__}) has parameters or buffers of its own, and no"
            " reset_parameters() that gives them initial values"
        )
    if isinstance(reset, NormalMatrices):
        reset()
    else:
        with whole_parameters(module):
            reset()


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Within, a module's own sharded parameters are whole, ordinary, and on the CPU.

    The whole parameters are uninitialised, for the caller to fill. At the exit their values go to
    the shards.
    """
    parameters = module._parameters
    sharded: dict[str, Any] = {name: p for name, p in parameters.items() if _is_sharded(p)}
    for name, parameter in sharded.items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        parameters[name] = nn.Parameter(whole, parameter.requires_grad)
    try:
        yield
        with torch.no_grad():
            for name, parameter in sharded.items():
                part, first = held_rows(parameter)
                part.copy_(parameters[name][first : first + len(part)])  # type: ignore[index]
    finally:
        parameters.update(sharded)


def held_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that this process holds, in place, and the first row's number.

    Raises:
        UserError: The tensor is not sharded by rows.
    """
    if not _is_sharded(tensor):
        return tensor, 0
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.to_local(), held_range(tensor, row_cuts(tensor))[0]


def row_cuts(tensor: "DTensor") -> list[int]:
    """The dimensions of the mesh over which a tensor is sharded by rows, first cut first.

    Raises:
        UserError: The tensor is not sharded by rows.
    """
    from torch.distributed.tensor import Shard

    split = [(k, place) for k, place in enumerate(tensor.placements) if not place.is_replicate()]
    # FSDP2 cuts parts of a tensor that was sharded before, as experts are: it notes into how many.
    parts: Any = {k: getattr(place, "split_factor", 1) for k, place in split}
    plain = [k for k, place in split if type(place) is Shard]
    later = [k for k in parts if parts[k] > 1]
    known = len(plain) + len(later) == len(split) and all(
        getattr(place, "dim", None) == 0 for _, place in split
    )
    before = math.prod(tensor.device_mesh.size(k) for k in plain)
    if not known or len(later) > 1 or any(parts[k] != before for k in later):
        raise UserError(
            f"a tensor is sharded as {tensor.placements}, which does not give every process some of"
            " its rows; shard dimension 0 over one dimension of the mesh"
        )
    return plain + later


def held_range(tensor: "DTensor", cuts: Iterable[int]) -> tuple[int, int]:
    """The number of the first row that this process has after some cuts, and of how many."""
    first, count = 0, tensor.shape[0]
    for dimension in cuts:
        # As torch.chunk: every process but the last ones has equally many rows.
        each = -(-count // tensor.device_mesh.size(dimension))
        start = min(each * tensor.device_mesh.get_local_rank(dimension), count)
        first, count = first + start, min(each, count - start)
    return first, count


def _is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor; a process without any does not wait for their import."""
    if tensor is None or type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _groups(shape: torch.Size) -> tuple[int, int]:
    """The number of rows in a group, and of groups."""
    per_group = max(1, _GROUP // max(1, math.prod(shape[1:])))
    return per_group, math.ceil(shape[0] / per_group)


def fill_normal(part: Tensor, first_row: int, shape: torch.Size, std: float, seed: int) -> None:
    """Fill `part`, the rows of a matrix from `first_row` on.

    Args:
        part: [rows, ...]; unchanged on `meta`.
        first_row: The number of its first row.
        shape: The shape of the whole matrix.
        std: The standard deviation.
        seed: The seed of the matrix's first group.
    """
    if part.is_meta or part.numel() == 0:
        return
    per_group, _ = _groups(shape)
    end_row = first_row + len(part)
    for group in range(first_row // per_group, math.ceil(end_row / per_group)):
        start = group * per_group
        end = min(start + per_group, shape[0])
        # torch's generator reads 32 bits of a seed.
        generator = torch.Generator("cpu").manual_seed((seed + group) % 2**32)
        values = torch.empty(end - start, *shape[1:], dtype=torch.float32, device="cpu")
        values.normal_(std=std, generator=generator)
        low, high = max(start, first_row), min(end, end_row)
        part[low - first_row : high - first_row].copy_(values[low - start : high - start])
