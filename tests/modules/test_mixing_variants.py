"""mHC's variants against their formulas in numpy, and what each guarantees of its matrices."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from mhc_lightning.callbacks.gains import amax_gains
from mhc_lightning.errors import UserError
from mhc_lightning.modules import (
    GatedHyperConnection,
    IdentityHyperConnection,
    KroneckerHyperConnection,
    ManifoldHyperConnection,
    PermutationHyperConnection,
    permutations,
)

EXACT = [PermutationHyperConnection, KroneckerHyperConnection, IdentityHyperConnection]
# The factors of n whose permutations are mixed.
FACTORS: dict[tuple[type[GatedHyperConnection], int], list[int]] = {
    **{(PermutationHyperConnection, n): [n] for n in (1, 2, 3, 4)},
    **{(IdentityHyperConnection, n): [] for n in (1, 4, 5)},
    (KroneckerHyperConnection, 1): [],
    (KroneckerHyperConnection, 2): [2],
    (KroneckerHyperConnection, 3): [3],
    (KroneckerHyperConnection, 4): [2, 2],
    (KroneckerHyperConnection, 6): [2, 3],
    (KroneckerHyperConnection, 8): [2, 2, 2],
}
CASES = [(build, n) for build, n in FACTORS]


def scrambled(build: type, dim: int, n: int, scale: float = 1.0) -> GatedHyperConnection:
    """A connection whose parameters all have an effect."""
    connection = build(dim, n, 1)
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return connection


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def residual_by_loops(logits: np.ndarray, n: int, factors: list[int]) -> np.ndarray:
    """Kronecker product of Σ_m a_m P_m, a factor at a time; the identity where there is none."""
    matrix: np.ndarray = np.eye(1 if factors else n)
    for size in factors:
        own, logits = np.split(logits, [math.factorial(size)])
        convex = np.zeros((size, size))
        for weight, order in zip(softmax(own), itertools.permutations(range(size)), strict=True):
            for i, j in enumerate(order):
                convex[i, j] += weight
        matrix = np.kron(matrix, convex)
    assert logits.size == 0
    return matrix


@pytest.mark.parametrize(("build", "n"), CASES)
def test_mappings_are_the_formulas(build: type, n: int) -> None:
    """Eqs. 7 and 8 of arXiv 2512.24880, with the variant's own matrix (facts E4, E5, E6)."""
    connection = scrambled(build, 5, n).double()
    streams = torch.randn(3, n, 5, dtype=torch.float64)
    actual = connection.mappings(streams)
    phi, alpha, bias = (p.detach().numpy() for p in connection.parameters())
    for token in range(3):
        x = streams[token].numpy().flatten()
        products = x / np.sqrt((x**2).mean() + 1e-20) @ phi
        pre, post, logits = (
            gate * product + shift
            for gate, product, shift in zip(
                alpha,
                np.split(products, [n, 2 * n]),
                np.split(bias, [n, 2 * n]),
                strict=True,
            )
        )
        expected = (
            1 / (1 + np.exp(-pre)),
            2 / (1 + np.exp(-post)),
            residual_by_loops(logits, n, FACTORS[build, n]),
        )
        for mapping, reference in zip(actual, expected, strict=True):
            assert np.abs(mapping[token].detach().numpy() - reference).max() < 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("build", "n"), CASES)
def test_matrices_are_doubly_stochastic(
    build: type, n: int, dtype: torch.dtype, limit: float
) -> None:
    """Rows and columns, for logits of any size, and where autocast would round."""
    for scale in (0.1, 3.0, 100.0):
        connection = scrambled(build, 8, n, scale).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            residual = connection.mappings(torch.randn(64, n, 8, dtype=dtype)).residual
        assert residual.dtype == dtype
        assert (residual >= 0).all()
        assert (residual.sum(-1) - 1).abs().max() < limit
        assert (residual.sum(-2) - 1).abs().max() < limit


@pytest.mark.parametrize("build", EXACT)
def test_gains_of_a_deep_stack(build: type) -> None:
    """Composite gains stay one in both directions; with the identity to the last bit."""
    residuals = [
        scrambled(build, 16, 4, 3.0).mappings(torch.randn(16, 4, 16)).residual.detach()
        for _ in range(40)
    ]
    gains = amax_gains(residuals)
    assert (gains - 1).abs().max() <= (0 if build is IdentityHyperConnection else 1e-5)


@pytest.mark.parametrize(
    ("build", "n"),
    [(PermutationHyperConnection, 3), (KroneckerHyperConnection, 4), (IdentityHyperConnection, 4)],
)
def test_gradients(build: type, n: int) -> None:
    """Of a whole connection, its sub-layer included, against finite differences."""
    connection = scrambled(build, 3, n).double()
    streams = torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in connection.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(connection, given, (x, torch.tanh))

    assert torch.autograd.gradcheck(run, (streams, *connection.parameters()))


def test_parameter_counts() -> None:
    """K·nC + K + 3 a sub-layer; with a norm weight of nC, the totals that KromHC's paper gives."""
    dim, n, sub_layers = 768, 4, 24
    published = {
        KroneckerHyperConnection: (12, 958_824),
        ManifoldHyperConnection: (24, 1_843_848),
        PermutationHyperConnection: (32, 2_433_864),
        IdentityHyperConnection: (8, None),
    }
    for build, (k, total) in published.items():
        own = sum(p.numel() for p in build(dim, n, 0).parameters())
        assert own == k * n * dim + k + 3
        assert total is None or sub_layers * (own + n * dim) == total


@pytest.mark.parametrize(("build", "n"), CASES)
def test_mixing_starts_near_the_identity(build: type, n: int) -> None:
    residual = build(8, n, 0).mappings(torch.randn(1, n, 8)).residual[0]
    assert (residual.diagonal() > 0.99).all()
    if build is not IdentityHyperConnection:
        assert (residual > 0).all(), "every entry can grow"


def test_a_model_that_was_first_used_for_inference_can_be_trained() -> None:
    permutations._cached.clear()
    connection = scrambled(PermutationHyperConnection, 8, 3).double()
    streams = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.inference_mode():
        expected = connection(streams, torch.sin)
    actual = connection(streams, torch.sin)
    assert torch.equal(actual, expected)
    actual.sum().backward()


TRACES: dict[str, Callable[[Callable, Tensor], object]] = {
    "export": lambda run, streams: torch.export.export(
        _Called(run), (streams,), dynamic_shapes=({0: torch.export.Dim("tokens")},)
    ),
    "make_fx": lambda run, streams: make_fx(run)(streams),
    "functionalize": lambda run, streams: functionalize(run)(streams),
    "vmap": lambda run, streams: vmap(run)(streams),
    "grad": lambda run, streams: grad(lambda x: run(x).sum())(streams),
    "fake tensors": lambda run, streams: _run_on_fake_tensors(run, streams),
    "compile": lambda run, streams: torch.compile(run, backend="aot_eager")(streams),
}


class _Called(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, streams: Tensor) -> Tensor:
        return self.run(streams)


def _run_on_fake_tensors(run: Callable[[Tensor], Tensor], streams: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        run(mode.from_tensor(streams))


@pytest.mark.parametrize(
    ("build", "trace"),
    [
        *((PermutationHyperConnection, trace) for trace in TRACES),
        (KroneckerHyperConnection, "export"),
    ],
)
def test_a_connection_that_was_first_traced_works_on(build: type, trace: str) -> None:
    """And one that is traced after it worked: no tensor that a tracer made is kept."""
    connection = scrambled(build, 8, 4)
    streams = torch.randn(2, 4, 8)
    expected = connection(streams, torch.sin)

    def run(streams: Tensor) -> Tensor:
        return connection(streams, torch.sin)

    TRACES[trace](run, streams)
    permutations._cached.clear()
    TRACES[trace](run, streams)
    actual = run(streams)
    assert type(actual) is Tensor
    assert torch.equal(actual, expected)
    actual.sum().backward()
    kept = list(permutations._cached.values())
    assert kept
    assert all(type(tensor) is Tensor and not tensor.is_inference() for tensor in kept)


@pytest.mark.parametrize(
    ("build", "n", "message"),
    [
        (PermutationHyperConnection, 5, r"num_streams is at most 4, not 5; connection=krom takes"),
        (KroneckerHyperConnection, 20, r"num_streams=20 has the factor 5; it has to be a product"),
    ],
)
def test_numbers_of_streams_that_are_not_taken(build: type, n: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(8, n, 0)
