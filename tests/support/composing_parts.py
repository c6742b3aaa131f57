"""The parts that probes put together: every connection, a small network, a run that is watched."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from networks import CONNECTIONS, scrambled, tiny_transformer
from torch import Tensor, nn

from mhc_lightning.callbacks import AmaxGain
from mhc_lightning.modules import Connection, Transformer

DIM, STREAMS, VOCABULARY = 8, 4, 17


def stirred(module: nn.Module, seed: int = 1) -> Any:
    """The module with its parameters moved a little, so that no gradient is zero by symmetry."""
    return scrambled(module, 0.1, seed)


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


class EveryLayer(nn.Module):
    """All of `layers` in one module: [B, S, STREAMS, C] -> their results beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: layer for name, layer, _ in layers()})

    def forward(self, streams: Tensor) -> Tensor:
        results = []
        for layer in self.layers.values():
            assert isinstance(layer, Layer)
            results.append(layer(streams[:, :, : layer.connection.num_streams]))
        return torch.cat(results, dim=-2)


def fresh_network(**changes: Any) -> Transformer:
    """Two blocks, the second with experts, as they are initialised."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "dim": DIM,
        "ffn_dim": 12,
        "head_dim": 4,
        "kv_rank": 4,
        "init_std": 0.3,
    }
    return tiny_transformer(**{**sizes, **changes})


def network(**changes: Any) -> Transformer:
    """The same network whose parameters were moved a little; always the same."""
    return stirred(fresh_network(**changes))


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
