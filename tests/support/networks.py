"""Every kind of connection, and small networks that are built from them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from mhc_lightning.modules import (
    Connection,
    Engram,
    HyperConnection,
    IdentityHyperConnection,
    KroneckerHyperConnection,
    ManifoldHyperConnection,
    OverEncoding,
    PermutationHyperConnection,
    ResidualConnection,
    SinglePassHyperConnection,
    Transformer,
)

CONNECTIONS: dict[str, Callable[..., Connection]] = {
    "residual": ResidualConnection,
    "hc": HyperConnection,
    "hc_linear": partial(HyperConnection, tanh=False),
    "hc_static": partial(HyperConnection, dynamic=False),
    "mhc": ManifoldHyperConnection,
    "mhc_single_pass": SinglePassHyperConnection,
    "mhc_lite": PermutationHyperConnection,
    "krom": KroneckerHyperConnection,
    "identity": IdentityHyperConnection,
}

# Memories that a network of two blocks can have; their tables are small enough for collisions.
MEMORIES: dict[str, Callable[..., Any]] = {
    "engram": partial(Engram, rows=31, num_heads=2, dim=8),
    "engram_without_conv": partial(Engram, rows=31, num_heads=2, dim=8, conv=False),
    "over_encoding": partial(OverEncoding, rows=57, num_heads=2, dim=8),
}

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_active_experts": 2, "num_shared_experts": 1}
DENSE: dict[str, Any] = {"num_experts": 0}


def tiny_transformer(connection: str | Callable[..., Connection] = "mhc", **changes: Any) -> Any:
    """A `Transformer` of two blocks, the second with experts; always the same.

    Args:
        connection: A name in `CONNECTIONS`, or what builds a connection.
        changes: Arguments of `Transformer` that differ.
    """
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "connection": CONNECTIONS[connection] if isinstance(connection, str) else connection,
        "vocab_size": 40,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 20,
        "head_dim": 8,
        "rope_dim": 4,
        "kv_rank": 8,
        "init_std": 0.05,
        **EXPERTS,
    }
    return Transformer(**{**settings, **changes})


def scrambled(module: nn.Module, scale: float = 0.1, seed: int | None = None) -> Any:
    """The module, its parameters moved away from an initialisation that hides gradients.

    Args:
        module: The module.
        scale: Standard deviation of the moves.
        seed: Seed of the moves; torch's generator by default.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
            parameter.add_(scale * noise)
    return module
