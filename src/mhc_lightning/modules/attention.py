"""Multi-head latent attention (arXiv 2412.19437), without the low-rank query.

Shapes: B batch, S new tokens, T all tokens so far, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.kernels.precision import compute_dtype, widened
from mhc_lightning.modules.causal_attention import causal_attention
from mhc_lightning.modules.documents import Documents
from mhc_lightning.modules.norm import RMSNorm
from mhc_lightning.modules.plain_projection import plain_weight
from mhc_lightning.modules.rotary import rotary_angles, rotate


class LatentCache:
    """The latent and the rotary key of every earlier token.

    Rows may have different lengths. `write` puts new tokens at the end of each row. `advance` then
    sets how many of them count. The others are padding: no token attends to padding, and the next
    `write` overwrites it.

    Args:
        latents: Memory for normalised latents [B, max_length, kv_rank], finite.
        rope_keys: Memory for rotated keys [B, max_length, rope_dim], finite.

    Attributes:
        lengths: Number of tokens in each row [B], int64.
        longest: An upper bound of `lengths`.
    """

    def __init__(self, latents: Tensor, rope_keys: Tensor) -> None:
        self._latents = latents
        self._rope_keys = rope_keys
        self.lengths = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
        self.longest = 0

    def positions(self, count: int) -> Tensor:
        """The positions [B, count] of the next `count` tokens of each row."""
        steps = torch.arange(count, device=self.lengths.device)
        return self.lengths[:, None] + steps

    def write(self, latents: Tensor, rope_keys: Tensor) -> tuple[Tensor, Tensor]:
        """Write S tokens at the end of each row.

        Returns:
            Latents [B, T, kv_rank] and keys [B, T, rope_dim]; T is the length of the longest row.
            Values after a shorter row's new tokens have no meaning.

        Raises:
            UserError: The cache has no room left.
        """
        end = self.longest + latents.shape[1]
        if end > self._latents.shape[1]:
            raise UserError(
                f"the cache holds {self._latents.shape[1]} tokens, not {end}: ask for a longer one"
            )
        places = self.positions(latents.shape[1])
        rows = torch.arange(len(places), device=places.device)[:, None]
        self._latents[rows, places] = latents.to(self._latents.dtype)
        self._rope_keys[rows, places] = rope_keys.to(self._rope_keys.dtype)
        all_latents, all_rope_keys = self._latents[:, :end], self._rope_keys[:, :end]
        return all_latents.to(latents.dtype), all_rope_keys.to(rope_keys.dtype)

    def advance(self, counts: Tensor, most: int) -> None:
        """Count the first `counts` [B] of the tokens just written, each at most `most`."""
        self.lengths = self.lengths + counts
        self.longest += most

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in each row; memory at least doubles when it grows."""
        room = self._latents.shape[1]
        if length > room:
            more = (0, 0, 0, max(length - room, room))
            self._latents, self._rope_keys = (
                F.pad(memory, more) for memory in (self._latents, self._rope_keys)
            )

    def remove(self, count: int) -> None:
        """Take back the last `count` tokens of each row."""
        self.lengths = self.lengths - count
        self.longest -= count

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows [K] only, in their order; a row may be kept several times."""
        self._latents = self._latents[rows]
        self._rope_keys = self._rope_keys[rows]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())


class LatentAttention(nn.Module):
    """Causal attention whose keys and values come from one low-rank latent per token.

    Each head's query and key have `head_dim` values without rotary position and `rope_dim` values
    with it. The heads share the rotary key.

    Args:
        dim: Width C of input and output.
        num_heads: Number of heads.
        head_dim: Width of a head's content query, content key and value.
        rope_dim: Width of the rotary part, even.
        kv_rank: Width of the latent from which keys and values are projected.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Epsilon of the latent's RMSNorm.

    Raises:
        UserError: `rope_dim` is odd.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        rope_dim: int,
        kv_rank: int,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-20,
    ) -> None:
        super().__init__()
        if rope_dim % 2 or rope_dim < 0:
            raise UserError(f"model.rope_dim must be even (values turn in pairs), not {rope_dim}")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.rope_dim = rope_dim
        self.kv_rank = kv_rank
        self.rope_theta = rope_theta
        self.query = nn.Linear(dim, num_heads * (head_dim + rope_dim), bias=False)
        self.latent = nn.Linear(dim, kv_rank + rope_dim, bias=False)
        self.latent_norm = RMSNorm(kv_rank, eps=norm_eps)
        self.key_value = nn.Linear(kv_rank, num_heads * 2 * head_dim, bias=False)
        self.output = nn.Linear(num_heads * head_dim, dim, bias=False)

    def new_cache(self, batch_size: int, max_length: int, dtype: torch.dtype) -> LatentCache:
        """An empty cache for `max_length` tokens of each of `batch_size` sequences."""
        device = next(self.parameters()).device
        return LatentCache(
            torch.zeros(batch_size, max_length, self.kv_rank, dtype=dtype, device=device),
            torch.zeros(batch_size, max_length, self.rope_dim, dtype=dtype, device=device),
        )

    def forward(
        self, x: Tensor, cache: LatentCache | None = None, documents: Documents | None = None
    ) -> Tensor:
        """Attend causally: [B, S, C] -> [B, S, C].

        With a cache, `x` continues the cached tokens and is written to the cache. Padding follows
        the tokens of a row, so no token attends to padding. With `documents`, attention stays
        within them, and positions count from the first token of each.
        """
        batch, length, _ = x.shape
        places = None if cache is None else cache.positions(length).unsqueeze(1)
        if documents is not None:
            positions = documents.positions.unsqueeze(1)  # [B, 1, S]: the same for all heads
        else:
            positions = torch.arange(length, device=x.device) if places is None else places
        cos, sin = rotary_angles(positions, self.rope_dim, self.rope_theta, compute_dtype(x))

        widths = [self.head_dim, self.rope_dim]
        query = self.query(x).view(batch, length, self.num_heads, sum(widths)).transpose(1, 2)
        query, rope_query = query.split(widths, dim=-1)
        rope_query = rotate(rope_query, cos, sin)

        latents, rope_keys = self.latent(x).split([self.kv_rank, self.rope_dim], dim=-1)
        latents = self.latent_norm(latents)
        rope_keys = rotate(rope_keys.unsqueeze(1), cos, sin).squeeze(1)
        cached = None if cache is None else cache.write(latents, rope_keys)
        if cache is None or cached is None or places is None or cache.longest == 0:
            mixed = self._attend_all(query, rope_query, latents, rope_keys, documents=documents)
        else:
            # A query attends to keys up to its own place: [B, 1, S, T].
            keys = torch.arange(cached[0].shape[1], device=x.device)
            visible = keys <= places.unsqueeze(-1)
            if documents is not None:
                visible = visible & (keys >= documents.starts[:, None, :, None])
            weight = plain_weight(self.key_value)
            if weight is None:
                mixed = self._attend_all(query, rope_query, *cached, visible)
            else:
                mixed = self._attend_latents(query, rope_query, *cached, visible, weight)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _attend_all(
        self,
        query: Tensor,
        rope_query: Tensor,
        latents: Tensor,
        rope_keys: Tensor,
        visible: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Attention [B, H, S, head_dim] that builds all keys and values.

        Queries attend causally to the sequence itself, within `documents` if given, or to the
        `visible` [B, 1, S, T] of T tokens.
        """
        per_head = (self.num_heads, 2 * self.head_dim)
        key_value = self.key_value(latents).unflatten(-1, per_head).transpose(1, 2)
        key, value = key_value.chunk(2, dim=-1)
        shared = rope_keys[:, None].expand(-1, self.num_heads, -1, -1)
        query = torch.cat([query, rope_query], dim=-1)
        key = torch.cat([key, shared], dim=-1)
        if visible is not None:
            padded = F.pad(value, (0, self.rope_dim))
            mixed = F.scaled_dot_product_attention(query, key, padded, attn_mask=visible)
            return mixed[..., : self.head_dim]
        if documents is not None:
            from mhc_lightning.modules.document_attention import attention_within  # slow to import

            return attention_within(documents, query, key, value)
        return causal_attention(query, key, value)

    def _attend_latents(
        self,
        query: Tensor,
        rope_query: Tensor,
        latents: Tensor,
        rope_keys: Tensor,
        visible: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """Attention [B, H, S, head_dim] for few new tokens and many cached ones.

        This function builds no keys and values of cached tokens. The key projection is applied to
        the query instead, and the value projection to the weighted sum of latents. `weight` holds
        both projections.
        """
        weight = weight.view(self.num_heads, 2, self.head_dim, self.kv_rank)
        key_weight, value_weight = weight.to(query.dtype).unbind(1)
        latent_query = torch.einsum("bhsd,hdr->bhsr", query, key_weight)
        scores = torch.einsum("bhsr,btr->bhst", latent_query, latents)
        scores = scores + torch.einsum("bhsd,btd->bhst", rope_query, rope_keys)
        scores = widened(scores) / (self.head_dim + self.rope_dim) ** 0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(query.dtype)
        mixed = torch.einsum("bhst,btr->bhsr", weights, latents)
        return torch.einsum("bhsr,hdr->bhsd", mixed, value_weight)
