"""Lazy updates of touched rows against Adam of torch, and against a row by itself."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules.memory.row_store import RowStore, row_gradient
from mhc_lightning.optimizers.adamw import RowAdamW
from mhc_lightning.optimizers.muon import MuonAdamW
from mhc_lightning.optimizers.row_updates import RowState

ROWS, WIDTH, LR = 12, 3, 0.02
SETTINGS: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-9}


def table(seed: int = 0) -> nn.Parameter:
    values = torch.randn(
        ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return nn.Parameter(values)


def gradients(steps: int, share: float) -> list[dict[int, Tensor]]:
    """Gradients of some of the rows, for each step."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            row: torch.randn(WIDTH, dtype=torch.float64, generator=generator)
            for row in range(ROWS)
            if torch.rand((), generator=generator) < share
        }
        for _ in range(steps)
    ]


def give(weight: nn.Parameter, grads: dict[int, Tensor], *, dense: bool = False) -> None:
    rows = torch.tensor(sorted(grads), dtype=torch.int64)
    values = torch.stack([grads[int(row)] for row in rows])
    weight.grad = row_gradient(weight, rows, values)
    if dense:
        weight.grad = weight.grad.to_dense()


def optimizer_of(weight: nn.Parameter, update: str, kind: str = "adamw") -> Any:
    group = {"params": [weight], "rows": update, "weight_decay": 0.0}
    if kind == "muon":
        return MuonAdamW([{**group, "muon": False}], **SETTINGS)
    return RowAdamW([group], **SETTINGS, fused=True)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_rows_that_are_touched_in_every_step_move_as_under_adam(kind):
    ours, theirs = table(), table()
    mine = optimizer_of(ours, "adam", kind)
    adam = torch.optim.Adam([theirs], **SETTINGS)
    for grads in gradients(20, share=1.1):
        give(ours, grads)
        give(theirs, grads, dense=True)
        mine.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dense", [False, True])
def test_a_row_moves_as_if_the_steps_without_its_gradient_were_not(dense):
    ours, start, grads = table(), table(), gradients(20, share=0.3)
    mine = optimizer_of(ours, "adam")
    for some in grads:
        give(ours, some, dense=dense)
        mine.step()
    for row in range(ROWS):
        alone = nn.Parameter(start[row].detach().clone())
        adam = torch.optim.Adam([alone], **SETTINGS)
        for some in grads:
            if row in some:
                alone.grad = some[row].clone()
                adam.step()
        torch.testing.assert_close(ours[row], alone, rtol=1e-12, atol=1e-14)


def test_rowwise_keeps_one_second_moment_for_a_row():
    ours, want, grads = table(), table().detach().tolist(), gradients(20, share=0.3)
    mine = optimizer_of(ours, "rowwise")
    square, step = [0.0] * ROWS, [0] * ROWS
    for some in grads:
        give(ours, some)
        mine.step()
        for row, grad in some.items():
            step[row] += 1
            mean = math.fsum(float(g) ** 2 for g in grad) / WIDTH
            square[row] = 0.95 * square[row] + 0.05 * mean
            root = math.sqrt(square[row] / (1 - 0.95 ** step[row])) + 1e-9
            want[row] = [w - LR * float(g) / root for w, g in zip(want[row], grad, strict=True)]
    torch.testing.assert_close(
        ours.detach(), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14
    )
    state: RowState = mine.state[ours]
    assert {entry: tuple(t.shape) for entry, t in state.items()} == {
        "rows": (ROWS,),
        "step": (ROWS,),
        "row_exp_avg_sq": (ROWS,),
    }


def test_rows_without_a_gradient_keep_their_values_and_have_no_state():
    weight = table()
    before = weight.detach().clone()
    optimizer = optimizer_of(weight, "adam")
    zero = torch.zeros(WIDTH, dtype=torch.float64)
    for _ in range(3):
        give(weight, {2: zero + 1, 5: zero, 7: zero - 1})
        optimizer.step()
    moved = (weight != before).any(1)
    assert moved.nonzero()[:, 0].tolist() == [2, 7]
    assert optimizer.state[weight]["rows"].tolist() == [2, 7]
    assert optimizer.state[weight]["step"].tolist() == [3, 3]


@pytest.mark.parametrize("update", ["adam", "rowwise"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_goes_on_from_its_saved_state_bit_for_bit(kind, update, tmp_path):
    first, grads = table(), gradients(12, share=0.3)
    optimizer = optimizer_of(first, update, kind)
    for some in grads[:6]:
        give(first, some)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state")
    second = nn.Parameter(first.detach().clone())
    resumed = optimizer_of(second, update, kind)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    copied = copy.deepcopy(optimizer)
    third = copied.param_groups[0]["params"][0]
    for some in grads[6:]:
        for weight, trains in ((first, optimizer), (second, resumed), (third, copied)):
            give(weight, some)
            trains.step()
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    states = [trains.state_dict()["state"][0] for trains in (optimizer, resumed, copied)]
    for entry, tensor in states[0].items():
        assert all(torch.equal(tensor, other[entry]) for other in states[1:])


def test_saved_state_is_as_large_as_the_rows_that_it_is_of():
    weight = table()
    optimizer = optimizer_of(weight, "adam")
    for some in gradients(5, share=0.2):
        give(weight, some)
        optimizer.step()
    for tensor in optimizer.state_dict()["state"][0].values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_numbers_of_rows_stay_integers():
    """torch would cast them to float32, which does not hold 2^24 + 1."""
    weight = nn.Parameter(torch.zeros(2**24 + 4, 1))
    optimizer = optimizer_of(weight, "adam")
    rows = torch.tensor([2**24 + 1, 2**24 + 3])
    weight.grad = row_gradient(weight, rows, torch.ones(2, 1))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[weight]["rows"].tolist() == rows.tolist()


def test_state_of_another_update_is_refused():
    weight = table()
    saved = optimizer_of(weight, "adam")
    give(weight, gradients(1, share=1.1)[0])
    saved.step()
    with pytest.raises(UserError, match=r"exp_avg, exp_avg_sq.*row_exp_avg_sq.*choose the same"):
        optimizer_of(weight, "rowwise").load_state_dict(saved.state_dict())


def test_zero_grad_drops_what_is_not_added_up_yet():
    weight = table()
    store = RowStore(weight)
    optimizer = optimizer_of(weight, "adam")
    store.look_up(torch.tensor([1, 2])).sum().backward()
    optimizer.zero_grad()
    store.finish()
    assert weight.grad is not None
    assert weight.grad._nnz() == 0
