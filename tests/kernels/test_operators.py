"""The operators as torch sees them, on all backends: registration, autograd, compilation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import assert_close_to_float64, randn
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mhc_lightning.errors import UserError
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

N, WIDTH = 3, 20
K = N * N + 2 * N


@pytest.fixture(params=["torch", "triton", "compiled"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(backend.VARIABLE, request.param)
    return request.param


def operands(tokens: int = 5) -> dict[str, Any]:
    """Tensors; to be unpacked as arguments that others follow, no `dict[str, Tensor]`."""
    torch.manual_seed(0)
    return {
        "streams": randn(tokens, N, WIDTH),
        "output": randn(tokens, WIDTH),
        "residual": torch.rand(tokens, N, N),
        "post": torch.rand(tokens, N),
        "phi": randn(N * WIDTH, K, scale=0.3),
        "alpha": torch.rand(3) + 0.5,
        "bias": randn(K),
        "carry": torch.rand(tokens, N),
    }


def connection_step(
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None = None,
    *,
    steps: int = 1,
    mix: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Merge and read, in one step, in two, or in three if there is a carry."""
    if steps == 1:
        new, read, mappings = merge_and_read(
            streams, output, residual, post, phi, alpha, bias, carry, mix=mix
        )
    else:
        merged = merge_streams(streams, output, residual, post)
        given = carry if steps == 2 else None
        new, read, mappings = read_streams(merged, phi, alpha, bias, carry=given, mix=mix)
        if carry is not None and given is None:
            read = aggregate_streams(new, carry)
    return new, read, *mappings


def mix_any(logits: Tensor) -> Tensor:
    """Some matrices [..., 3, 3] of logits [..., m], however many there are."""
    m = logits.shape[-1]
    weighted = (logits * torch.linspace(-1, 1, m, dtype=logits.dtype)).sum(-1) / (m + 1)
    return (weighted[..., None, None] + torch.eye(N, dtype=logits.dtype)).tanh()


# Logits of a token: fewer than mHC has, none, as many as a kernel takes, and too many for one.
MIXES = {f"mix of {m}": m for m in (5, 0, 26, 40)}


@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("rule", ["sinkhorn", *MIXES])
def test_the_seam_against_float64(rule: str, steps: int, single_pass: bool) -> None:
    given = operands()
    if not single_pass:
        given.pop("carry")
    mix = None if rule == "sinkhorn" else mix_any
    if mix is not None:
        count = 2 * N + MIXES[rule]
        given["phi"], given["bias"] = randn(N * WIDTH, count, scale=0.3), randn(count)
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
    doubles = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    actual = connection_step(**leaves, steps=steps, mix=mix)
    expected = connection_step(**doubles, steps=3, mix=mix)
    weights = [torch.randn_like(t) for t in expected]
    for a, b in zip(actual, expected, strict=True):
        assert_close_to_float64(a.detach(), b.detach())
    ours = torch.autograd.grad(actual, list(leaves.values()), [w.float() for w in weights])
    reference = torch.autograd.grad(expected, list(doubles.values()), weights)
    for a, b in zip(ours, reference, strict=True):
        assert_close_to_float64(a, b)


@pytest.mark.parametrize("output_index", range(5))
def test_each_output_of_the_seam_alone(output_index: int) -> None:
    leaves = {name: t.requires_grad_() for name, t in operands().items() if name != "carry"}
    doubles = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    actual = connection_step(**leaves)[output_index].square().sum()
    expected = connection_step(**doubles, steps=3)[output_index].square().sum()
    ours = torch.autograd.grad(actual, list(leaves.values()), allow_unused=True)
    reference = torch.autograd.grad(
        expected, list(doubles.values()), allow_unused=True, materialize_grads=True
    )
    for a, b in zip(ours, reference, strict=True):
        assert_close_to_float64(torch.zeros_like(b).float() if a is None else a, b)


def calls() -> dict[str, tuple[Any, tuple]]:
    o = {name: t.requires_grad_() for name, t in operands().items()}
    parameters = (o["phi"], o["alpha"], o["bias"])
    rule = ("sinkhorn", 20, 1e-20)
    ops = torch.ops.mhc_lightning
    detached = [t.detach() for t in parameters]
    x, pre = o["streams"].detach(), o["carry"].detach()
    _, *_, raw, inverse = ops.read_streams(x, *detached, None, *rule, True)
    wide, narrow = torch.randn_like(x), torch.randn(5, WIDTH)
    merge = (o["streams"], o["output"], o["residual"], o["post"])
    plain_merge = tuple(t.detach() for t in merge)
    hyper = (detached[0][:WIDTH, : N + 2], detached[1][:2], detached[2])
    kept = (None, x, pre, raw, inverse)
    gates = ("gates", 1, 1e-20)
    few = (o["phi"][:, : 2 * N + 2].contiguous(), o["alpha"], o["bias"][: 2 * N + 2])
    plain_few, logits_grad = [t.detach() for t in few], torch.randn(5, 2)
    kept_of_few = (None, x, pre, raw[: 2 * N + 2].contiguous(), inverse)
    return {
        "aggregate": (ops.aggregate_streams, (o["streams"], o["carry"])),
        "aggregate_backward": (ops.aggregate_streams_backward, (narrow, x, pre, True, False)),
        "merge": (ops.merge_streams, merge),
        "merge_backward": (ops.merge_streams_backward, (wide, *plain_merge, True, True, True)),
        "mean": (ops.mean_streams, (o["streams"],)),
        "sum": (ops.sum_streams, (x,)),
        "read": (ops.read_streams, (x, *detached, None, *rule, True)),
        "read_with_carry": (ops.read_streams, (x, *detached, pre, *rule, True)),
        "mappings": (ops.read_streams, (x, *detached, None, *rule, False)),
        "hyper": (ops.read_streams, (x, *hyper, None, "tanh", 1, 1e-20, True)),
        "read_backward": (
            ops.read_streams_backward,
            (
                x,
                *detached,
                None,
                *kept[2:],
                wide,
                narrow,
                pre,
                None,
                None,
                *rule,
                True,
                True,
                False,
            ),
        ),
        "read_with_carry_backward": (
            ops.read_streams_backward,
            (x, *detached, pre, *kept[2:], wide, narrow, pre, None, None, *rule, True, True, True),
        ),
        "gates": (ops.read_streams, (x, *plain_few, None, *gates, True)),
        "gates_backward": (
            ops.read_streams_backward,
            (
                *(x, *plain_few, None, *kept_of_few[2:], wide, narrow, pre, None, logits_grad),
                *(*gates, True, True, False),
            ),
        ),
        "seam": (ops.merge_and_read, (*merge, *parameters, None, *rule)),
        "gates_seam": (ops.merge_and_read, (*merge, *few, None, *gates)),
        "single_pass": (ops.merge_and_read, (*merge, *parameters, o["carry"], *rule)),
        "seam_backward": (
            ops.merge_and_read_backward,
            (*plain_merge, *detached, *kept, wide, narrow, None, pre, None, *rule),
        ),
        "gates_seam_backward": (
            ops.merge_and_read_backward,
            (*plain_merge, *plain_few, *kept_of_few, wide, narrow, None, pre, logits_grad, *gates),
        ),
    }


@pytest.mark.parametrize("name", sorted(calls()))
def test_registration(name: str, kernels: str) -> None:
    operator, arguments = calls()[name]
    if kernels == "torch":
        torch.library.opcheck(operator.default, arguments)
    else:  # autograd and tracing see no results but those of the shape function
        torch.library.opcheck(
            operator.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


# To a compiler an operator is the same on all backends, but for the strides of its results.
@pytest.mark.parametrize(
    ("kernels", "read"),
    [
        ("triton", read_streams),
        ("torch", read_hyper_streams),
        ("torch", partial(read_streams, mix=mix_any)),
    ],
    indirect=["kernels"],
)
def test_compiles_without_a_break_and_agrees(read: Callable) -> None:
    """Gradients of ordinary and of large size: compiled and eager ones are the same numbers."""
    o = operands()
    mix = mix_any if isinstance(read, partial) else None
    # Code that is generated between the operators once: it takes long.
    generates = read is read_streams
    compiled = torch.compile(backend="inductor" if generates else "aot_eager", fullgraph=True)
    if read is read_hyper_streams:
        o["phi"], o["alpha"] = o["phi"][:WIDTH, : N + 2].clone(), o["alpha"][:2].clone()

    def two_sub_layers(x: Tensor, output: Tensor, *parameters: Tensor) -> Tensor:
        streams, u, mappings = read(expand_streams(x, N), *parameters)
        if read is not read_hyper_streams:
            merge = (streams, u.tanh(), mappings.residual, mappings.post)
            phi, alpha, bias = parameters
            streams, u, mappings = merge_and_read(*merge, phi, alpha, bias, mix=mix)
        merged = merge_streams(streams, u * output, mappings.residual, mappings.post)
        return mean_streams(merged)

    for scale in (1.0, 1e4):
        results = []
        for function in (two_sub_layers, compiled(two_sub_layers)):
            leaves = [
                t.detach().clone().requires_grad_()
                for t in (o["output"], o["post"][:, :1] * scale, o["phi"], o["alpha"], o["bias"])
            ]
            value = function(*leaves)
            results.append((value.detach(), *torch.autograd.grad(value.sum(), leaves)))
        for eager, ours in zip(*results, strict=True):
            assert torch.allclose(eager, ours, rtol=1e-5, atol=1e-6 * scale)


def test_selective_checkpointing_names_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what merging returns, recompute the rest: the same gradients, and one merge."""
    o = {name: t.requires_grad_() for name, t in operands().items() if name != "carry"}
    counts = {"merge": 0, "read": 0}

    def policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator is torch.ops.mhc_lightning.merge_streams.default:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    plain = connection_step(**o, steps=3)[1].square().sum()
    for name in counts:
        kernels = backend.implementation(name, o["streams"])
        run = getattr(kernels, f"{name}_forward")

        def counted(*args: Any, name: str = name, run: Callable = run) -> Any:
            counts[name] += 1
            return run(*args)

        monkeypatch.setattr(kernels, f"{name}_forward", counted)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    saved = checkpoint(
        lambda: connection_step(**o, steps=3)[1].square().sum(),
        use_reentrant=False,
        context_fn=contexts,
    )
    expected = torch.autograd.grad(plain, list(o.values()))
    actual = torch.autograd.grad(saved, list(o.values()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert counts == {"merge": 1, "read": 2}


def test_frozen_parameters_and_streams_used_twice() -> None:
    o = {name: t for name, t in operands().items() if name != "carry"}
    x = o["streams"].requires_grad_()
    o["alpha"].requires_grad_()

    def twice(streams: Tensor, **others: Any) -> Tensor:
        new, read, *_ = connection_step(streams, **others)
        return (read * others["output"]).sum() + (new * streams).sum() + streams.square().sum()

    others = {name: t for name, t in o.items() if name != "streams"}
    ours = torch.autograd.grad(twice(x, **others), (x, o["alpha"]))
    doubles = {name: t.detach().double() for name, t in o.items()}
    x64, alpha = doubles.pop("streams").requires_grad_(), doubles["alpha"].requires_grad_()
    expected = torch.autograd.grad(twice(x64, **doubles), (x64, alpha))
    for a, b in zip(ours, expected, strict=True):
        assert_close_to_float64(a, b)


def test_an_empty_batch() -> None:
    o = {name: t.requires_grad_() for name, t in operands(tokens=0).items() if name != "carry"}
    new, read, *mappings = connection_step(**o)
    total = new.sum() + read.sum() + sum(m.sum() for m in mappings)
    grads = torch.autograd.grad(total, list(o.values()))
    assert [g.shape for g in grads] == [t.shape for t in o.values()]
    assert all(g.eq(0).all() for g in grads)
    assert sinkhorn_knopp(torch.empty(0, N, N)).shape == (0, N, N)


def test_gradients_are_the_same_bits_every_time() -> None:
    o = {name: t.requires_grad_() for name, t in operands(tokens=40).items() if name != "carry"}
    runs = []
    for _ in range(2):
        squares = [t.square().sum() for t in connection_step(**o)]
        runs.append(torch.autograd.grad(squares, list(o.values())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_wrong_choice_of_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(UserError, match="set it to auto, compiled, triton or torch"):
        sinkhorn_knopp(torch.zeros(2, 2))
    monkeypatch.setenv(backend.VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="streams are on cpu"):
        sinkhorn_knopp(torch.zeros(2, 2))
