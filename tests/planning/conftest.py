"""Small models in some variety, and what they really keep."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from mhc_lightning.modules import (
    HyperConnection,
    ManifoldHyperConnection,
    ResidualConnection,
    Transformer,
)

CONNECTIONS: dict[str, Callable] = {
    "residual": ResidualConnection,
    "hc": HyperConnection,
    "hc_linear": partial(HyperConnection, tanh=False),
    "hc_static": partial(HyperConnection, dynamic=False),
    "mhc": ManifoldHyperConnection,
}
DENSE = {
    "vocab_size": 100,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 3,
    "head_dim": 16,
    "rope_dim": 8,
    "kv_rank": 24,
    "ffn_dim": 40,
}
EXPERTS = {"num_experts": 8, "num_active_experts": 2, "num_shared_experts": 1}


@pytest.fixture
def build() -> Callable[..., Transformer]:
    """Returns a function: a model with a connection, a precision and changed sizes."""

    def build(connection: str, precision: str = "32-true", **sizes: int) -> Transformer:
        model = Transformer(connection=CONNECTIONS[connection], **{**DENSE, **sizes})
        return model.bfloat16() if precision == "bf16-true" else model

    return build


@pytest.fixture
def loss() -> Callable[..., torch.Tensor]:
    """Returns a function: the loss of random tokens, computed as a trainer would."""

    def loss(model: Transformer, sequences: int, length: int, precision: str) -> torch.Tensor:
        device = model.output.weight.device
        tokens = torch.randint(0, model.vocab_size, (sequences, length + 1), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            return model.loss(tokens[:, :-1], tokens[:, 1:])

    return loss
