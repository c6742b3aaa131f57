"""Context gates and gated writes as their equations say, in plain autograd."""

import torch
from torch import Tensor


def exact_gates(streams: Tensor, key: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., n, C], [..., n, C], [n, C] -> [..., n]."""

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    score = (norm(streams) * norm(key) * weight).sum(-1) / streams.shape[-1] ** 0.5
    return torch.sigmoid(torch.sign(score) * torch.sqrt(torch.clamp(score.abs(), min=1e-6)))


def exact_write(
    streams: Tensor, value: Tensor, gate: Tensor, taps: Tensor | None, dilation: int
) -> Tensor:
    """[B, S, n, C], [B, P, C], [B, P, n], [K, n, C] -> [B, S, n, C]."""
    length, before = streams.shape[1], value.shape[1] - streams.shape[1]
    gated = gate[..., None] * value[..., None, :]
    added = gated[:, before:]
    if taps is not None:
        normed = gated / (gated.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        mixed = torch.zeros_like(added)
        for k, tap in enumerate(taps):
            back = (len(taps) - 1 - k) * dilation
            places = torch.arange(length) + before - back
            mixed = mixed + tap * normed[:, places.clamp(min=0)] * (places >= 0)[:, None, None]
        added = added + mixed * torch.sigmoid(mixed)
    return streams + added
