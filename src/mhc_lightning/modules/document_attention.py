"""Causal attention that stays within documents, without a score for every pair of positions.

Importing it imports Dynamo, which takes a second.

Shapes: B batch, H heads, S sequence, D width of queries and keys, E width of values.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mhc_lightning.modules.causal_attention import causal_attention
from mhc_lightning.modules.documents import Documents

_FLEX_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FLEX_LEAST_WIDTH = 16  # of queries, keys and values


def attention_within(documents: Documents, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`causal_attention` in which each position sees its own document alone.

    On a GPU it is FlexAttention. Elsewhere, and in what FlexAttention cannot compute (float64, and
    widths below 16), each document is computed by itself.

    Args:
        documents: Those of the positions.
        query: [B, H, S, D].
        key: [B, H, S, D].
        value: [B, H, S, E], E at most D.
    """
    narrowest = min(query.shape[-1], value.shape[-1])
    fits = query.dtype in _FLEX_DTYPES and narrowest >= _FLEX_LEAST_WIDTH
    if documents.block_mask is not None and fits:
        return _flex_attention()(query, key, value, block_mask=documents.block_mask)
    return _one_by_one(documents, query, key, value)


@cache
def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it would make all scores.
    return torch.compile(flex_attention)


@torch.compiler.disable  # the number of documents is not known to a compiler
def _one_by_one(documents: Documents, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return documents.apart(causal_attention, query, key, value, dim=2)
