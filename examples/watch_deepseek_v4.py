"""Watch a model that is not ours: the Hyper-Connections inside transformers' DeepSeek-V4.

`DeepseekV4HyperConnection` returns a tuple `(post, comb, collapsed)`, not a `StreamMappings`, so
the instruments are told how to read it, by one function, `extract`. Two things in it are worth
copying. `comb` is stored transposed (stream j to stream k is `comb[j, k]`), so it is turned
over to be H_res. And `pre` is used inside the module and not returned, so it is left unknown
(NaN); the instruments read the residual mapping only.

A tiny DeepSeek-V4 with random weights learns to continue arithmetic sequences. One sees the loss
fall, the gains of its doubly stochastic matrices, forward and backward, near 1, how different its
streams are, layer by layer, and its matrices as pictures.

    pip install "transformers>=5.23"
    python examples/watch_deepseek_v4.py
    tensorboard --logdir outputs/watch_deepseek_v4        # page /#custom_scalars, and Images
"""

import argparse
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from mhc_lightning.callbacks import (
    AmaxGain,
    ProgressBar,
    RunSummary,
    StabilityDashboard,
    StreamDiversity,
    StreamMatrixHeatmap,
    Throughput,
)
from mhc_lightning.modules import StreamMappings

VOCABULARY = 64


def extract(module: nn.Module, args: tuple[Any, ...], output: Any) -> StreamMappings | None:
    """The mappings of one call of a DeepSeek-V4 connection; None for every other module."""
    if not isinstance(module, DeepseekV4HyperConnection):
        return None
    post, comb, _collapsed = output
    unknown = torch.full_like(post, torch.nan)
    return StreamMappings(pre=unknown, post=post, residual=comb.transpose(-1, -2))


class Tuner(pl.LightningModule):
    """Next-token training of any causal language model from transformers."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.network = model
        self.lr = lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch of tokens [B, S]."""
        loss: Tensor = self.network(input_ids=batch, labels=batch).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def tiny_model(layers: int, num_streams: int) -> nn.Module:
    """DeepSeek-V4 as transformers builds it, small enough for a CPU, with random weights."""
    return DeepseekV4ForCausalLM(
        DeepseekV4Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            moe_intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            head_dim=32,
            q_lora_rank=32,
            o_lora_rank=32,
            o_groups=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            index_n_heads=2,
            index_head_dim=32,
            index_topk=8,
            sliding_window=32,
            max_position_embeddings=128,
            hc_mult=num_streams,
            use_cache=False,
        )
    )


def sequences(count: int, length: int) -> Tensor:
    """Arithmetic sequences modulo the vocabulary, [count, length]."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(VOCABULARY, (count, 1), generator=generator)
    stride = torch.randint(1, 8, (count, 1), generator=generator)
    return (start + stride * torch.arange(length)) % VOCABULARY


def main() -> None:
    """Train, and write everything under `--output`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--layers", type=int, default=3, help="blocks, of two connections each")
    parser.add_argument("--num-streams", type=int, default=4, help="n")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("outputs/watch_deepseek_v4"))
    args = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        devices=1,
        logger=TensorBoardLogger(args.output, name="", version=""),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            AmaxGain(extract=extract),
            StreamMatrixHeatmap(extract=extract),
            StreamDiversity(extract=extract),  # finds the streams among the arguments by itself
            Throughput(count_tokens=Tensor.numel),
            StabilityDashboard(),
            ProgressBar(),
            RunSummary(),
        ],
    )
    model = Tuner(tiny_model(args.layers, args.num_streams), args.lr)
    data: Any = sequences(8 * args.steps, length=32)
    trainer.fit(model, DataLoader(data, batch_size=8))


if __name__ == "__main__":
    main()
