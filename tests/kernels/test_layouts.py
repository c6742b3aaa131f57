"""Operands and gradients of any strides: the numbers of dense ones, and no work token by token."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from accuracy import randn
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mhc_lightning.kernels import (
    aggregate_streams,
    backend,
    expand_streams,
    mean_streams,
    merge_and_read,
    merge_streams,
    read_hyper_streams,
    read_streams,
    sinkhorn_knopp,
)

N, WIDTH = 4, 256
K = N * N + 2 * N


@pytest.fixture(autouse=True, params=["torch", "compiled"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, request.param)


def last_stride_two(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "of one number": lambda t: t[(slice(1),) * t.dim()].expand(t.shape),
    "of one stream": lambda t: t[:, :1].expand(t.shape),
    "of one column": lambda t: t[..., :1].expand(t.shape),
    "transposed": lambda t: t.mT.contiguous().mT,
    "tokens last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other": last_stride_two,
}
OPERANDS: dict[str, tuple[Callable, dict[str, tuple[int, ...]]]] = {
    "sinkhorn_knopp": (sinkhorn_knopp, {"logits": (N, N)}),
    "expand_streams": (lambda x: expand_streams(x, N), {"x": (WIDTH,)}),
    "mean_streams": (mean_streams, {"streams": (N, WIDTH)}),
    "aggregate_streams": (aggregate_streams, {"streams": (N, WIDTH), "pre": (N,)}),
    "merge_streams": (
        merge_streams,
        {"streams": (N, WIDTH), "output": (WIDTH,), "residual": (N, N), "post": (N,)},
    ),
    "read_streams": (
        lambda streams, carry: read_streams(streams, *parameters(), carry=carry)[:2],
        {"streams": (N, WIDTH), "carry": (N,)},
    ),
    "read_hyper_streams": (
        lambda streams: read_hyper_streams(streams, *hyper_parameters())[:2],
        {"streams": (N, WIDTH)},
    ),
    "merge_and_read": (
        lambda streams, output, residual, post: merge_and_read(
            streams, output, residual, post, *parameters()
        )[:2],
        {"streams": (N, WIDTH), "output": (WIDTH,), "residual": (N, N), "post": (N,)},
    ),
}


def parameters() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    phi = torch.randn(N * WIDTH, K, generator=generator) / 50
    return phi, torch.ones(3), torch.zeros(K)


def hyper_parameters() -> tuple[Tensor, Tensor, Tensor]:
    return parameters()[0][:WIDTH, : N + 2], torch.ones(2), torch.zeros(K)


def outputs(function: Callable, operands: list[Tensor]) -> tuple[Tensor, ...]:
    results = function(*operands)
    return (results,) if isinstance(results, Tensor) else results


def run(
    function: Callable, operands: list[Tensor], gradients: list[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    leaves = [t.detach().requires_grad_() for t in operands]
    results = outputs(function, leaves)
    return results, torch.autograd.grad(results, leaves, gradients)


def calls_of_torch(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    return sum(e.count for e in profiled.key_averages() if e.key.startswith("aten::"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERANDS)
def test_layouts_change_neither_numbers_nor_the_count_of_calls(name: str, layout: str) -> None:
    (function, shapes), change = OPERANDS[name], LAYOUTS[layout]
    for changed in [*range(len(shapes)), "gradients"]:
        counts = []
        for tokens in (3, 24):
            operands = [randn(tokens, *shape) for shape in shapes.values()]
            gradients = [randn(*t.shape) for t in outputs(function, operands)]
            if changed == "gradients":
                gradients = [change(t) for t in gradients]
            else:
                operands[int(changed)] = change(operands[int(changed)])
            counts.append(calls_of_torch(partial(run, function, operands, gradients)))
        assert counts[1] - counts[0] < 24 - 3, changed  # or a token has calls of its own
        ours = run(function, operands, gradients)
        dense = [t.contiguous() for t in operands], [t.contiguous() for t in gradients]
        torch.testing.assert_close(ours, run(function, *dense), rtol=1e-5, atol=1e-5)
