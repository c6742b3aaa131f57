"""A training step of a family member beside transformers' DeepSeek-V3 of equal dimensions (CPU).

Four models in one process, interleaved: our baseline and our mHC model, transformers' V3 decoder
(no query rank), and the same decoder with ``DeepseekV4HyperConnection`` around its sub-layers.

    python benchmarks/family_step.py > benchmarks/results/family_step_cpu.json
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from members import experiment_of
from mhc_lightning.cli.instantiation import build
from timing import interleaved_seconds, report


class HyperConnectedLayer(nn.Module):
    """A V3 decoder layer whose sub-layers read from and write to V4's streams."""

    layer: Any

    def __init__(self, layer: nn.Module, config: DeepseekV4Config) -> None:
        super().__init__()
        self.layer = layer
        mixes = [DeepseekV4HyperConnection(config) for _ in range(2)]
        self.mixes = nn.ModuleList(mixes)
        for mix in mixes:
            nn.init.normal_(mix.fn, std=0.02)
            nn.init.zeros_(mix.base)
            nn.init.constant_(mix.scale, 0.01)

    def forward(self, streams: Tensor, **kwargs: Any) -> Tensor:
        """[B, S, n, C] -> [B, S, n, C]."""
        streams = self._connect(
            0,
            streams,
            lambda u: self.layer.self_attn(hidden_states=self.layer.input_layernorm(u), **kwargs)[
                0
            ],
        )
        return self._connect(
            1, streams, lambda u: self.layer.mlp(self.layer.post_attention_layernorm(u))
        )

    def _connect(self, index: int, streams: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        post, comb, collapsed = self.mixes[index](streams)
        mixed = torch.matmul(comb.to(streams.dtype).transpose(-1, -2), streams)
        return post.to(streams.dtype).unsqueeze(-1) * sublayer(collapsed).unsqueeze(-2) + mixed


class HyperConnectedV3(nn.Module):
    """transformers' V3 with four streams from the embedding to the final norm."""

    def __init__(self, model: DeepseekV3ForCausalLM, num_streams: int) -> None:
        super().__init__()
        self.model = model
        config = DeepseekV4Config(hidden_size=model.config.hidden_size, hc_mult=num_streams)
        self.num_streams = num_streams
        self.layers = nn.ModuleList(HyperConnectedLayer(x, config) for x in model.model.layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> logits [B, S, V]."""
        inner = self.model.model
        x = inner.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1])[None]
        angles = inner.rotary_emb(x, position_ids=positions)
        streams = x.unsqueeze(-2).repeat(1, 1, self.num_streams, 1)
        for layer in self.layers:
            # No mask: SDPA is causal by itself then.
            streams = layer(streams, position_embeddings=angles, attention_mask=None)
        return self.model.lm_head(inner.norm(streams.mean(-2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="50m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    models = {
        name: build(experiment_of(f"{name}_{args.size}"), "model") for name in ("baseline", "mhc")
    }
    sizes = experiment_of(f"mhc_{args.size}").values()["model"]

    def theirs() -> DeepseekV3ForCausalLM:
        config = DeepseekV3Config(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["dim"],
            num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["num_heads"],
            num_key_value_heads=sizes["num_heads"],
            q_lora_rank=None,
            kv_lora_rank=sizes["kv_rank"],
            qk_nope_head_dim=sizes["head_dim"],
            qk_rope_head_dim=sizes["rope_dim"],
            v_head_dim=sizes["head_dim"],
            n_routed_experts=sizes["num_experts"],
            num_experts_per_tok=sizes["num_active_experts"],
            n_shared_experts=sizes["num_shared_experts"],
            moe_intermediate_size=sizes["ffn_dim"],
            intermediate_size=sizes["ffn_dim"]
            * (sizes["num_active_experts"] + sizes["num_shared_experts"]),
            first_k_dense_replace=sizes["num_dense_layers"],
            n_group=1,
            topk_group=1,
            use_cache=False,
        )
        return DeepseekV3ForCausalLM._from_config(config, attn_implementation="sdpa")

    plain = theirs()
    models["transformers_v3"] = plain
    models["transformers_v3_v4_connection"] = HyperConnectedV3(theirs(), sizes["num_streams"])
    tokens = torch.randint(0, sizes["vocab_size"], (args.batch, args.length + 1))
    targets = tokens[:, 1:].flatten()

    def step_of(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            out = model(tokens[:, :-1])
            logits = out if isinstance(out, Tensor) else out.logits
            F.cross_entropy(logits.flatten(0, 1), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    seconds = interleaved_seconds(
        {name: step_of(model) for name, model in models.items()}, args.repeats, warmup=1
    )
    medians = {name: summary["median"] for name, summary in seconds.items()}
    report(
        "family_step",
        {
            "arguments": vars(args),
            "parameters": {
                name: sum(p.numel() for p in model.parameters()) for name, model in models.items()
            },
            "seconds": {
                name: {key: round(value, 4) for key, value in summary.items()}
                for name, summary in seconds.items()
            },
            "mhc_over_baseline": medians["mhc"] / medians["baseline"],
            "speed_over_transformers": {
                "baseline": medians["transformers_v3"] / medians["baseline"],
                "mhc": medians["transformers_v3_v4_connection"] / medians["mhc"],
            },
        },
    )


if __name__ == "__main__":
    main()
