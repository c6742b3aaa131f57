"""A training step of the residual baseline beside plain models of equal dimensions (CPU, eager).

In one process, in turn: ours (multi-head latent attention, SwiGLU, the residual connection), by its
own loss and by logits as the others; transformers' DeepSeek-V3 with the same attention and widths;
transformers' Llama and a GPT written here, whose heads are as wide as ours without the rotary part.

    python benchmarks/baseline_step.py > benchmarks/results/baseline_step_cpu.json

`share` is the part of a step's profiled time by kind of operator. `parts` are what differs, forward
and backward, by itself: our attention, whose values are padded to the width of keys; the same
without fusing, as DeepSeek-V3's runs; one of narrow heads, as GPT's and Llama's; and the two norms.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from mhc_lightning.modules import ResidualConnection, Transformer
from mhc_lightning.modules.causal_attention import causal_attention
from mhc_lightning.modules.norm import RMSNorm
from timing import interleaved_seconds, report

VOCABULARY, HEAD, ROPE = 257, 64, 32
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


class PlainBlock(nn.Module):
    """LayerNorm and causal attention, LayerNorm and a GELU network, each added to its input."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim, bias=False) for _ in range(2))
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        heads = self.query_key_value(self.norms[0](x)).unflatten(-1, (3, -1, HEAD))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class PlainGpt(nn.Module):
    """A decoder with learned positions and little else."""

    def __init__(self, dim: int, blocks: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.Sequential(*(PlainBlock(dim, 4 * dim) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> logits [B, S, V]."""
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def ours(dim: int, blocks: int) -> Transformer:
    """The baseline of `training_step.py`."""
    return Transformer(
        connection=ResidualConnection,
        vocab_size=VOCABULARY,
        dim=dim,
        num_layers=blocks,
        num_heads=dim // HEAD,
        ffn_dim=hidden_width(dim),
        head_dim=HEAD,
        rope_dim=ROPE,
        kv_rank=dim // 2,
        init_std=0.02,
    )


def hidden_width(dim: int) -> int:
    """Of SwiGLU: as many parameters as a network of width 4 C without a gate."""
    return 8 * dim // 3 // 32 * 32


def deepseek(dim: int, blocks: int) -> nn.Module:
    """Transformers' DeepSeek-V3 without experts."""
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=dim,
        num_hidden_layers=blocks,
        num_attention_heads=dim // HEAD,
        num_key_value_heads=dim // HEAD,
        q_lora_rank=None,
        kv_lora_rank=dim // 2,
        qk_nope_head_dim=HEAD,
        qk_rope_head_dim=ROPE,
        v_head_dim=HEAD,
        intermediate_size=hidden_width(dim),
        first_k_dense_replace=blocks,
        use_cache=False,
    )
    return DeepseekV3ForCausalLM._from_config(config, attn_implementation="sdpa")


def llama(dim: int, blocks: int) -> nn.Module:
    """Transformers' Llama."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=dim,
        intermediate_size=hidden_width(dim),
        num_hidden_layers=blocks,
        num_attention_heads=dim // HEAD,
        use_cache=False,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


def step_of(model: nn.Module, tokens: Tensor, own_loss: bool = False) -> Callable[[], None]:
    """A training step of a model on the same tokens, with the same optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    def step() -> None:
        if own_loss:
            loss = model.loss(inputs, targets)  # type: ignore[operator]
        else:
            out = model(inputs)
            logits = out if isinstance(out, Tensor) else out.logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def shares(events: Iterable[Any]) -> dict[str, float]:
    """Parts of a profile's own time: products, attention, the optimizer, and all others."""
    times = dict.fromkeys(("products", "attention", "optimizer", "others"), 0.0)
    for event in events:
        kind = "others"
        if event.key in PRODUCTS:
            kind = "products"
        elif "attention" in event.key:
            kind = "attention"
        elif "adam" in event.key:
            kind = "optimizer"
        times[kind] += event.self_cpu_time_total
    total = sum(times.values())
    return {kind: round(time / total, 3) for kind, time in times.items()}


def parts(dim: int, batch: int, length: int) -> dict[str, Callable[[], None]]:
    """Forward and backward passes of the parts in which the models differ."""

    def heads(width: int) -> Tensor:
        return torch.randn(batch, dim // HEAD, length, width, requires_grad=True)

    query, key, value = heads(HEAD + ROPE), heads(HEAD + ROPE), heads(HEAD)
    narrow_query, narrow_key = heads(HEAD), heads(HEAD)
    x = torch.randn(batch * length, dim, requires_grad=True)
    attended, normed = torch.randn_like(value), torch.randn_like(x)
    rms, layer = RMSNorm(dim), nn.LayerNorm(dim, bias=False)

    def unfused() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed.backward(attended)

    def narrow() -> None:
        mixed = F.scaled_dot_product_attention(narrow_query, narrow_key, value, is_causal=True)
        mixed.backward(attended)

    return {
        "attention": lambda: causal_attention(query, key, value).backward(attended),
        "attention, unfused": unfused,
        "attention, narrow": narrow,
        "RMSNorm": lambda: rms(x).backward(normed),
        "LayerNorm": lambda: layer(x).backward(normed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()

    torch.set_num_threads(1)
    rows = []
    for dim in args.dims:
        torch.manual_seed(0)
        own = ours(dim, args.blocks)
        models: dict[str, nn.Module] = {
            "ours": own,
            "ours, its loss": own,
            "gpt": PlainGpt(dim, args.blocks, args.length),
            "llama": llama(dim, args.blocks),
            "deepseek_v3": deepseek(dim, args.blocks),
        }
        tokens = torch.randint(0, VOCABULARY, (args.batch, args.length + 1))
        steps = {
            name: step_of(model, tokens, own_loss=name.endswith("loss"))
            for name, model in models.items()
        }
        seconds = interleaved_seconds(steps, args.repeats, clock=time.process_time)
        medians = {name: summary["median"] for name, summary in seconds.items()}
        profiled = {}
        for name, step in steps.items():
            with profile(activities=[ProfilerActivity.CPU]) as record:
                step()
            profiled[name] = shares(record.key_averages())
        alone = interleaved_seconds(
            parts(dim, args.batch, args.length), 5 * args.repeats, clock=time.process_time
        )
        rows.append(
            {
                "dim": dim,
                "parameters": {
                    name: sum(p.numel() for p in model.parameters())
                    for name, model in models.items()
                },
                "milliseconds": {name: round(1e3 * value, 2) for name, value in medians.items()},
                "over_ours": {
                    name: round(value / medians["ours"], 3) for name, value in medians.items()
                },
                "share": profiled,
                "parts_milliseconds": {
                    name: round(1e3 * summary["median"], 3) for name, summary in alone.items()
                },
            }
        )
    report("baseline_step", {"arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
