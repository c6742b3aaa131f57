"""Blocks of language models: norm, attention, add, then norm, feed-forward, add."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mhc_lightning.errors import UserError
from mhc_lightning.upcycling.cache_name import cache_name
from mhc_lightning.upcycling.wide_block import Connect, wide_block


@wide_block("Phi3DecoderLayer", sublayers=2)
def phi3(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """Phi-3 and Phi-4: dropout of what is added."""

    def attention(u: Tensor) -> Tensor:
        y, _ = block.self_attn(hidden_states=block.input_layernorm(u), **kwargs)
        return block.resid_attn_dropout(y)

    def feed_forward(u: Tensor) -> Tensor:
        return block.resid_mlp_dropout(block.mlp(block.post_attention_layernorm(u)))

    return connect(1, connect(0, x, attention), feed_forward)


@wide_block("GptOssDecoderLayer", sublayers=2)
def gpt_oss(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """gpt-oss: the experts return the router's scores, too."""
    x = connect(
        0, x, lambda u: block.self_attn(hidden_states=block.input_layernorm(u), **kwargs)[0]
    )
    return connect(1, x, lambda u: block.mlp(block.post_attention_layernorm(u))[0])


@wide_block("GraniteDecoderLayer", sublayers=2)
def granite(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """Granite 3: what is added is multiplied by a constant."""

    def attention(u: Tensor) -> Tensor:
        y, _ = block.self_attn(hidden_states=block.input_layernorm(u), **kwargs)
        return y * block.residual_multiplier

    def feed_forward(u: Tensor) -> Tensor:
        return block.mlp(block.post_attention_layernorm(u)) * block.residual_multiplier

    return connect(1, connect(0, x, attention), feed_forward)


@wide_block("Qwen3NextDecoderLayer", "Qwen3_5DecoderLayer", sublayers=2)
def qwen3_next(
    block: Any,
    x: Any,
    connect: Connect,
    position_embeddings: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    **kwargs: Any,
) -> Any:
    """Qwen3-Next and Qwen 3.5: gated delta rule in most blocks, attention in the others."""
    name = cache_name()
    past = kwargs.pop(name, None)
    linear_name = "cache" if name == "cache" else "cache_params"

    def mixer(u: Tensor) -> Tensor:
        normed = block.input_layernorm(u)
        if block.block_type == "linear_attention":
            return block.linear_attn(
                hidden_states=normed,
                attention_mask=attention_mask,
                **{linear_name: past},
                **kwargs,
            )
        y, _ = block.self_attn(
            hidden_states=normed,
            attention_mask=attention_mask,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            **{name: past},
            **kwargs,
        )
        return y

    def feed_forward(u: Tensor) -> Tensor:
        y = block.mlp(block.post_attention_layernorm(u))
        return y[0] if isinstance(y, tuple) else y

    return connect(1, connect(0, x, mixer), feed_forward)


def _gpt2_sublayers(block: Any) -> int:
    if hasattr(block, "crossattention"):
        raise UserError(
            "this GPT2Block has cross-attention (add_cross_attention); only the decoder alone has"
            " an adapter"
        )
    return 2


@wide_block("GPT2Block", sublayers=_gpt2_sublayers)
def gpt2(
    block: Any,
    x: Any,
    connect: Connect,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    """GPT-2: the decoder alone, so that what is meant for cross-attention is left out."""
    x = connect(0, x, lambda u: block.attn(block.ln_1(u), **kwargs)[0])
    return connect(1, x, lambda u: block.mlp(block.ln_2(u)))


def _opt_sublayers(block: Any) -> int:
    if not block.do_layer_norm_before:
        raise UserError(
            "an OPTDecoderLayer with do_layer_norm_before=False (OPT-350M) cannot compute the same"
            " function on streams: such blocks norm the sum x + F(x) itself"
        )
    return 2


@wide_block("OPTDecoderLayer", sublayers=_opt_sublayers)
def opt(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """OPT: norms with names of their own, and dropout of what is added."""

    def dropout(y: Tensor) -> Tensor:
        return functional.dropout(y, block.dropout, block.training)

    def attention(u: Tensor) -> Tensor:
        y, _ = block.self_attn(hidden_states=block.self_attn_layer_norm(u), **kwargs)
        return dropout(y)

    def feed_forward(u: Tensor) -> Tensor:
        y = block.activation_fn(block.fc1(block.final_layer_norm(u)))
        return dropout(block.fc2(y))

    return connect(1, connect(0, x, attention), feed_forward)


def _bloom_sublayers(block: Any) -> int:
    if block.apply_residual_connection_post_layernorm:
        raise UserError(
            "a BloomBlock with apply_residual_connection_post_layernorm cannot compute the same"
            " function on streams: such blocks add to their normed input"
        )
    return 2


@wide_block("BloomBlock", sublayers=_bloom_sublayers)
def bloom(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """BLOOM: the sub-layers add what they are given as the residual, here zeros."""
    weights = None

    def attention(u: Tensor) -> Tensor:
        nonlocal weights
        zeros = torch.zeros_like(u)
        y, weights = block.self_attention(block.input_layernorm(u), zeros, **kwargs)
        return y

    def feed_forward(u: Tensor) -> Tensor:
        return block.mlp(block.post_attention_layernorm(u), torch.zeros_like(u))

    return connect(1, connect(0, x, attention), feed_forward), weights
