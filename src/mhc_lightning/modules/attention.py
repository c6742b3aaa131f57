"""Multi-head latent attention (arXiv 2412.19437), without the low-rank query.

Shapes: B batch, S new tokens, T all tokens so far, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules.norm import RMSNorm
from mhc_lightning.modules.rotary import rotary_angles, rotate


class LatentCache:
    """What attention remembers of the tokens it has read: a latent and a rotary key each.

    Args:
        latents: Room for normalised latents [B, max_length, kv_rank].
        rope_keys: Room for rotated keys [B, max_length, rope_dim].
    """

    def __init__(self, latents: Tensor, rope_keys: Tensor) -> None:
        self._latents = latents
        self._rope_keys = rope_keys
        self.length = 0

    def append(self, latents: Tensor, rope_keys: Tensor) -> tuple[Tensor, Tensor]:
        """Remember S more tokens; return everything so far, [B, T, kv_rank] and [B, T, rope_dim].

        Raises:
            UserError: If there is no room left.
        """
        end = self.length + latents.shape[1]
        if end > self._latents.shape[1]:
            raise UserError(
                f"the cache holds {self._latents.shape[1]} tokens, not {end}: ask for a longer one"
            )
        self._latents[:, self.length : end] = latents
        self._rope_keys[:, self.length : end] = rope_keys
        self.length = end
        return self._latents[:, :end], self._rope_keys[:, :end]


class LatentAttention(nn.Module):
    """Causal attention whose keys and values come from one low-rank latent per token.

    Each head's query and key have ``head_dim`` values without and ``rope_dim`` with rotary
    position; the rotary key is shared by the heads.

    Args:
        dim: Width C of input and output.
        num_heads: Number of heads.
        head_dim: Width of a head's content query, content key and value.
        rope_dim: Width of the rotary part, even.
        kv_rank: Width of the latent that keys and values are made of.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Epsilon of the latent's RMSNorm.

    Raises:
        UserError: If ``rope_dim`` is odd.
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
        """An empty cache for ``max_length`` tokens of each of ``batch_size`` sequences."""
        device = self.query.weight.device
        return LatentCache(
            torch.empty(batch_size, max_length, self.kv_rank, dtype=dtype, device=device),
            torch.empty(batch_size, max_length, self.rope_dim, dtype=dtype, device=device),
        )

    def forward(self, x: Tensor, cache: LatentCache | None = None) -> Tensor:
        """Attend causally: [B, S, C] -> [B, S, C].

        With a cache, ``x`` continues the tokens that it remembers, and is remembered.
        """
        batch, length, _ = x.shape
        start = 0 if cache is None else cache.length
        cos, sin = rotary_angles(start, length, self.rope_dim, self.rope_theta, x.device)

        query = self.query(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
        query, rope_query = query.split([self.head_dim, self.rope_dim], dim=-1)
        rope_query = rotate(rope_query, cos, sin)

        latents, rope_keys = self.latent(x).split([self.kv_rank, self.rope_dim], dim=-1)
        latents = self.latent_norm(latents)
        rope_keys = rotate(rope_keys, cos, sin)
        if cache is not None:
            latents, rope_keys = cache.append(latents, rope_keys)

        attend = self._attend_all if start == 0 else self._attend_latents
        mixed = attend(query, rope_query, latents, rope_keys)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))

    def _attend_all(
        self, query: Tensor, rope_query: Tensor, latents: Tensor, rope_keys: Tensor
    ) -> Tensor:
        """Attention over the sequence itself, [B, H, S, head_dim]: keys and values are built."""
        key_value = self.key_value(latents).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = key_value.chunk(2, dim=-1)
        shared = rope_keys[:, None].expand(-1, self.num_heads, -1, -1)
        # Fused attention wants equal widths: the values' zero padding is cut off again.
        mixed = F.scaled_dot_product_attention(
            torch.cat([query, rope_query], dim=-1),
            torch.cat([key, shared], dim=-1),
            F.pad(value, (0, self.rope_dim)),
            is_causal=True,
        )
        return mixed[..., : self.head_dim]

    def _attend_latents(
        self, query: Tensor, rope_query: Tensor, latents: Tensor, rope_keys: Tensor
    ) -> Tensor:
        """The same for few new tokens and many old ones, without building their keys and values.

        The key projection moves to the query and the value projection behind the mixture, so the
        old tokens are touched by the attention products alone.
        """
        weight = self.key_value.weight.view(self.num_heads, 2, self.head_dim, self.kv_rank)
        key_weight, value_weight = weight.to(query.dtype).unbind(1)
        latent_query = torch.einsum("bhsd,hdr->bhsr", query, key_weight)
        scores = torch.einsum("bhsr,btr->bhst", latent_query, latents)
        scores = scores + torch.einsum("bhsd,btd->bhst", rope_query, rope_keys)
        scores = scores.float() / (self.head_dim + self.rope_dim) ** 0.5
        new, total = scores.shape[-2:]
        future = torch.ones(new, total, dtype=torch.bool, device=scores.device).triu(
            total - new + 1
        )
        weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(query.dtype)
        mixed = torch.einsum("bhst,btr->bhsr", weights, latents)
        return torch.einsum("bhsr,hdr->bhsd", mixed, value_weight)
