"""Row gradients of a table against the gradient of an ordinary embedding."""

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mhc_lightning.modules.memory import NgramTable
from mhc_lightning.modules.memory.row_store import RowStore, row_store_of, sum_rows
from mhc_lightning.optimizers.adamw import RowAdamW
from mhc_lightning.strategies.gradient_norm import clip_to_norm, global_norm

HEADS, PER_HEAD, WIDTH = 2, 8, 3


def table_of(per_head: int = PER_HEAD, width: int = WIDTH, *, stored: bool = True) -> NgramTable:
    sizes: Any = SimpleNamespace(heads=HEADS, rows_per_head=per_head)
    table = NgramTable(sizes, width).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        table.weight.normal_(generator=generator)
    if stored:
        table.store = RowStore(table.weight)
    return table


def rows_of(seed: int, *shape: int, below: int = HEADS * PER_HEAD) -> Tensor:
    return torch.randint(0, below, (*shape, HEADS), generator=torch.Generator().manual_seed(seed))


def train(table: Any, *batches: Tensor) -> Tensor:
    for rows in batches:
        (table(rows).sin() * torch.arange(1, 1 + WIDTH)).sum().backward()
    if table.store is not None:
        table.store.finish()
    return table.weight.grad


def test_the_gradient_is_that_of_an_ordinary_embedding():
    """Rows occur several times in a batch, and in several batches."""
    batches = [rows_of(seed, 3, 5, below=12) for seed in range(3)]
    ours, theirs = train(table_of(), *batches), train(table_of(stored=False), *batches)
    assert ours.is_sparse and ours.is_coalesced()
    rows = ours.indices()[0]
    assert rows.tolist() == sorted(set(torch.cat([b.flatten() for b in batches]).tolist()))
    torch.testing.assert_close(ours.to_dense(), theirs, rtol=1e-14, atol=1e-14)


def test_equal_rows_are_added_up_in_their_order():
    """In float32, where the order shows."""
    values = torch.tensor([[1e8], [1.0], [-1e8], [5.0]])
    rows, sums = sum_rows(torch.tensor([7, 7, 7, 2]), values)
    assert rows.tolist() == [2, 7]
    assert sums.tolist() == [[5.0], [0.0]]
    rows, sums = sum_rows(torch.tensor([7, 7, 7, 2]), values[[0, 2, 1, 3]])
    assert sums.tolist() == [[5.0], [1.0]]


def test_a_second_finish_changes_nothing_and_clear_begins_anew():
    table = table_of()
    first = train(table, rows_of(0, 4)).to_dense()
    table.store.finish()
    assert torch.equal(table.weight.grad.to_dense(), first)
    table.store.clear()
    assert table.weight.grad is None
    torch.testing.assert_close(train(table, rows_of(0, 4)).to_dense(), first, rtol=0, atol=0)


def test_a_step_without_look_ups_has_an_empty_gradient():
    table = table_of()
    table.store.finish()
    assert table.weight.grad._nnz() == 0
    assert float(global_norm([table.weight])) == 0


def test_values_without_gradients_leave_no_trace():
    table = table_of()
    with torch.no_grad():
        table(rows_of(0, 4))
    with torch.inference_mode():
        table(rows_of(0, 4))
    table.weight.requires_grad_(False)
    assert not table(rows_of(0, 4)).requires_grad
    assert not table.store._parts


def test_a_recomputed_look_up_counts_once():
    rows = rows_of(0, 4, 5)
    want = train(table_of(), rows).to_dense()
    table = table_of()
    out: Any = checkpoint(table, rows, use_reentrant=False)
    (out.sin() * torch.arange(1, 1 + WIDTH)).sum().backward()
    table.store.finish()
    assert torch.equal(table.weight.grad.to_dense(), want)


def test_a_gradient_for_other_tensors_alone_leaves_no_trace():
    table = table_of()
    factor = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad((table(rows_of(0, 4)) * factor).sum(), factor)
    assert not table.store._parts


def test_transforms_see_an_ordinary_embedding():
    rows, table = rows_of(0, 4), table_of()

    def loss(weight: Tensor, rows: Tensor) -> Tensor:
        return torch.func.functional_call(table, {"weight": weight}, (rows,)).sin().sum()

    plain = table_of(stored=False)
    plain(rows).sin().sum().backward()
    weight = table.weight.detach()
    grad = torch.func.grad(loss)(weight, rows)
    assert plain.weight.grad is not None
    torch.testing.assert_close(grad, plain.weight.grad)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, rows)
    torch.testing.assert_close(each.sum(0), plain.weight.grad)
    tangent = torch.ones_like(weight)
    slope: Any = torch.func.jvp(lambda w: loss(w, rows), (weight,), (tangent,))
    torch.testing.assert_close(slope[1], plain.weight.grad.sum())


def test_the_dense_gradient_of_an_exported_table_is_taken_too():
    """It shares the parameter. Rows whose gradient is zero are left out."""
    table, rows, more = table_of(), rows_of(0, 4), rows_of(1, 3)
    program: Any = torch.export.export(table, (rows,)).module()
    torch.testing.assert_close(program(rows), table(rows), rtol=0, atol=0)
    program(rows).sin().sum().backward()
    table(more).sin().sum().backward()
    table.store.finish()
    grad, plain = table.weight.grad, table_of(stored=False)
    (plain(rows).sin().sum() + plain(more).sin().sum()).backward()
    assert grad is not None and plain.weight.grad is not None
    assert grad._nnz() == int(plain.weight.grad.any(1).sum())
    torch.testing.assert_close(grad.to_dense(), plain.weight.grad)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copy_is_a_table_by_itself(how):
    table = table_of()
    if how == "deepcopy":
        twin = copy.deepcopy(table)
    else:
        file = io.BytesIO()
        torch.save(table, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.store is None
    assert row_store_of(twin.weight) is None
    want = train(table_of(stored=False), rows_of(0, 4))
    torch.testing.assert_close(train(twin, rows_of(0, 4)), want)
    assert not table.store._parts


def test_without_its_store_a_table_has_an_ordinary_gradient_again():
    table = table_of()
    train(table, rows_of(0, 4))
    table.store.remove()
    table.store = None
    assert row_store_of(table.weight) is None
    assert torch.equal(train(table, rows_of(1, 4)), train(table_of(stored=False), rows_of(1, 4)))


class Allocations(TorchDispatchMode):
    """The largest tensor that operations make, but for views of tensors that were there before."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            made = isinstance(tensor, Tensor) and tensor.layout == torch.strided
            if made and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("update", ["adam", "rowwise"])
def test_no_tensor_of_a_step_grows_with_the_table(update):
    """Look-up, backward, norm, clip and update of 48 rows of 2,000,000, some of them new."""
    table = table_of(per_head=1_000_000, width=4)
    optimizer = RowAdamW([{"params": [table.weight], "rows": update}], lr=0.1, weight_decay=0.0)

    def step(seed: int) -> None:
        optimizer.zero_grad()
        for part in range(2):
            table(rows_of(2 * seed + part, 12, below=2_000_000)).square().sum().backward()
        table.store.finish()
        clip_to_norm([table.weight], 0.1, global_norm([table.weight]))
        optimizer.step()

    step(0)  # makes the map from rows to their state, one int32 for each row of the table
    places = optimizer.state[table.weight]._places
    before = table.weight.detach().clone()
    with Allocations(table.weight, places) as seen:
        step(1)
    assert 48 * 4 <= seen.largest <= 4 * 48 * 4
    assert 40 < int((table.weight != before).any(1).sum()) <= 48
