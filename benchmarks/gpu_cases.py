"""Part `correctness`, the matrix: every operation on every kind of operand, against float64."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_lightning.kernels import (
    aggregate_streams,
    expand_streams,
    mean_streams,
    merge_and_read,
    merge_streams,
    read_hyper_streams,
    read_streams,
    sinkhorn_knopp,
    stream_mappings,
)
from timing import kernels

# Of max|a - b| / max|b|, by the dtype of the streams.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
LAYOUTS = ("contiguous", "transposed", "every other", "expanded")


class Case(NamedTuple):
    """Operands to try all operations on.

    Attributes:
        n: Number of streams.
        width: C.
        tokens: T.
        dtype: Of the streams, by name.
        layout: How the streams and the gradients that come back lie in memory; of `LAYOUTS`.
        scale: Standard deviation of the streams.
        logits: What the static part of the residual mapping is uniform in, both ways; 0: normal.
    """

    n: int
    width: int
    tokens: int
    dtype: str
    layout: str = "contiguous"
    scale: float = 1.0
    logits: float = 0.0


def matrix() -> Iterator[Case]:
    """All cases: n from 1 to 8 in every dtype, odd sizes, no tokens, strides, scales, logits."""
    for width in (1280, 2560, 4096, 7168):
        yield Case(4, width, 257, "bfloat16")
    for n, dtype in itertools.product((4, 2, 8, 1, 3, 5, 6, 7), ("bfloat16", "float32", "float16")):
        yield Case(n, 256, 37, dtype)
        yield Case(n, 256, 0, dtype)
        yield Case(n, 257, 1, dtype, "every other", 1e-3)
        yield Case(n, 100, 131, dtype, "transposed", 1e3)
        yield Case(n, 64, 33, dtype, "expanded")
        yield Case(n, 64, 70, dtype, logits=80.0)
    yield Case(4, 2560, 4099, "bfloat16")
    yield Case(4, 2560, 4099, "float32")
    yield Case(4, 1000, 1500, "bfloat16", "transposed", 1e-3)


def toy_matrix() -> Iterator[Case]:
    """A few cases for the interpreter."""
    yield Case(2, 20, 3, "float32", "transposed")
    yield Case(3, 16, 3, "bfloat16", "expanded", 1e-3)
    yield Case(4, 16, 0, "float16")
    yield Case(3, 16, 20, "float32", logits=80.0)


OPERATIONS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "aggregate": (("x", "pre"), aggregate_streams),
    "merge": (("x", "y", "residual", "post"), merge_streams),
    "mean": (("x",), mean_streams),
    "expand": (("y", "n"), expand_streams),
    "mappings": (("x", "phi", "alpha", "bias"), stream_mappings),
    "read": (("x", "phi", "alpha", "bias"), read_streams),
    "read_hyper": (("x", "phi_1", "alpha_1", "bias_1"), read_hyper_streams),
    "read_linear": (("x", "phi_1", "alpha_1", "bias_1", "linear"), read_hyper_streams),
    "seam": (("x", "y", "residual", "post", "phi", "alpha", "bias"), merge_and_read),
    "single_pass": (
        ("x", "y", "residual", "post", "phi", "alpha", "bias", "pre"),
        merge_and_read,
    ),
    "sinkhorn": (("logits",), sinkhorn_knopp),
}


def check_case(case: Case, device: str) -> list[dict[str, Any]]:
    """Run every operation, forward and backward, twice, and compare with float64.

    Args:
        case: The operands.
        device: Where to run.

    Returns:
        For each operation its largest error (relative to the largest entry of the same tensor),
        the limit, the tensor with the error, and whether the gradients were the same bits twice.
        Beyond the limit it passes only if plain torch, in the same dtype, errs half as much or more
        (``as_torch``).
    """
    rows = []
    for name in OPERATIONS:
        row = {**case._asdict(), "operation": name}
        try:
            row |= _check(name, case, device)
        except Exception as error:  # a kernel that does not even run is a finding
            row |= {"passed": False, "error": " ".join(f"{type(error).__name__}: {error}".split())}
        rows.append(row)
    return rows


def _check(name: str, case: Case, device: str) -> dict[str, Any]:
    given = operands(case, device)
    names, function = OPERATIONS[name]
    expected = _run(function, [_widened(given[key]) for key in names], case.layout, names)
    with kernels("triton"):
        ours = _run(function, [given[key] for key in names], case.layout, names)
        again = _run(function, [given[key] for key in names], case.layout, names)
    limit = LIMITS[torch.float32 if name == "sinkhorn" else getattr(torch, case.dtype)]
    errors = {key: _error(ours[key], expected[key]) for key in expected}
    worst = max(errors, key=lambda key: errors[key])
    same = all(torch.equal(ours[key], again[key]) for key in ours)
    within = errors[worst] <= limit
    row = {"error_found": errors[worst], "limit": limit, "tensor": worst, "same_bits": same}
    if not within:  # a sum that cancels is beyond any such limit: plain torch then shows the same
        with kernels("torch"):
            plain = _run(function, [given[key] for key in names], case.layout, names)
        row["error_of_torch"] = _error(plain[worst], expected[worst])
        row["as_torch"] = all(
            errors[key] <= max(limit, 2 * _error(plain[key], expected[key])) for key in errors
        )
    return {"passed": same and (within or row["as_torch"]), **row}


def operands(case: Case, device: str) -> dict[str, Any]:
    """Everything the operations take, by name; the same numbers for each call with a case."""
    generator = torch.Generator().manual_seed(hash(case[:3]) % 2**31)
    n, width, tokens = case[:3]
    dtype, count = getattr(torch, case.dtype), n * n + 2 * n

    def normal(*shape: int, scale: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, kind)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    bias = normal(count)
    logits = normal(tokens, n, n)
    if case.logits:
        bias[2 * n :] = (2 * uniform(n * n) - 1) * case.logits
        logits = (2 * uniform(tokens, n, n) - 1) * case.logits
    return {
        "n": n,
        "linear": False,
        "x": laid_out(case.layout, normal(tokens, n, width, scale=case.scale, kind=dtype)),
        "y": normal(tokens, width, scale=case.scale, kind=dtype),
        "pre": uniform(tokens, n),
        "post": 2 * uniform(tokens, n),
        "residual": 2 * uniform(tokens, n, n) / n,
        "phi": normal(n * width, count, scale=2 * (n * width) ** -0.5),
        "alpha": uniform(3) + 0.5,
        "bias": bias,
        "phi_1": normal(width, n + 2, scale=2 * width**-0.5),
        "alpha_1": uniform(2) + 0.5,
        "bias_1": normal(count),
        "logits": logits,
    }


def laid_out(layout: str, tensor: Tensor) -> Tensor:
    """A tensor of this shape whose last axis has a stride, or whose streams are all the first."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "every other":
        return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
    if layout == "expanded" and tensor.dim() == 3 and tensor.shape[1] != tensor.shape[2]:
        return tensor[:, :1].expand(tensor.shape)
    return tensor


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _run(
    function: Callable[..., Any], arguments: list[Any], layout: str, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """Values, and gradients for upstream gradients that depend on the shapes alone."""
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    value = function(*leaves)
    outputs = list(_flat(value))
    generator = torch.Generator().manual_seed(1)
    # Rounded, so that every dtype is given the same numbers.
    upstream = [torch.randn(o.shape, generator=generator).bfloat16() for o in outputs]
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    grads = torch.autograd.grad(
        outputs,
        inputs,
        [laid_out(layout, u.to(o.device, o.dtype)) for u, o in zip(upstream, outputs, strict=True)],
    )
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    tensors = [name for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)]
    return found | {f"gradient of {k}": g for k, g in zip(tensors, grads, strict=True)}


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _flat(item)


def _error(ours: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|; infinite for what is not a number, 0 for nothing."""
    if expected.numel() == 0:
        return 0.0
    error = (ours.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return float(error) if bool(error.isfinite()) else float("inf")
