"""A vision transformer of your own, with mHC around its layers and the instruments watching.

The network and the LightningModule below are ordinary PyTorch and Lightning, and know nothing of
language models. Three things make them Hyper-Connected: the patch embedding is copied into n
streams, each residual sub-layer `x + f(x)` becomes `connection(streams, f)`, and the streams
are averaged before the classifier. The callbacks find the connections by themselves.

The task is made up on the spot: 16 x 16 images of a noisy grating, to be classified by its
direction. In a few seconds on a CPU accuracy goes from an eighth (chance) to nearly one, and the
gains stay near 1: forward exactly, backward up to what 20 Sinkhorn iterations leave. With
`--connection hc` nothing holds them there.

    python examples/vision_transformer.py
    tensorboard --logdir outputs/vision_transformer       # page /#custom_scalars, and Images
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mhc_lightning.callbacks import (
    AmaxGain,
    ProgressBar,
    RunSummary,
    StabilityDashboard,
    StreamDiversity,
    StreamMatrixHeatmap,
)
from mhc_lightning.modules import Connection, HyperConnection, ManifoldHyperConnection

SIZE, PATCH, CLASSES = 16, 4, 8


class Attention(nn.Module):
    """Pre-norm self-attention over the patches of an image: [B, P, C] -> [B, P, C]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attend = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        x = self.norm(x)
        return self.attend(x, x, x, need_weights=False)[0]


class VisionTransformer(nn.Module):
    """Images [B, 1, 16, 16] to logits [B, 8], over n streams of width C."""

    def __init__(
        self, connection: Callable[..., Connection], dim: int, blocks: int, num_streams: int
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, PATCH, stride=PATCH)
        self.position = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, dim))
        self.sublayers = nn.ModuleList()
        for _ in range(blocks):
            self.sublayers.append(Attention(dim, heads=4))
            self.sublayers.append(
                nn.Sequential(
                    nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
                )
            )
        self.connections = nn.ModuleList(
            connection(dim=dim, num_streams=num_streams, layer_index=k) for k in range(2 * blocks)
        )
        self.num_streams = num_streams
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Classify."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position  # [B, P, C]
        streams = x.unsqueeze(-2).expand(-1, -1, self.num_streams, -1)  # [B, P, n, C]
        for connection, sublayer in zip(self.connections, self.sublayers, strict=True):
            streams = connection(streams, sublayer)  # was: x = x + sublayer(x)
        return self.head(streams.mean(dim=(1, 2)))


class Classifier(pl.LightningModule):
    """An ordinary classifier."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network = network
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy and loss on held-out images."""
        images, labels = batch
        logits = self.network(images)
        self.log("val/accuracy", (logits.argmax(-1) == labels).float().mean())
        self.log("val/loss", F.cross_entropy(logits, labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def gratings(count: int, seed: int) -> TensorDataset:
    """Noisy gratings in eight directions, with random phase and frequency."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = (labels * torch.pi / CLASSES).view(-1, 1, 1)
    phase, frequency = 2 * torch.pi * torch.rand(2, count, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    wave = torch.cos(angle) * x + torch.sin(angle) * y
    images = torch.sin((0.6 + 0.1 * frequency) * wave + phase)
    images = images + 1.2 * torch.randn(images.shape, generator=generator)
    return TensorDataset(images.unsqueeze(1), labels)


def main() -> None:
    """Train, and write everything under `--output`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connection", choices=("mhc", "hc"), default="mhc")
    parser.add_argument("--num-streams", type=int, default=4, help="n")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--dim", type=int, default=32, help="C, a multiple of 4")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, default=Path("outputs/vision_transformer"))
    args = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    connection = {"mhc": ManifoldHyperConnection, "hc": HyperConnection}[args.connection]
    network = VisionTransformer(connection, args.dim, args.blocks, args.num_streams)
    trainer = pl.Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        devices=1,
        logger=TensorBoardLogger(args.output, name="", version=args.connection),
        log_every_n_steps=10,
        val_check_interval=50,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            AmaxGain(),
            StreamMatrixHeatmap(),
            StreamDiversity(),
            StabilityDashboard(),
            ProgressBar(),
            RunSummary(),
        ],
    )
    training = DataLoader(gratings(4096, seed=0), batch_size=32, shuffle=True)
    held_out = DataLoader(gratings(512, seed=1), batch_size=256)
    trainer.fit(Classifier(network, args.lr), training, held_out)
    print(f"held-out accuracy {float(trainer.callback_metrics['val/accuracy']):.3f}")


if __name__ == "__main__":
    main()
