"""Multi-head latent attention (arXiv 2412.19437), without the low-rank query."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules.norm import RMSNorm
from mhc_lightning.modules.rotary import rotary_angles, rotate


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
        if rope_dim % 2:
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

    def forward(self, x: Tensor) -> Tensor:
        """Attend causally: [B, S, C] -> [B, S, C]."""
        batch, length, _ = x.shape
        split = [self.head_dim, self.rope_dim]
        cos, sin = rotary_angles(length, self.rope_dim, self.rope_theta, x.device)

        query = self.query(x).view(batch, length, self.num_heads, sum(split)).transpose(1, 2)
        query, query_rope = query.split(split, dim=-1)
        query = torch.cat([query, rotate(query_rope, cos, sin)], dim=-1)

        latent, key_rope = self.latent(x).split([self.kv_rank, self.rope_dim], dim=-1)
        key_value = self.key_value(self.latent_norm(latent))
        key, value = (
            key_value.view(batch, length, self.num_heads, 2 * self.head_dim)
            .transpose(1, 2)
            .chunk(2, dim=-1)
        )
        key_rope = rotate(key_rope, cos, sin)[:, None].expand(-1, self.num_heads, -1, -1)
        key = torch.cat([key, key_rope], dim=-1)

        # Fused attention wants equal widths: the values' zero padding is cut off again.
        value = F.pad(value, (0, self.rope_dim))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = mixed[..., : self.head_dim].transpose(1, 2).reshape(batch, length, -1)
        return self.output(mixed)
