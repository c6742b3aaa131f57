"""The parts that probes put together: every connection, a small network, a run that is watched."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mhc_lightning.callbacks import AmaxGain
from mhc_lightning.modules import (
    Connection,
    HyperConnection,
    IdentityHyperConnection,
    KroneckerHyperConnection,
    ManifoldHyperConnection,
    PermutationHyperConnection,
    ResidualConnection,
    SinglePassHyperConnection,
    Transformer,
)

DIM, STREAMS, VOCABULARY = 8, 4, 17

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


def stirred(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module with its parameters moved a little, so that no gradient is zero by symmetry."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


class Layer(nn.Module):
    """A connection around a sub-layer of its own: [B, S, n, C] -> [B, S, n, C]."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection
        self.body = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, DIM))

    def forward(self, streams: Tensor) -> Tensor:
        return self.connection(streams, self.body)


def layers() -> Iterable[tuple[str, Layer, Tensor]]:
    """Every connection around a sub-layer, and streams for it."""
    for name, build in CONNECTIONS.items():
        torch.manual_seed(0)
        layer = Layer(build(dim=DIM, num_streams=STREAMS, layer_index=0))
        stirred(layer)
        yield name, layer, torch.randn(2, 5, layer.connection.num_streams, DIM)


def fresh_network(**changes: Any) -> Transformer:
    """Two blocks, the second with experts, as they are initialised."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "connection": ManifoldHyperConnection,
        "vocab_size": VOCABULARY,
        "dim": DIM,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 12,
        "head_dim": 4,
        "rope_dim": 4,
        "kv_rank": 4,
        "init_std": 0.3,
        "num_experts": 4,
        "num_active_experts": 2,
        "num_shared_experts": 1,
    }
    return Transformer(**{**settings, **changes})


def network(**changes: Any) -> Transformer:
    """The same network whose parameters were moved a little; always the same."""
    return stirred(fresh_network(**changes))  # type: ignore[return-value]


def tokens(seed: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens and targets, each [4, 7]."""
    drawn = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def loss_and_gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter, by name; none is missing."""
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {"loss": loss.detach(), **dict(zip(parameters, gradients, strict=True))}


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """The same names with the same values."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-6, msg=partial(_named, name)
        )


def _named(name: str, text: str) -> str:
    return f"{name}: {text}"


class Watched(pl.LightningModule):
    """Trains a network; what a step computes can be replaced."""

    def __init__(self, net: nn.Module, loss: Callable[[nn.Module], Tensor] | None = None) -> None:
        super().__init__()
        self.net = net
        self.loss = loss or cross_entropy

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(self.net)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def cross_entropy(net: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss from logits, by torch alone."""
    inputs, targets = tokens()
    return nn.functional.cross_entropy(net(inputs).flatten(0, 1), targets.flatten())


def fit(module: pl.LightningModule, **options: Any) -> None:
    """Train for two steps."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(**{**settings, **options})
    rows: Any = [torch.zeros(1)] * 2
    trainer.fit(module, torch.utils.data.DataLoader(rows))


def gains_of(module: pl.LightningModule, **options: Any) -> dict[str, float]:
    """What `AmaxGain` saw in the last step of a short run."""
    gains = AmaxGain(every_n_steps=1)
    fit(module, **{**options, "callbacks": [gains, *options.get("callbacks", [])]})
    return gains.last
