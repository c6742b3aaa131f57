"""Latent attention against a direct computation of its equations."""

import math

import pytest
import torch
from torch import Tensor

from mhc_lightning.errors import UserError
from mhc_lightning.modules import LatentAttention
from mhc_lightning.modules.rotary import rotary_angles, rotate


def direct(attention: LatentAttention, x: Tensor) -> Tensor:
    """One query, one head, one key at a time (arXiv 2412.19437, section 2.1.1)."""
    head_dim, rope_dim = attention.head_dim, attention.rope_dim
    length = x.shape[0]

    def rope(vector: Tensor, position: int) -> Tensor:
        half = rope_dim // 2
        angles = torch.tensor(
            [position * attention.rope_theta ** (-2 * i / rope_dim) for i in range(half)]
        ).to(x.dtype)
        first, second = vector[:half], vector[half:]
        return torch.cat(
            [
                first * angles.cos() - second * angles.sin(),
                second * angles.cos() + first * angles.sin(),
            ]
        )

    heads = []
    latents = attention.latent(x)
    content = attention.latent_norm(latents[:, : attention.kv_rank])
    for head in range(attention.num_heads):
        width = head_dim + rope_dim
        queries = attention.query(x)[:, head * width : (head + 1) * width]
        key_values = attention.key_value(content)[
            :, 2 * head * head_dim : 2 * (head + 1) * head_dim
        ]
        keys, values = key_values[:, :head_dim], key_values[:, head_dim:]
        rows = []
        for t in range(length):
            scores = torch.stack(
                [
                    queries[t, :head_dim] @ keys[s]
                    + rope(queries[t, head_dim:], t) @ rope(latents[s, attention.kv_rank :], s)
                    for s in range(t + 1)
                ]
            )
            rows.append((scores / math.sqrt(width)).softmax(0) @ values[: t + 1])
        heads.append(torch.stack(rows))
    return attention.output(torch.cat(heads, dim=-1))


def test_against_the_equations() -> None:
    attention = LatentAttention(
        dim=24, num_heads=3, head_dim=8, rope_dim=4, kv_rank=10, rope_theta=100.0
    ).double()
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    expected = torch.stack([direct(attention, sequence) for sequence in x])
    assert (attention(x) - expected).abs().max() < 1e-6  # angles are float32


def test_causal() -> None:
    attention = LatentAttention(dim=16, num_heads=2, head_dim=8, rope_dim=4, kv_rank=8)
    x = torch.randn(1, 10, 16)
    changed = x.clone()
    changed[:, 6:] += 1
    difference = (attention(x) - attention(changed)).abs().amax(-1)[0]
    assert (difference[:6] == 0).all()
    assert (difference[6:] > 0).all()


def test_rotation_depends_on_distance_only() -> None:
    cos, sin = rotary_angles(torch.arange(32), 16, 10000.0)
    query, key = torch.randn(2, 16)
    scores = torch.stack(
        [
            rotate(query.expand(32, 16), cos, sin)[t] @ rotate(key.expand(32, 16), cos, sin)[t - 5]
            for t in range(5, 32)
        ]
    )
    assert (scores - scores[0]).abs().max() < 1e-4


def test_odd_rotary_dimension() -> None:
    with pytest.raises(UserError, match=r"model.rope_dim must be even .* not 7"):
        LatentAttention(dim=16, num_heads=2, head_dim=8, rope_dim=7, kv_rank=8)
