"""Amax gains of given matrices, against explicit products and the paper's figures."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhc_lightning.callbacks.gains import amax_gains, chains, mean_products

# Fig. 8 of arXiv 2512.24880, printed there: token-averaged matrices of HC and mHC.
HC_60 = [
    [-5.58, -3.74, -5.71, -6.60],
    [-6.06, -2.27, -5.33, -6.57],
    [6.08, 3.12, 6.53, 6.77],
    [-6.41, -3.97, -5.72, -5.49],
]
MHC_1_TO_60 = [
    [0.24, 0.26, 0.23, 0.27],
    [0.23, 0.25, 0.26, 0.27],
    [0.21, 0.25, 0.27, 0.28],
    [0.21, 0.27, 0.24, 0.29],
]


def brute_force(residuals: list[Tensor], token_mean: bool) -> Tensor:
    """Definition A2 with explicit products, one token at a time."""
    tokens = [r.reshape(-1, *r.shape[-2:]) for r in residuals]
    depth = len(tokens)

    def gains(matrices: Tensor) -> tuple[Tensor, Tensor]:
        if token_mean:
            matrices = matrices.mean(0, keepdim=True)
        pairs = [
            (max(abs(sum(row)) for row in m.tolist()), max(abs(sum(c)) for c in m.T.tolist()))
            for m in matrices
        ]
        return tuple(torch.tensor(pairs, dtype=torch.float64).mean(0))

    def product(first: int, last: int) -> Tensor:  # H_last ··· H_first
        result = tokens[first]
        for k in range(first + 1, last + 1):
            result = tokens[k] @ result
        return result

    single = [gains(m) for m in tokens]
    return torch.stack(
        [
            torch.stack([g[0] for g in single]),
            torch.stack([g[1] for g in single]),
            torch.stack([gains(product(0, k))[0] for k in range(depth)]),
            torch.stack([gains(product(k, depth - 1))[1] for k in range(depth)]),
        ]
    )


@pytest.mark.parametrize("token_mean", [False, True])
@settings(deadline=None, max_examples=12)
@given(n=st.integers(1, 6), depth=st.integers(1, 7), seed=st.integers(0, 2**31 - 1))
def test_agrees_with_matrix_products(token_mean: bool, n: int, depth: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    residuals = [
        torch.randn(2, 3, n, n, generator=generator, dtype=torch.float64) for _ in range(depth)
    ]
    result = amax_gains(residuals, token_mean=token_mean)
    torch.testing.assert_close(result, brute_force(residuals, token_mean), rtol=1e-10, atol=1e-12)


def test_takes_the_absolute_value_of_the_signed_sum() -> None:
    matrix = torch.tensor([[3.0, -3.0], [-1.0, -1.0]])
    single_forward, single_backward, _, _ = amax_gains([matrix])
    assert single_forward.item() == 2.0  # |−1 − 1|, not 3 + 3
    assert single_backward.item() == 4.0  # |−3 − 1|


def test_averages_gains_over_tokens_unless_asked_for_the_mean_matrix() -> None:
    opposite = torch.tensor([[[2.0]], [[-2.0]]])
    assert amax_gains([opposite])[0].item() == 2.0
    assert amax_gains([opposite], token_mean=True)[0].item() == 0.0


def test_gains_of_the_matrices_in_figure_8() -> None:
    forward, backward, _, _ = amax_gains([torch.tensor(HC_60)])
    assert forward.item() == pytest.approx(22.50, abs=0.02)
    assert backward.item() == pytest.approx(11.97, abs=0.02)
    forward, backward, _, _ = amax_gains([torch.tensor(MHC_1_TO_60)])
    assert forward.item() == pytest.approx(1.01, abs=0.011)
    assert backward.item() == pytest.approx(1.11, abs=0.011)


def test_gains_of_the_composite_in_figure_8() -> None:
    # The figure prints the sums of HC's composite 1–60. A matrix with these sums, in two factors:
    rows = torch.tensor([-475.3, -462.8, 509.1, -498.5], dtype=torch.float64)
    columns = torch.tensor([-259.2, -219.1, -228.2, -221.0], dtype=torch.float64)
    first = torch.zeros(4, 4, dtype=torch.float64)
    first[0] = columns
    last = torch.zeros(4, 4, dtype=torch.float64)
    last[:, 0] = rows / columns.sum()
    _, _, forward, backward = amax_gains([first, last])
    assert forward[1].item() == pytest.approx(509.1, rel=1e-3)
    assert backward[0].item() == pytest.approx(259.2, rel=1e-3)


def test_keeps_float64_and_raises_lower_precision_to_float32() -> None:
    for given_dtype, result in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        assert amax_gains([torch.eye(2, dtype=given_dtype)]).dtype == result


def test_composites_start_anew_where_the_shape_changes() -> None:
    early = [torch.randn(6, 2, 2, dtype=torch.float64) for _ in range(2)]
    late = [torch.randn(3, 4, 4, dtype=torch.float64) for _ in range(3)]
    assert chains([*early, *late]) == [[0, 1], [2, 3, 4]]
    apart = torch.cat([amax_gains(early), amax_gains(late)], dim=1)
    torch.testing.assert_close(amax_gains([*early, *late]), apart)


def test_means_of_products_multiply_token_by_token() -> None:
    residuals = [torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(4)]
    whole, tail, one = mean_products(residuals, [range(4), range(2, 4), range(1, 2)])
    a, b, c, d = (r.reshape(6, 4, 4) for r in residuals)
    torch.testing.assert_close(
        whole, torch.stack([d[t] @ c[t] @ b[t] @ a[t] for t in range(6)]).mean(0)
    )
    torch.testing.assert_close(tail, torch.stack([d[t] @ c[t] for t in range(6)]).mean(0))
    torch.testing.assert_close(one, b.mean(0))
