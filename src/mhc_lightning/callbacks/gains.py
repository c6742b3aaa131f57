"""Amax gain: how much a stack of residual mappings can amplify signals and gradients.

arXiv 2512.24880, section 3 and figure 3. The forward gain of a matrix is its largest absolute row
sum, the backward gain its largest absolute column sum (the absolute value of the signed sum).
`new = H @ streams` gives output stream i the sum of row i when all streams are alike, and returns
to input stream j the sum of column j. The composite gain at sub-layer l takes, forward, the
product H_l ··· H_1 and, backward, H_L ··· H_l. Row sums of a product follow from matrix times
vector alone: v_l = H_l v_{l-1} from a vector of ones, and backward wᵀ_l = wᵀ_{l+1} H_l.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

GAIN_TAGS = (
    "amax_gain/single/forward",
    "amax_gain/single/backward",
    "amax_gain/composite/forward",
    "amax_gain/composite/backward",
)


def chains(
    residuals: Sequence[Tensor], after: Sequence[int | None] | None = None
) -> list[list[int]]:
    """The chains of sub-layers whose matrices can be multiplied, each from its first to its last.

    A model may change its number of streams, or of tokens, from stage to stage; products exist
    only within a stage. Where the streams of one sub-layer go to several, as from a trunk to two
    branches, one chain leads to the end of each branch.

    Args:
        residuals: Per sub-layer its matrices [..., n, n].
        after: Per sub-layer the index, in `residuals`, of the sub-layer whose output it reads; None
            where a chain begins. By default each sub-layer reads the one before it.
    """
    if after is None:
        after = [k - 1 if k else None for k in range(len(residuals))]
    before = [
        j if j is not None and residuals[j].shape == r.shape else None
        for j, r in zip(after, residuals, strict=True)
    ]
    all_chains = []
    for last in sorted(set(range(len(residuals))) - set(before)):
        chain: list[int] = []
        k: int | None = last
        while k is not None:
            chain.append(k)
            k = before[k]
        all_chains.append(chain[::-1])
    return sorted(all_chains)


def tokens_last(residual: Tensor) -> Tensor:
    """[..., n, n] to [n, n, tokens] in at least float32, so that sums over streams vectorise."""
    n = residual.shape[-1]
    dtype = torch.promote_types(residual.dtype, torch.float32)
    return residual.to(dtype).reshape(-1, n, n).permute(1, 2, 0).contiguous()


def amax_gains(
    residuals: Sequence[Tensor],
    after: Sequence[int | None] | None = None,
    *,
    token_mean: bool = False,
) -> Tensor:
    """The four gains of every sub-layer; O(L n²) per token, without a single matrix product.

    Args:
        residuals: Per sub-layer, in the order of the calls, its matrices [..., n, n], of one token
            or more.
        after: The predecessor of each sub-layer, as in `chains`. Composites are taken along chains;
            for a sub-layer in several chains the largest counts.
        token_mean: False takes the gain of each token's matrix and averages over tokens; True
            takes the gain of the matrix averaged over tokens.

    Returns:
        [4, L], in the order of `GAIN_TAGS`, on the device of the matrices.
    """

    def gain(sums: Tensor) -> Tensor:  # [n, tokens] signed sums
        return sums.mean(1).abs().amax() if token_mean else sums.abs().amax(0).mean()

    gains: dict[int, Tensor] = {}  # [4] each
    for chain in chains(residuals, after):
        matrices = [tokens_last(residuals[k]) for k in chain]
        ones = torch.ones_like(matrices[0][0])  # [n, tokens]
        forward, backward = ones, ones
        rows: list[list[Tensor]] = [[], [], [], []]
        for matrix in matrices:
            forward = (matrix * forward).sum(1)  # Σ_j H[i, j] v[j]
            for row, sums in zip(rows, (matrix.sum(1), matrix.sum(0), forward), strict=False):
                row.append(gain(sums))
        for matrix in reversed(matrices):
            backward = (matrix * backward.unsqueeze(1)).sum(0)  # Σ_i w[i] H[i, j]
            rows[3].insert(0, gain(backward))
        for k, *four in zip(chain, *rows, strict=True):
            in_chain = torch.stack(four)
            gains[k] = torch.maximum(gains[k], in_chain) if k in gains else in_chain
    return torch.stack([gains[k] for k in range(len(residuals))], dim=1)


def mean_products(residuals: Sequence[Tensor], spans: Sequence[Sequence[int]]) -> list[Tensor]:
    """Token means of the per-token products H_b ··· H_a of some spans of sub-layers.

    Args:
        residuals: Per sub-layer its matrices [..., n, n].
        spans: Sub-layers a, …, b of each product, all of one shape.

    Returns:
        For every span a matrix [n, n].
    """
    means = []
    for span in spans:
        dtype = torch.promote_types(residuals[span[0]].dtype, torch.float32)
        product = residuals[span[0]].to(dtype)
        for k in span[1:]:
            product = residuals[k].to(dtype) @ product
        means.append(product.reshape(-1, *product.shape[-2:]).mean(0))
    return means
