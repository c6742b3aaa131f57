"""Pipeline parallelism for a Lightning module that is not from this package.

The network says what is cut (`blocks`) and what comes before and behind; the LightningModule is
an ordinary one. From one process to two stages on two (CPU) devices only the Trainer changes:

    python examples/pipeline_your_own.py
    python examples/pipeline_your_own.py --devices 2 --schedule zbv

Both print the same losses.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mhc_lightning.strategies import PipelineStrategy

VOCABULARY, WIDTH, BLOCKS = 64, 32, 8


class Network(nn.Module):
    """A causal Transformer out of torch's own layers."""

    parts_before_blocks = ("embedding",)
    parts_behind_blocks = ("norm", "output")

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> [B, S, C]."""
        return self.embedding(tokens)

    def run_blocks(
        self, x: Tensor, carry: None = None, blocks: Sequence[nn.Module] = ()
    ) -> tuple[Tensor, None]:
        """Some blocks after each other; nothing but `x` is handed on."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        for block in blocks or self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return x, None

    def head_loss(self, x: Tensor, carry: None, targets: Tensor) -> Tensor:
        """Mean cross-entropy of what leaves the last block."""
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1), targets.flatten())

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """From end to end; a pipeline puts its own in place of it."""
        return self.head_loss(*self.run_blocks(self.embed(tokens)), targets)


class Module(pl.LightningModule):
    """As simple as a LightningModule can be."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The network's loss is what is returned."""
        loss = self.network.loss(batch[:, :-1], batch[:, 1:])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Without gradients it runs forward alone."""
        self.log("val_loss", self.network.loss(batch[:, :-1], batch[:, 1:]))

    def on_train_batch_end(self, *_: object) -> None:
        """Show the loss, on the first device."""
        if self.trainer.is_global_zero:
            print(
                f"step {self.trainer.global_step}  loss {self.trainer.callback_metrics['loss']:.5f}"
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Whatever you use."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Train a few steps on counting up."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--schedule", default="1f1b")
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    starts = torch.randint(0, VOCABULARY, (64, 1))
    tokens: Any = (starts + torch.arange(17)) % VOCABULARY
    loader = DataLoader(tokens, batch_size=8)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=options.devices,
        strategy=PipelineStrategy(schedule=options.schedule) if options.devices > 1 else "auto",
        max_steps=8,
        gradient_clip_val=1.0,
        val_check_interval=8,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Module(), loader, loader)
    if trainer.is_global_zero:
        print(f"validation loss {trainer.callback_metrics['val_loss']:.5f}")


if __name__ == "__main__":
    main()
