"""What a connection on compiled kernels does: calls, passes over the streams, allocations, bits."""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from accuracy import assert_close_to_float64, randn
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mhc_lightning.kernels import (
    backend,
    fuses_seams,
    merge_and_read,
    merge_streams,
    read_hyper_streams,
    read_streams,
    sinkhorn_knopp,
)
from mhc_lightning.kernels.compiled_support.library import Call, observe

TOKENS, N, WIDTH = 64, 4, 96
K = N * N + 2 * N
STREAMS_BYTES = TOKENS * N * WIDTH * 4


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "compiled")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def leaves(tokens: int = TOKENS, n: int = N, width: int = WIDTH) -> list[Tensor]:
    torch.manual_seed(0)
    count = n * n + 2 * n
    given = [randn(tokens, n, width), randn(n * width, count, scale=0.1)]
    return [t.requires_grad_() for t in (*given, torch.rand(3), randn(count))]


def connection(streams: Tensor, *parameters: Tensor) -> Tensor:
    phi, alpha, bias = parameters
    kept, read, mappings = read_streams(streams, phi, alpha, bias)
    return merge_streams(kept, read, mappings.residual, mappings.post)


def hyper(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    n, width = streams.shape[-2:]
    kept, read, mappings = read_hyper_streams(streams, phi[:width, : n + 2], alpha[:2], bias)
    return merge_streams(kept, read, mappings.residual, mappings.post)


def seam(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    kept, read, mappings = read_streams(streams, phi, alpha, bias)
    new, read, mappings = merge_and_read(
        kept, read, mappings.residual, mappings.post, phi, alpha, bias
    )
    return merge_streams(new, read, mappings.residual, mappings.post)


def test_passes_of_a_fused_seam() -> None:
    """The merged streams are read from the cache, and their gradient never reaches memory."""
    given, gradient = leaves(), randn(TOKENS, N, WIDTH)
    assert fuses_seams(given[0], given[1])
    calls: list[Call] = []
    with observe(calls.append):
        merged = seam(*given)
        torch.autograd.grad(merged, given, gradient)
    moved = {c.name: sum(t.numel() for t in c.views) / (TOKENS * WIDTH) for c in calls}
    assert moved["merge_read_forward"] == 2 * N + 2
    # The view of the merged streams, read once more, is inside the struct of the operands.
    assert moved["merge_read_backward"] == 3 * N + 3
    assert len(calls) == 6


def test_calls_and_passes_of_a_connection() -> None:
    """(9n + 5)·C elements per token, each stream-sized operand once per kernel."""
    given, gradient = leaves(), randn(TOKENS, N, WIDTH)
    calls: list[Call] = []
    with observe(calls.append):
        merged = connection(*given)
        torch.autograd.grad(merged, given, gradient)
    moved = {c.name: sum(t.numel() for t in c.views) / (TOKENS * WIDTH) for c in calls}
    # The view of the streams to read is inside the struct of the operands.
    assert moved == {
        "read_forward": 1,
        "merge_forward": 2 * N + 1,
        "merge_backward": 3 * N + 2,
        "read_backward": 2 * N + 1,
    }
    assert Counter(c.name for c in calls) == dict.fromkeys(moved, 1)


def test_allocations_of_a_connection() -> None:
    """Results alone: the merged streams forward, and two gradients of the streams backward."""
    given, gradient = leaves(), randn(TOKENS, N, WIDTH)
    connection(*given)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        merged = connection(*given)
        gradients = torch.autograd.grad(merged, given, gradient)
    sizes = [
        event.nbytes()
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.nbytes() > 0
    ]
    assert sum(size >= STREAMS_BYTES for size in sizes) == 3
    assert len(sizes) <= 40  # coefficients and their gradients; nothing per iteration or token
    assert len(gradients) == 4


@pytest.mark.parametrize("run", [connection, hyper, seam])
def test_the_number_of_threads_changes_no_bit(
    run: Callable[..., Tensor], threads: Callable[[int], None]
) -> None:
    given, gradient = leaves(tokens=1030), randn(1030, N, WIDTH)
    results = []
    for count in (1, 2, 3):
        threads(count)
        merged = run(*given)
        results.append((merged, *torch.autograd.grad(merged, given, gradient)))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("width", [1, 16, 100, 256, 300, 520])
@pytest.mark.parametrize("n", range(1, 9))
def test_a_connection_of_any_size_against_float64(n: int, width: int) -> None:
    given, gradient = leaves(tokens=19, n=n, width=width), randn(19, n, width)
    doubles = [t.detach().double().requires_grad_() for t in given]
    for run in (connection, hyper, seam):
        for a, b in zip(
            outcome(run, given, gradient), outcome(run, doubles, gradient.double()), strict=True
        ):
            assert_close_to_float64(a, b)


@pytest.mark.parametrize("width", [16, 300])
@pytest.mark.parametrize("n", range(1, 9))
def test_bfloat16_streams_are_rounded_where_torch_rounds_them(n: int, width: int) -> None:
    """Sums over tokens cancel: a gradient may be far from float64, as the torch path's is."""
    given = leaves(tokens=19, n=n, width=width)
    given[0] = given[0].detach().bfloat16().requires_grad_()
    gradient = randn(19, n, width, dtype=torch.bfloat16)
    for run in (connection, hyper):
        ours = outcome(run, given, gradient)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(backend.VARIABLE, "torch")
            expected = outcome(run, given, gradient)
        assert [t.dtype for t in ours] == [t.dtype for t in expected]
        for a, b in zip(ours, expected, strict=True):
            assert_close_to_float64(a, b.double(), torch.bfloat16)


def outcome(run: Callable[..., Tensor], given: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The merged streams, and the gradients of all that was given."""
    merged = run(*given)
    return [merged.detach(), *torch.autograd.grad(merged, given, gradient)]


@pytest.mark.parametrize("size", [1.0, 80.0, 1e4])
@pytest.mark.parametrize("n", range(1, 9))
def test_sinkhorns_gradient_for_logits_of_any_size(n: int, size: float) -> None:
    """Against the torch path in float64, whose gradient is exact."""
    logits = ((2 * torch.rand(40, n, n) - 1) * size).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    weights = torch.randn(40, n, n)
    (ours,) = torch.autograd.grad(sinkhorn_knopp(logits), logits, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backend.VARIABLE, "torch")
        (expected,) = torch.autograd.grad(sinkhorn_knopp(exact), exact, weights.double())
    # A logit's own rounding is a part of its size.
    limit = 1e-5 * max(1.0, size / 10)
    assert (ours - expected).abs().max() <= limit * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    given = leaves()
    with torch.no_grad():
        given[0][5, 2, 7] = bad
    merged = connection(*given)
    assert not torch.isfinite(merged[5]).any()
    assert torch.isfinite(merged[:5]).all() and torch.isfinite(merged[6:]).all()
    gradients = torch.autograd.grad(merged, given, torch.ones_like(merged))
    assert not torch.isfinite(gradients[1]).all()
    assert torch.isnan(sinkhorn_knopp(torch.full((1, 3, 3), float("nan")))).all()
