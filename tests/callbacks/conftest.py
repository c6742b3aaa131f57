"""Somebody else's project: models that know nothing of this package but the record."""

import csv
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from mhc_lightning.kernels import StreamMappings


class Window(nn.Module):
    def forward(self, streams: Tensor, mappings: StreamMappings) -> StreamMappings:
        return mappings


class Mixer(nn.Module):
    """A residual sub-layer; its mixing is not doubly stochastic, and differs by token."""

    def __init__(self, n: int, dim: int) -> None:
        super().__init__()
        self.logits = nn.Linear(dim, n * n)
        self.body = nn.Linear(dim, dim)
        self.window = Window()
        self.n = n

    def mappings(self, streams: Tensor) -> StreamMappings:
        residual = torch.eye(self.n, dtype=streams.dtype) + 0.3 * torch.tanh(
            self.logits(streams.mean(-2)).unflatten(-1, (self.n, self.n))
        )
        ones = torch.ones_like(residual[..., 0])
        return StreamMappings(ones / self.n, ones, residual)

    def forward(self, streams: Tensor) -> Tensor:
        m = self.window(streams, self.mappings(streams))
        y = self.body((m.pre.unsqueeze(-1) * streams).sum(-2))
        return m.residual @ streams + m.post.unsqueeze(-1) * y.unsqueeze(-2)


class Foreign(pl.LightningModule):
    """Regression on random vectors through a stack of mixers; logs no step of its own."""

    def __init__(
        self, layers: int = 3, n: int = 2, dim: int = 4, recompute: bool = False, manual: int = 0
    ) -> None:
        super().__init__()
        self.num_streams = n
        self.mixers = nn.ModuleList(Mixer(n, dim) for _ in range(layers))
        self.recompute = recompute
        self.manual = manual  # micro-batches per optimizer step, stepped by hand
        self.automatic_optimization = manual == 0
        self.hooked: list[tuple[str, int, int]] = []  # (stage, step, modules with hooks)

    def forward(self, x: Tensor) -> Tensor:
        streams = x.unsqueeze(-2).expand(*x.shape[:-1], self.num_streams, -1)
        for mixer in self.mixers:
            replay = self.recompute and self.training
            streams = checkpoint(mixer, streams, use_reentrant=False) if replay else mixer(streams)
        return streams.mean(-2)

    def count_hooks(self, stage: str) -> None:
        hooked = sum(len(m._forward_hooks) > 0 for m in self.modules())
        self.hooked.append((stage, self.global_step, hooked))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.count_hooks("train")
        loss = (self(batch) - 1).square().mean()
        self.log("train/loss", loss)
        if self.automatic_optimization:
            return loss
        loss.backward()  # not manual_backward: Lightning is not told
        self.count_hooks("after backward")
        if (batch_idx + 1) % self.manual == 0:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.count_hooks("optimizer")

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.count_hooks("validation")
        self.log("val/loss", (self(batch) - 1).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.001)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def foreign() -> SimpleNamespace:
    """The stand-in classes."""
    return SimpleNamespace(Module=Foreign, Mixer=Mixer, Window=Window)


@pytest.fixture
def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    data: Any = [torch.randn(5, 4, generator=generator) for _ in range(64)]
    return DataLoader(data, batch_size=2)  # [2, 5, 4]


@pytest.fixture
def fit(tmp_path: Path, batches: DataLoader) -> Callable[..., pl.Trainer]:
    """Fit a module for a few steps, with TensorBoard and CSV loggers in ``tmp_path``."""

    def run(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
        loggers = [
            TensorBoardLogger(tmp_path, name="", version="tb"),
            CSVLogger(tmp_path, name="", version="csv"),
        ]
        settings: dict[str, Any] = {
            "max_steps": 6,
            "log_every_n_steps": 2,
            "accelerator": "cpu",
            "devices": 1,
            "logger": loggers,
            "callbacks": list(callbacks),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        validate = options.pop("validate", False)
        train = options.pop("data", batches)
        trainer = pl.Trainer(**{**settings, **options})
        trainer.fit(module, train, batches if validate else None)
        return trainer

    return run


@pytest.fixture
def events(tmp_path: Path) -> Callable[[], EventAccumulator]:
    def read() -> EventAccumulator:
        accumulator = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0})
        accumulator.Reload()
        return accumulator

    return read


@pytest.fixture
def csv_rows(tmp_path: Path) -> Callable[[], list[dict[str, str]]]:
    def read() -> list[dict[str, str]]:
        with (tmp_path / "csv" / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    return read
