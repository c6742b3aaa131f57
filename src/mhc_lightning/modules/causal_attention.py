"""Causal attention whose values may be narrower than its queries and keys.

Shapes: B batch, H heads, S sequence, D width of queries and keys, E width of values.
"""

import torch.nn.functional as F
from torch import Tensor


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention [B, H, S, E] of each position to itself and those before it.

    Args:
        query: [B, H, S, D].
        key: [B, H, S, D].
        value: [B, H, S, E], E at most D.
    """
    # Fused attention needs equal widths: values get zeros appended, which are cut off again.
    padded = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    mixed = F.scaled_dot_product_attention(query, key, padded, is_causal=True)
    return mixed[..., : value.shape[-1]]
