"""Updates of the rows of a table that have had a gradient, and of no others.

An optimizer that takes tables has parameter groups with `rows`: the name of an update. A row is
*touched* in a step if its gradient is not zero. Rows that are not touched do not move, and their
state does not decay. This is *lazy*: in steps in which a row has no gradient, ordinary Adam would
go on moving it by its momentum, and let both moments fade. A rare row therefore meets its next
gradient with the moments of the last time it was seen. Each row counts its own updates, so that the
bias correction of its moments is that of what it has seen. Where every row is touched in every
step, the update is that of Adam.

State grows with the rows that have ever been touched, work with those of the step. One int32 for
every row of the table says where the row's state is; it is not saved.

Shapes: R rows of the table, D their width, U touched rows, T rows ever touched.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mhc_lightning.errors import UserError
from mhc_lightning.modules.memory.row_store import nonzero_rows, row_store_of, updated_rows

RowUpdate = Literal["adam", "rowwise"]

ROWS = "rows"  # key of a group: its update; and entry of the state: the numbers of the rows
_ENTRIES = {"adam": ("exp_avg", "exp_avg_sq"), "rowwise": ("row_exp_avg_sq",)}
_GROWTH = 1.25


class RowState:
    """What an optimizer keeps of the rows of a table that it has updated.

    Rows are in the order in which they were first touched, and ascending after `settle`. `items()`
    are the tensors to save: `rows`, int64 [T], their numbers in the table; `step`, int32 [T], the
    updates of each; and the update's moments: `exp_avg` and `exp_avg_sq` [T, D] of `adam`,
    `row_exp_avg_sq` [T] of `rowwise`.

    Args:
        weight: The table [R, D]; the state is that of the rows that this process updates.
        update: The update.

    Attributes:
        is_whole: Whether these are all rows of the table.
    """

    def __init__(self, weight: Tensor, update: RowUpdate) -> None:
        part, self._first = updated_rows(weight)
        self._places: Tensor | None = None  # [rows held], made when it is needed
        self._held, self._count = len(part), 0
        self.is_whole = len(part) == len(weight)
        wide = {"device": part.device, "dtype": part.dtype}
        self._tensors = {
            ROWS: torch.empty(0, dtype=torch.int64, device=part.device),
            "step": torch.empty(0, dtype=torch.int32, device=part.device),
        }
        for entry in _ENTRIES[update]:
            shape = (0,) if entry.startswith("row_") else (0, *part.shape[1:])
            self._tensors[entry] = torch.empty(shape, **wide)  # type: ignore[call-overload]

    def __getitem__(self, entry: str) -> Tensor:
        return self._tensors[entry][: self._count]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def items(self) -> list[tuple[str, Tensor]]:
        """The entries by name."""
        return [(entry, self[entry]) for entry in self]

    def places(self, rows: Tensor) -> Tensor:
        """The places int64 [U] of rows, int64 [U], each once; new rows get one, filled with zero.

        The rows are numbered in the whole table, and this process holds them.
        """
        local = rows - self._first
        if self._places is None:
            self._places = torch.full((self._held,), -1, dtype=torch.int32, device=rows.device)
            self._places[self[ROWS] - self._first] = self._numbers(0, self._count)
        found = self._places.index_select(0, local)
        new = (found < 0).nonzero()[:, 0]
        if len(new):
            start = self._count
            self._grow(start + len(new))
            self[ROWS][start:] = rows[new]
            found[new] = self._places[local[new]] = self._numbers(start, self._count)
        return found.long()

    def settle(self) -> None:
        """Sort the rows, and free the memory that is kept for further ones.

        What is saved then depends neither on the order of the batches nor on the layout.
        """
        order = self[ROWS].argsort()
        for entry, tensor in self._tensors.items():  # one copy at a time
            self._tensors[entry] = tensor[order]
        self._places = None

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the entries of a state; of rows that this process does not hold, nothing.

        Raises:
            UserError: The entries are those of another update, or of rows of another width.
        """
        fits = tensors.keys() == self._tensors.keys() and all(
            tensors[entry].shape[1:] == tensor.shape[1:] for entry, tensor in self._tensors.items()
        )
        if not fits:
            raise UserError(
                "the checkpoint's optimizer has other state of the memory's rows"
                f" ({', '.join(tensors)}) than this run's optimizer.memory_update keeps"
                f" ({', '.join(self._tensors)}); choose the same one"
            )
        rows = tensors[ROWS]
        own = (rows >= self._first) & (rows < self._first + self._held)
        everything = bool(own.all())
        for entry, present in self._tensors.items():
            saved = tensors[entry] if everything else tensors[entry][own]
            self._tensors[entry] = saved.to(present.device, present.dtype, copy=True)
        self._count, self._places = len(self._tensors[ROWS]), None

    def _grow(self, count: int) -> None:
        self._count = count
        for entry, tensor in self._tensors.items():
            if len(tensor) < count:
                more = max(count, math.ceil(_GROWTH * len(tensor))) - len(tensor)
                self._tensors[entry] = torch.cat(
                    [tensor, tensor.new_zeros(more, *tensor.shape[1:])]
                )

    def _numbers(self, start: int, end: int) -> Tensor:
        device = self._tensors[ROWS].device
        return torch.arange(start, end, dtype=torch.int32, device=device)


class UpdatesRows(Optimizer):
    """The part of an optimizer that updates its groups with `rows`, and keeps their state."""

    def row_states(self) -> dict[Tensor, RowState]:
        """The state of each table in a group with `rows`, ready to be saved; it may be empty."""
        states: dict[Tensor, RowState] = {}
        for group in self.param_groups:
            for weight in group["params"] if group.get(ROWS) else ():
                store = row_store_of(weight)
                if store is not None:
                    store.settle()
                states[weight] = state = self._state_of(weight, group)
                state.settle()
        return states

    def _state_of(self, weight: Tensor, group: dict[str, Any]) -> RowState:
        state: Any = self.state.get(weight)
        return state if isinstance(state, RowState) else RowState(weight, group[ROWS])

    def update_rows(self, group: dict[str, Any]) -> None:
        """Update the touched rows of the tables of a group."""
        settings = {key: value for key, value in group.items() if key != "params"}
        for weight in group["params"]:
            store = row_store_of(weight)
            if store is not None:
                store.finish()
            update: Callable[[], object] = _nothing
            if weight.grad is not None:
                state: Any = self._state_of(weight, group)
                self.state[weight] = state
                update = partial(update_rows, weight, weight.grad, state, settings)
            if store is None:
                update()
            else:
                store.apply(update)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, row gradients that are not added up yet included."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for weight in group["params"] if group.get(ROWS) else ():
                weight.grad = None
                store = row_store_of(weight)
                if store is not None:
                    store.clear()

    def state_dict(self) -> dict[str, Any]:
        """The state, as torch's optimizers have it; that of rows is a dict of tensors [T, ...]."""
        self.row_states()
        whole = super().state_dict()
        plain = {
            k: dict(v.items()) if isinstance(v, RowState) else v for k, v in whole["state"].items()
        }
        return {**whole, "state": plain}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; of rows that this process does not hold, nothing.

        Raises:
            UserError: The state of the rows is that of another update.
        """
        # torch would cast the numbers of the rows to the parameter's dtype.
        tensors = dict(state_dict["state"])
        loaded: dict[Tensor, RowState] = {}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if group.get(ROWS):
                for weight, number in zip(group["params"], saved["params"], strict=False):
                    if number in tensors:
                        loaded[weight] = RowState(weight, group[ROWS])
                        loaded[weight].load(tensors.pop(number))
        super().load_state_dict({**state_dict, "state": tensors})
        self.state.update(loaded)


def _nothing() -> None:
    """The update of a table without a gradient."""


@torch.no_grad()
def update_rows(weight: Tensor, grad: Tensor, state: RowState, group: Mapping[str, Any]) -> None:
    """Update the touched rows of a table by its gradient g, with moments of each row's own.

    With t the updates of a row so far, this one included, `adam` is for each value

        m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²
        w ← w - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + eps)

    and `rowwise` has one v for a row, from the mean of g² over the row, and g in place of the first
    moment.

    Args:
        weight: [R, D], a DTensor sharded by rows among them.
        grad: A row gradient of rows that this process updates, or a dense one.
        state: The state of the rows.
        group: `rows`, `lr`, `betas` and `eps`.
    """
    part, first = updated_rows(weight)
    if grad.is_sparse:
        rows, values = grad._indices()[0], grad._values()
        touched = values.any(1).nonzero()[:, 0]  # the one wait: a mask as an index waits each time
        if len(touched) < len(rows):
            rows, values = rows[touched], values[touched]
    else:
        rows, values = nonzero_rows(grad.to_local() if isinstance(grad, DTensor) else grad)
        rows = rows + first
    if not len(rows):
        return
    places = state.places(rows)
    step = state["step"].index_select(0, places).add_(1)
    state["step"].index_copy_(0, places, step)
    beta1, beta2 = group["betas"]
    if group[ROWS] == "rowwise":
        square = values.square().mean(1, keepdim=True)
        square = _averaged(state["row_exp_avg_sq"][:, None], places, square, beta2)
        moves = values.clone()
    else:
        square = _averaged(state["exp_avg_sq"], places, values.square(), beta2)
        moves = _averaged(state["exp_avg"], places, values, beta1)
        moves.div_(_correction(step, beta1, values))
    root = square.div_(_correction(step, beta2, square)).sqrt_().add_(group["eps"])
    moves.div_(root).mul_(-group["lr"])
    local = rows - first
    part.index_copy_(0, local, moves.add_(part.index_select(0, local)))


def _averaged(average: Tensor, places: Tensor, new: Tensor, beta: float) -> Tensor:
    """Let the running averages at `places` take in new values [U, ...]; a copy of the averages."""
    values = average.index_select(0, places).lerp_(new, 1 - beta)
    average.index_copy_(0, places, values)
    return values


def _correction(step: Tensor, beta: float, like: Tensor) -> Tensor:
    """1 - beta^step, [U, 1]; accurate where it is small."""
    log = math.log(beta) if beta else -math.inf
    return -torch.expm1(step[:, None].to(like.dtype) * log)
