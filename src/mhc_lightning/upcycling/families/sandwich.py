"""Blocks with a norm on both sides of a branch: ``x + after(F(before(x)))``."""

from typing import Any

from torch import Tensor

from mhc_lightning.upcycling.wide_block import Connect, wide_block


@wide_block("Gemma2DecoderLayer", "Gemma3DecoderLayer", sublayers=2)
def gemma(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """Gemma 2 and 3: the norms after a branch are named after the sub-layer."""

    def attention(u: Tensor) -> Tensor:
        y, _ = block.self_attn(hidden_states=block.input_layernorm(u), **kwargs)
        return block.post_attention_layernorm(y)

    def feed_forward(u: Tensor) -> Tensor:
        return block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(u)))

    return connect(1, connect(0, x, attention), feed_forward)


@wide_block("Glm4DecoderLayer", sublayers=2)
def glm4(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """GLM-4 of 2025: `post_attention_layernorm` is the norm *before* the feed-forward."""

    def attention(u: Tensor) -> Tensor:
        y, _ = block.self_attn(hidden_states=block.input_layernorm(u), **kwargs)
        return block.post_self_attn_layernorm(y)

    def feed_forward(u: Tensor) -> Tensor:
        return block.post_mlp_layernorm(block.mlp(block.post_attention_layernorm(u)))

    return connect(1, connect(0, x, attention), feed_forward)


@wide_block("Olmo2DecoderLayer", "Olmo3DecoderLayer", "Exaone4DecoderLayer", sublayers=2)
def norm_after(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """OLMo 2 and 3, EXAONE 4: a norm after the branch only, ``x + norm(F(x))``.

    No norm takes away the scale of what a sub-layer reads, so this is the same function only with
    read weights whose sum is one.
    """

    def attention(u: Tensor) -> Tensor:
        return block.post_attention_layernorm(block.self_attn(hidden_states=u, **kwargs)[0])

    def feed_forward(u: Tensor) -> Tensor:
        return block.post_feedforward_layernorm(block.mlp(u))

    return connect(1, connect(0, x, attention), feed_forward)
