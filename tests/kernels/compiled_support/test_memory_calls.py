"""A memory's operators on compiled kernels: sizes, passes over the streams, bits."""

from collections.abc import Callable, Iterator

import pytest
import torch
from accuracy import assert_close_to_float64, randn
from layouts import LAYOUTS, laid_out
from memory_definitions import exact_gates, exact_write
from torch import Tensor

from mhc_lightning.kernels import backend, context_gates, gated_write
from mhc_lightning.kernels.compiled_support.library import Call, observe

N, WIDTH, TAPS, DILATION = 4, 96, 4, 3


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "compiled")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def gates(streams: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    return context_gates(streams, key, weight, 1e-6)[1]


def exactly_gates(streams: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    return exact_gates(streams, key, weight, 1e-6)


def write(streams: Tensor, value: Tensor, gate: Tensor, taps: Tensor | None = None) -> Tensor:
    return gated_write(streams, value, gate, taps, DILATION)


def exactly_write(
    streams: Tensor, value: Tensor, gate: Tensor, taps: Tensor | None = None
) -> Tensor:
    return exact_write(streams, value, gate, taps, DILATION)


EXACT: dict[Callable, Callable] = {gates: exactly_gates, write: exactly_write}


def operands(
    run: Callable, batch: int, length: int, n: int = N, width: int = WIDTH, taps: int = TAPS
) -> list[Tensor]:
    torch.manual_seed(0)
    streams = randn(batch, length, n, width)
    if run is gates:  # whose scores are not near zero, where the slope has a pole
        given = [streams, streams + randn(*streams.shape, scale=0.5), 1 + 0.2 * randn(n, width)]
    else:
        given = [streams, randn(batch, length, width), torch.rand(batch, length, n)]
        given += [randn(taps, n, width)] if taps else []
    return [t.requires_grad_() for t in given]


def outcome(run: Callable, given: list[Tensor], gradient: Tensor) -> list[Tensor]:
    result = run(*given)
    return [result.detach(), *torch.autograd.grad(result, given, gradient)]


def assert_exact(run: Callable, given: list[Tensor]) -> None:
    doubles = [t.detach().double().requires_grad_() for t in given]
    gradient = torch.randn_like(run(*given))
    expected = outcome(EXACT[run], doubles, gradient.double())
    for a, b in zip(outcome(run, given, gradient), expected, strict=True):
        assert_close_to_float64(a, b)


@pytest.mark.parametrize("width", [1, 16, 100, 256, 300, 520])
@pytest.mark.parametrize("n", range(1, 9))
def test_any_size_against_float64(n: int, width: int) -> None:
    if width > 1:  # or the norms leave nothing but a sign
        assert_exact(gates, operands(gates, 2, 7, n, width))
    for taps in (0, 1, 4):
        assert_exact(write, operands(write, 2, 17, n, width, taps))


@pytest.mark.parametrize(
    ("batch", "length", "taps"), [(1, 700, 4), (3, 200, 3), (1, 700, 120), (2, 400, 200)]
)
def test_taps_reach_from_block_to_block(batch: int, length: int, taps: int) -> None:
    """Also over more positions than a block has, and than there are."""
    assert_exact(write, operands(write, batch, length, 2, 5, taps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(layout: str, dtype: torch.dtype) -> None:
    for run in (gates, write):
        given = [t.detach().to(dtype) for t in operands(run, 2, 9, 3, 40)]
        gradient = torch.randn_like(run(*given))
        for place in range(len(given) + 1):
            changed = [*given, gradient]
            changed[place] = laid_out(layout, changed[place])
            dense = [t.contiguous() for t in changed]
            results = []
            for *some, sent in (changed, dense):
                leaves = [t.detach().requires_grad_() for t in some]
                results.append(outcome(run, leaves, sent))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_keys_and_values_of_half_precision() -> None:
    """Beside streams of a dtype that the kernels take; streams of float16 run in plain torch."""
    for run in (gates, write):
        given = operands(run, 2, 9, 3, 40)
        given[1] = given[1].detach().half().requires_grad_()
        wide = [given[0], given[1].detach().float().requires_grad_(), *given[2:]]
        gradient = torch.randn_like(run(*given))
        ours, expected = outcome(run, given, gradient), outcome(run, wide, gradient)
        assert ours[2].dtype == torch.float16
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(ours, expected, strict=True))
        calls: list[Call] = []
        with observe(calls.append):
            run(given[0].half(), *given[1:])
        assert not calls


@pytest.mark.parametrize("width", [16, 300])
@pytest.mark.parametrize("n", range(1, 9))
def test_bfloat16_is_rounded_where_torch_rounds_it(n: int, width: int) -> None:
    for run in (gates, write):
        given = operands(run, 2, 19, n, width)
        given[:2] = [t.detach().bfloat16().requires_grad_() for t in given[:2]]
        gradient = torch.randn_like(run(*given))
        ours = outcome(run, given, gradient)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(backend.VARIABLE, "torch")
            expected = outcome(run, given, gradient)
        assert [t.dtype for t in ours] == [t.dtype for t in expected]
        for a, b in zip(ours, expected, strict=True):
            assert_close_to_float64(a, b.double(), torch.bfloat16)


def test_passes_of_gates_and_writes() -> None:
    """Each stream-sized operand once per kernel, and none of the convolution's own."""
    calls: list[Call] = []
    with observe(calls.append):
        streams, key, weight = operands(gates, 2, 32)
        passed, gate = context_gates(streams, key, weight, 1e-6)
        torch.autograd.grad(passed.sum() + gate.sum(), [streams, key, weight])
        given = operands(write, 2, 32)
        torch.autograd.grad(write(*given), given, randn(2, 32, N, WIDTH))
    moved = {c.name: sum(t.numel() for t in c.views) / (2 * 32 * WIDTH) for c in calls}
    assert moved == {
        "context_gate_forward": 2 * N,
        "context_gate_backward": 5 * N,
        "gated_write_forward": 2 * N + 1,
        "gated_write_backward": N + 2,
    }


@pytest.mark.parametrize("run", [gates, write])
def test_the_number_of_threads_changes_no_bit(
    run: Callable[..., Tensor], threads: Callable[[int], None]
) -> None:
    given = operands(run, 2, 515)
    gradient = torch.randn_like(run(*given))
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(outcome(run, given, gradient))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(bad: float) -> None:
    streams, key, weight = operands(gates, 1, 40)
    with torch.no_grad():
        key[0, 5, 2, 7] = bad
    of_gates = gates(streams, key, weight)
    assert not of_gates[0, 5, 2].isfinite() and of_gates.isfinite().sum() == of_gates.numel() - 1
    given = operands(write, 1, 40)
    with torch.no_grad():
        given[1][0, 5, 7] = bad
    new = write(*given)
    reached = torch.zeros(40, dtype=torch.bool)
    reached[5 : 5 + TAPS * DILATION : DILATION] = True
    assert torch.equal(~new[0].isfinite().all(-1).all(-1), reached)
