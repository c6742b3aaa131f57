"""Llama and the families of transformers whose decoder blocks are written like Llama's."""

from typing import Any

from mhc_lightning.upcycling.wide_block import Connect, wide_block


@wide_block(
    "LlamaDecoderLayer",  # SmolLM too
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen2MoeDecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3MoeDecoderLayer",
    "MinistralDecoderLayer",
    "MixtralDecoderLayer",
    "SmolLM3DecoderLayer",
    "GemmaDecoderLayer",
    "OlmoDecoderLayer",
    "OlmoeDecoderLayer",
    "PhimoeDecoderLayer",
    "DeepseekV2DecoderLayer",
    "DeepseekV3DecoderLayer",
    "GlmDecoderLayer",
    "Glm4MoeDecoderLayer",
    "NemotronDecoderLayer",
    "Starcoder2DecoderLayer",
    "Ernie4_5DecoderLayer",
    "SeedOssDecoderLayer",
    sublayers=2,
)
def pre_norm_decoder(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """Norm, attention, add; norm, feed-forward network or experts, add."""
    x = connect(0, x, lambda u: block.self_attn(block.input_layernorm(u), **kwargs)[0])
    return connect(1, x, lambda u: block.mlp(block.post_attention_layernorm(u)))
