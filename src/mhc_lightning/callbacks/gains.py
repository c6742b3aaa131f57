"""Amax gain: how much a stack of residual mappings can amplify signals and gradients.

arXiv 2512.24880, section 3 and figure 3. The forward gain of a matrix is its largest absolute row
sum, the backward gain its largest absolute column sum (the absolute value of the signed sum).
``new = H @ streams`` gives output stream i the sum of row i when all streams are alike, and hands
back to input stream j the sum of column j. The composite gain at sub-layer l takes, forward, the
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


def chains(residuals: Sequence[Tensor]) -> list[range]:
    """Split sub-layers where the shape changes, into runs whose matrices can be multiplied.

    A model may change its number of streams, or of tokens, from stage to stage; products exist
    only within a stage.
    """
    starts = [k for k, r in enumerate(residuals) if k == 0 or r.shape != residuals[k - 1].shape]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(residuals)], strict=True)]


def tokens_last(residual: Tensor) -> Tensor:
    """[..., n, n] to [n, n, tokens] in at least float32, so that sums over streams vectorise."""
    n = residual.shape[-1]
    dtype = torch.promote_types(residual.dtype, torch.float32)
    return residual.to(dtype).reshape(-1, n, n).permute(1, 2, 0).contiguous()


def amax_gains(residuals: Sequence[Tensor], *, token_mean: bool = False) -> Tensor:
    """The four gains of every sub-layer; O(L n²) per token, without a single matrix product.

    Args:
        residuals: Per sub-layer, in the order of the calls, its matrices [..., n, n]. Composites
            start anew where the shape changes (see `chains`).
        token_mean: False takes the gain of each token's matrix and averages over tokens, True
            the gain of the matrix averaged over tokens.

    Returns:
        [4, L], in the order of `GAIN_TAGS`, on the device of the matrices.
    """

    def gain(sums: Tensor) -> Tensor:  # [n, tokens] signed sums
        return sums.mean(1).abs().amax() if token_mean else sums.abs().amax(0).mean()

    rows: list[list[Tensor]] = [[], [], [], []]
    single_forward, single_backward, composite_forward, composite_backward = rows
    for chain in chains(residuals):
        matrices = [tokens_last(residuals[k]) for k in chain]
        ones = torch.ones_like(matrices[0][0])  # [n, tokens]
        forward, backward = ones, ones
        for matrix in matrices:
            single_forward.append(gain(matrix.sum(1)))
            single_backward.append(gain(matrix.sum(0)))
            forward = (matrix * forward).sum(1)  # Σ_j H[i, j] v[j]
            composite_forward.append(gain(forward))
        from_the_end = []
        for matrix in reversed(matrices):
            backward = (matrix * backward.unsqueeze(1)).sum(0)  # Σ_i w[i] H[i, j]
            from_the_end.append(gain(backward))
        composite_backward.extend(reversed(from_the_end))
    return torch.stack([torch.stack(row) for row in rows])


def mean_products(residuals: Sequence[Tensor], spans: Sequence[range]) -> list[Tensor]:
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
