"""Blocks whose attention and feed-forward read the same input: ``x + attention(x) + mlp(x)``.

The two branches are one sub-layer with one connection: the block adds once.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional

from mhc_lightning.upcycling.wide_block import Connect, wide_block


@wide_block("CohereDecoderLayer", "Cohere2DecoderLayer", sublayers=1)
def cohere(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """Command R and Command A: one norm for both branches."""

    def both(u: Tensor) -> Tensor:
        normed = block.input_layernorm(u)
        return block.self_attn(hidden_states=normed, **kwargs)[0] + block.mlp(normed)

    return connect(0, x, both)


@wide_block("PhiDecoderLayer", sublayers=1)
def phi(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """Phi 1, 1.5 and 2: one norm, and dropout of each branch."""

    def both(u: Tensor) -> Tensor:
        normed = block.input_layernorm(u)
        attended, _ = block.self_attn(hidden_states=normed, **kwargs)
        return block.resid_dropout(attended) + block.resid_dropout(block.mlp(normed))

    return connect(0, x, both)


def _one_if_parallel(block: Any) -> int:
    return 1 if block.use_parallel_residual else 2


@wide_block("GPTNeoXLayer", sublayers=_one_if_parallel)
def gpt_neox(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """GPT-NeoX and Pythia: a norm for each branch; one after the other in some checkpoints."""

    def attention(u: Tensor) -> Tensor:
        y, _ = block.attention(block.input_layernorm(u), **kwargs)
        return block.post_attention_dropout(y)

    def feed_forward(u: Tensor) -> Tensor:
        return block.post_mlp_dropout(block.mlp(block.post_attention_layernorm(u)))

    if block.use_parallel_residual:
        return connect(0, x, lambda u: attention(u) + feed_forward(u))
    return connect(1, connect(0, x, attention), feed_forward)


@wide_block("StableLmDecoderLayer", sublayers=_one_if_parallel)
def stablelm(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """StableLM 2, and StableLM 2 12B, whose branches share a norm."""

    def attention(normed: Tensor) -> Tensor:
        return block.self_attn(hidden_states=normed, **kwargs)[0]

    def feed_forward(normed: Tensor) -> Tensor:
        return block.dropout(block.mlp(normed))

    def both(u: Tensor) -> Tensor:
        normed = block.input_layernorm(u)
        return attention(normed) + feed_forward(normed)

    if block.use_parallel_residual:
        return connect(0, x, both)
    x = connect(0, x, lambda u: attention(block.input_layernorm(u)))
    return connect(1, x, lambda u: feed_forward(block.post_attention_layernorm(u)))


def _falcon_is_parallel(block: Any) -> bool:
    return block.config.new_decoder_architecture or block.config.parallel_attn


@wide_block("FalconDecoderLayer", sublayers=lambda block: 1 if _falcon_is_parallel(block) else 2)
def falcon(block: Any, x: Any, connect: Connect, **kwargs: Any) -> Any:
    """Falcon: branches beside each other with one norm or two, or one after the other."""
    weights = None

    def attend(normed: Tensor) -> Tensor:
        nonlocal weights
        y, weights = block.self_attention(normed, **kwargs)
        return y

    def dropout(y: Tensor, p: float) -> Tensor:
        return functional.dropout(y, p, block.training)

    def both(u: Tensor) -> Tensor:
        if hasattr(block, "ln_attn"):
            y = attend(block.ln_attn(u)) + block.mlp(block.ln_mlp(u))
        else:
            normed = block.input_layernorm(u)
            y = attend(normed) + block.mlp(normed)
        return dropout(y, block.config.hidden_dropout)

    def attention(u: Tensor) -> Tensor:
        return dropout(attend(block.input_layernorm(u)), block.config.attention_dropout)

    def feed_forward(u: Tensor) -> Tensor:
        return dropout(block.mlp(block.post_attention_layernorm(u)), block.config.hidden_dropout)

    if _falcon_is_parallel(block):
        x = connect(0, x, both)
    else:
        x = connect(1, connect(0, x, attention), feed_forward)
    return x, weights
