"""The public functions under ``torch.func``'s transforms and forward-mode derivatives, in float64.

What they are compared with is the ordinary path: operators whose backward passes are written by
hand, called once per example.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import randn
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from mhc_lightning.kernels import (
    aggregate_streams,
    expand_streams,
    hyper_mappings,
    mean_streams,
    merge_and_read,
    merge_streams,
    read_hyper_streams,
    read_streams,
    sinkhorn_knopp,
    stream_mappings,
)

TOKENS, N, WIDTH, FEW = 3, 3, 4, 5
K = N * N + 2 * N

SHAPES = {
    "logits": (TOKENS, N, N),
    "x": (TOKENS, WIDTH),
    "streams": (TOKENS, N, WIDTH),
    "output": (TOKENS, WIDTH),
    "residual": (TOKENS, N, N),
    "post": (TOKENS, N),
    "pre": (TOKENS, N),
    "carry": (TOKENS, N),
    "phi": (N * WIDTH, K),
    "alpha": (3,),
    "bias": (K,),
    "few_phi": (N * WIDTH, 2 * N + FEW),
    "few_bias": (2 * N + FEW,),
    "hyper_phi": (WIDTH, N + 2),
    "hyper_alpha": (2,),
}


def mix_few(logits: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, FEW, dtype=logits.dtype)
    return ((logits * weights).sum(-1)[..., None, None] + torch.eye(N, dtype=logits.dtype)).tanh()


def read(*operands: Any, **options: Any) -> tuple[Tensor, ...]:
    kept, u, mappings = read_streams(*operands, **options)
    return kept, u, *mappings


def read_with_carry(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, carry: Tensor
) -> tuple[Tensor, ...]:
    return read(streams, phi, alpha, bias, carry=carry)


def read_hyper(*operands: Any) -> tuple[Tensor, ...]:
    kept, u, mappings = read_hyper_streams(*operands)
    return kept, u, *mappings


def seam(*operands: Any, **options: Any) -> tuple[Tensor, ...]:
    new, u, mappings = merge_and_read(*operands, **options)
    return new, u, *mappings


MERGE = ("streams", "output", "residual", "post")
FUNCTIONS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "sinkhorn_knopp": (sinkhorn_knopp, ("logits",)),
    "expand_streams": (lambda x: expand_streams(x, N), ("x",)),
    "mean_streams": (mean_streams, ("streams",)),
    "aggregate_streams": (aggregate_streams, ("streams", "pre")),
    "merge_streams": (merge_streams, MERGE),
    "stream_mappings": (stream_mappings, ("streams", "phi", "alpha", "bias")),
    "stream_mappings, mixed": (
        partial(stream_mappings, mix=mix_few),
        ("streams", "few_phi", "alpha", "few_bias"),
    ),
    "hyper_mappings": (hyper_mappings, ("streams", "hyper_phi", "hyper_alpha", "bias")),
    "hyper_mappings, linear": (
        partial(hyper_mappings, tanh=False),
        ("streams", "hyper_phi", "hyper_alpha", "bias"),
    ),
    "read_streams": (read, ("streams", "phi", "alpha", "bias")),
    "read_streams, carried": (read_with_carry, ("streams", "phi", "alpha", "bias", "carry")),
    "read_hyper_streams": (read_hyper, ("streams", "hyper_phi", "hyper_alpha", "bias")),
    "merge_and_read": (seam, (*MERGE, "phi", "alpha", "bias")),
    "merge_and_read, carried": (seam, (*MERGE, "phi", "alpha", "bias", "carry")),
    "merge_and_read, mixed": (
        lambda *operands: seam(*operands, mix=mix_few),
        (*MERGE, "few_phi", "alpha", "few_bias"),
    ),
}


def operands_of(name: str, *batch: int) -> list[Tensor]:
    return [randn(*batch, *SHAPES[operand], dtype=torch.float64) for operand in FUNCTIONS[name][1]]


def flat(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def ordinary_vjp(function: Callable, operands: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    return list(
        torch.autograd.grad(
            flat(function(*leaves)), leaves, weights, allow_unused=True, materialize_grads=True
        )
    )


def dot(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(ones, others, strict=True)]).sum()


def assert_same(ours: object, expected: object) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


@pytest.fixture(params=sorted(FUNCTIONS))
def name(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


def test_forward_mode_is_the_transpose_of_backward(name: str) -> None:
    """``w · (J v) = (wᵀ J) · v``, for tangents of all operands and of one alone."""
    function, operands = FUNCTIONS[name][0], operands_of(name)
    values = flat(function(*operands))
    weights = [torch.randn_like(value) for value in values]
    gradients = ordinary_vjp(function, operands, weights)
    for moved in [list(range(len(operands))), *([k] for k in range(len(operands)))]:
        tangents = [
            torch.randn_like(t) if k in moved else torch.zeros_like(t)
            for k, t in enumerate(operands)
        ]
        expected = dot(gradients, tangents)
        results, moving = jvp(function, tuple(operands), tuple(tangents))[:2]
        assert_same(flat(results), values)
        assert_same(dot(weights, flat(moving)), expected)
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(t, v) if k in moved else t
                for k, (t, v) in enumerate(zip(operands, tangents, strict=True))
            ]
            pairs = [forward_ad.unpack_dual(result) for result in flat(function(*duals))]
        zeros = torch.zeros((), dtype=torch.float64)
        moving = [zeros if pair.tangent is None else pair.tangent for pair in pairs]
        assert_same(dot(weights, moving), expected)


def test_reverse_mode(name: str) -> None:
    function, operands = FUNCTIONS[name][0], operands_of(name)
    values, pull = vjp(lambda *tensors: flat(function(*tensors)), *operands)[:2]
    weights = [torch.randn_like(value) for value in values]
    expected = ordinary_vjp(function, operands, weights)
    assert_same(list(pull(tuple(weights))), expected)

    def total(*tensors: Tensor) -> Tensor:
        return dot(weights, flat(function(*tensors)))

    places = tuple(range(len(operands)))
    assert_same(list(grad(total, places)(*operands)), expected)
    assert_same(list(jacrev(total, places)(*operands)), expected)
    assert_same(list(jacfwd(total, places)(*operands)), expected)


def test_batches(name: str) -> None:
    """Of all operands, and of each alone, along any dimension, in chunks too."""
    function, operands = FUNCTIONS[name][0], operands_of(name)
    batched = operands_of(name, 5)
    values = [flat(function(*rows)) for rows in zip(*batched, strict=True)]
    expected = tuple(torch.stack(results) for results in zip(*values, strict=True))
    assert_same(flat(vmap(function)(*batched)), expected)
    assert_same(flat(vmap(function, chunk_size=2)(*batched)), expected)
    last = [t.movedim(0, -1) for t in batched]
    assert_same(flat(vmap(function, in_dims=-1)(*last)), expected)
    for k in range(len(operands)):
        given = [*operands[:k], batched[k], *operands[k + 1 :]]
        dims = tuple(0 if j == k else None for j in range(len(operands)))
        values = [flat(function(*operands[:k], row, *operands[k + 1 :])) for row in batched[k]]
        expected = tuple(torch.stack(results) for results in zip(*values, strict=True))
        assert_same(flat(vmap(function, in_dims=dims)(*given)), expected)


def test_gradients_of_each_example(name: str) -> None:
    function, batched = FUNCTIONS[name][0], operands_of(name, 4)
    weights = [torch.randn_like(t) for t in flat(function(*(t[0] for t in batched)))]

    def total(*tensors: Tensor) -> Tensor:
        return dot(weights, flat(function(*tensors)))

    rows = [ordinary_vjp(function, list(row), weights) for row in zip(*batched, strict=True)]
    expected = [torch.stack(gradients) for gradients in zip(*rows, strict=True)]
    assert_same(list(vmap(grad(total, tuple(range(len(batched)))))(*batched)), expected)


def test_only_backward_is_transformed(name: str) -> None:
    """The forward pass was ordinary: its backward pass is batched, or given tangents."""
    function = FUNCTIONS[name][0]
    leaves = [t.requires_grad_() for t in operands_of(name)]
    values = flat(function(*leaves))
    weights = [torch.randn(4, *value.shape, dtype=torch.float64) for value in values]

    def pull(*cotangents: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            values, leaves, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    rows = [pull(*row) for row in zip(*weights, strict=True)]
    expected = tuple(torch.stack(gradients) for gradients in zip(*rows, strict=True))
    assert_same(vmap(pull)(*weights), expected)
    batched = torch.autograd.grad(
        values,
        leaves,
        weights,
        retain_graph=True,
        is_grads_batched=True,
        allow_unused=True,
        materialize_grads=True,
    )
    assert_same(batched, expected)
    first, second = ([w[k] for w in weights] for k in (0, 1))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, b) for a, b in zip(first, second, strict=True)]
        moving = [forward_ad.unpack_dual(gradient).tangent for gradient in pull(*duals)]
    assert_same(tuple(moving), rows[1])
    assert_same(jvp(pull, tuple(first), tuple(second))[1], rows[1])


def test_second_derivatives(name: str) -> None:
    """Right by transforms, and where streams are only expanded or averaged without them too."""
    function, operands = FUNCTIONS[name][0], operands_of(name)
    first = operands[0]

    def total(first: Tensor) -> Tensor:
        return torch.stack([t.sin().sum() for t in flat(function(first, *operands[1:]))]).sum()

    def gradient(first: Tensor) -> Tensor:
        leaf = first.detach().clone().requires_grad_()
        return torch.autograd.grad(total(leaf), leaf)[0]

    direction, step = torch.randn_like(first), 1e-5
    ahead, behind = gradient(first + step * direction), gradient(first - step * direction)
    differences = (ahead - behind) / (2 * step)
    curved = torch.tensordot(hessian(total)(first), direction, first.dim())
    torch.testing.assert_close(curved, differences, rtol=1e-6, atol=1e-6)
    assert_same(jvp(grad(total), (first,), (direction,))[1], curved)
    assert_same(grad(lambda x: (grad(total)(x) * direction).sum())(first), curved)
    if name in ("expand_streams", "mean_streams"):
        leaf = first.clone().requires_grad_()
        (once,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
        assert_same(torch.autograd.grad(once, leaf, direction)[0], curved)
    outer = first.clone().requires_grad_()
    (through,) = torch.autograd.grad((grad(total)(outer) * direction).sum(), outer)
    assert_same(through, curved)


def test_an_ordinary_second_derivative_is_refused(name: str) -> None:
    """Of every result by every operand, also where what comes back to it is a constant."""
    if name in ("expand_streams", "mean_streams"):
        return
    function = FUNCTIONS[name][0]
    leaves = [t.requires_grad_() for t in operands_of(name)]
    results = flat(function(*leaves))
    for weigh in (Tensor.sum, lambda t: t.sin().sum()):
        for result in results:
            gradients = torch.autograd.grad(
                weigh(result), leaves, create_graph=True, allow_unused=True
            )
            for gradient in gradients:
                if gradient is None:  # not an operand of this result
                    continue
                with pytest.raises(RuntimeError, match="no autograd formula was registered"):
                    torch.autograd.grad(gradient.sum(), leaves, retain_graph=True)


def test_an_operator_called_by_its_name_drops_no_tangent() -> None:
    operators = torch.ops.mhc_lightning
    streams, output, residual, post = operands_of("merge_streams")
    x, phi, alpha, bias = operands_of("read_streams")
    rule = ("sinkhorn", 20, 1e-20)
    calls: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "sinkhorn_knopp": (lambda t: operators.sinkhorn_knopp(t, 20), residual),
        "mean_streams": (operators.mean_streams, streams),
        "sum_streams": (operators.sum_streams, streams),
        "aggregate_streams": (lambda t: operators.aggregate_streams(t, post), streams),
        "merge_streams": (lambda t: operators.merge_streams(t, output, residual, post), streams),
        "read_streams": (
            lambda t: operators.read_streams(t, phi, alpha, bias, None, *rule, True)[0],
            x,
        ),
        "merge_and_read": (
            lambda t: operators.merge_and_read(
                t, output, residual, post, phi, alpha, bias, None, *rule
            )[0],
            streams,
        ),
    }
    for called, (function, operand) in calls.items():
        message = f"torch.ops.mhc_lightning.{called} has no forward-mode derivative"
        with pytest.raises(NotImplementedError, match=message):
            jvp(function, (operand,), (operand,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
            function(forward_ad.make_dual(operand, operand))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    streams, output = randn(6, TOKENS, N, WIDTH).to(dtype), randn(6, TOKENS, WIDTH).to(dtype)
    phi, alpha, bias = (randn(*SHAPES[k]) for k in ("phi", "alpha", "bias"))

    def connect(streams: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        kept, u, mappings = read_streams(streams, phi, alpha, bias)
        merged = merge_streams(kept, output, mappings.residual, mappings.post)
        return u, merged, mean_streams(merged), *mappings

    ours, expected = vmap(connect)(streams, output), connect(streams, output)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(vmap(connect)(streams, output), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sinkhorn_knopp", "read_streams"])
def test_linearize(name: str) -> None:
    function, operands = FUNCTIONS[name][0], operands_of(name)
    tangents = tuple(torch.randn_like(t) for t in operands)
    values, moving = jvp(function, tuple(operands), tangents)[:2]
    ours, pushed = linearize(function, *operands)
    assert_same(flat(ours), flat(values))
    assert_same(flat(pushed(*tangents)), flat(moving))


@pytest.mark.slow
def test_transforms_compile() -> None:
    streams, output, residual, post = operands_of("merge_streams", 4)

    def total(streams: Tensor, output: Tensor, residual: Tensor, post: Tensor) -> Tensor:
        merged = merge_streams(streams, output, sinkhorn_knopp(residual, 3), post)
        return merged.sin().sum()

    given = (streams, output, residual, post)
    for function in (
        vmap(grad(total, (0, 1, 2, 3))),
        lambda *tensors: jvp(total, tensors, tensors),
        lambda *tensors: torch.autograd.grad(
            total(*(t.requires_grad_() for t in tensors)), tensors
        ),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager")
        assert_same(compiled(*(t.detach().clone() for t in given)), function(*given))
