"""A check that a run's parameters and optimizer state are finite, before they are saved."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from mhc_lightning.errors import NonFiniteLossError
from mhc_lightning.modules.memory.row_store import row_store_of
from mhc_lightning.optimizers.row_updates import RowState

_AT_ONCE = 2**26  # values
_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NonFinite(NamedTuple):
    """A tensor with non-finite values on this process.

    Attributes:
        name: `parameter <name>`, or `the optimizer's <entry> of <name>`.
        nan: The number of NaN values.
        infinite: The number of infinite values.
        values: The number of values on this process.
    """

    name: str
    nan: int
    infinite: int
    values: int

    def __str__(self) -> str:
        """For messages: `parameter layer.bias is NaN in 2 of 8 values`."""
        counts = (("NaN", self.nan), ("infinite", self.infinite))
        kinds = " and ".join(f"{kind} in {count}" for kind, count in counts if count)
        return f"{self.name} is {kinds} of {self.values} values"


def require_finite(trainer: pl.Trainer) -> None:
    """Stop all processes if a trained parameter or an optimizer's state is not finite.

    Every process must call this function, which waits for the device once. Frozen parameters and
    buffers may hold any value: a mask may hold infinities, say.

    Raises:
        NonFiniteLossError: A value is not finite. Every process raises it. The message names the
            first such tensor, and the ranks that hold it.
    """
    module, optimizers = trainer.lightning_module, trainer.strategy.optimizers
    if trainer.strategy.reduce_boolean_decision(_is_finite(module, optimizers)):
        return
    here = non_finite(module, optimizers)
    by_rank: list[list[NonFinite]] = [here]
    if trainer.world_size > 1:
        by_rank = [[] for _ in range(trainer.world_size)]
        dist.all_gather_object(by_rank, here)
    first = next(tensor for tensors in by_rank for tensor in tensors)
    ranks = [str(rank) for rank, tensors in enumerate(by_rank) if first in tensors]
    names = {tensor.name for tensors in by_rank for tensor in tensors}
    where = ""
    if trainer.world_size > 1:
        everywhere = len(ranks) == trainer.world_size
        where = " on every rank" if everywhere else f" on rank {', '.join(ranks)}"
    others = len(names) - 1
    words = "tensor is" if others == 1 else "tensors are"
    more = f", and {others} more {words} not finite," if others else ""
    raise NonFiniteLossError(
        f"a checkpoint was refused because {first}{where}{more}",
        trainer.global_step,
        last_gains(trainer),
    )


def non_finite(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[NonFinite]:
    """The tensors with non-finite values on this process, parameters first."""
    tensors = []
    for name, values in _state(module, optimizers):
        nan = sum(int(part.isnan().sum()) for part in _parts(values))
        infinite = sum(int(part.isinf().sum()) for part in _parts(values))
        if nan or infinite:
            tensors.append(NonFinite(name, nan, infinite, values.numel()))
    return tensors


def last_gains(trainer: pl.Trainer) -> dict[str, float]:
    """The composite gains of the last measurement, by tag."""
    return {
        tag: float(gain)
        for tag, gain in trainer.callback_metrics.items()
        if tag.startswith("amax_gain/composite/") and "layer_" not in tag
    }


def _is_finite(module: nn.Module, optimizers: Iterable[Optimizer]) -> bool:
    """True if all values on this process are finite; waits for each device once."""
    flags: dict[torch.device, list[Tensor]] = {}
    for _, values in _state(module, optimizers):
        alike = flags.setdefault(values.device, [])
        alike += [part.isfinite().all() for part in _parts(values)]
    return all(bool(torch.stack(alike).all()) for alike in flags.values())


def _parts(values: Tensor) -> Sequence[Tensor]:
    """Views of a tensor that a check can take in turn: it makes temporary copies."""
    if values.dim() == 0 or values.numel() <= _AT_ONCE:
        return (values,)
    return values.split(max(1, _AT_ONCE * len(values) // values.numel()))


def _state(module: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """The tensors to check, by name; of sharded tensors, this process's part."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    for store in filter(None, map(row_store_of, names)):
        store.settle()
    named: list[tuple[str, Any]] = [
        (f"parameter {name}", parameter)
        for parameter, name in names.items()
        if parameter.requires_grad and not is_lazy(parameter)
    ]
    for optimizer in optimizers:
        for parameter, entries in optimizer.state.items():
            name = names.get(parameter, "a parameter of none of its modules")
            if isinstance(entries, Mapping | RowState):
                named += [(f"the optimizer's {key} of {name}", v) for key, v in entries.items()]
    for name, value in named:
        if isinstance(value, Tensor) and value.dtype in _CHECKED and not value.is_meta:
            values = value.detach()
            yield name, values.to_local() if isinstance(values, DTensor) else values
