"""Blocks of vision transformers, and of text encoders that are built like them."""

from typing import Any

from torch import Tensor

from mhc_lightning.upcycling.wide_block import Connect, wide_block


@wide_block(
    "ViTLayer", "DeiTLayer", "ViTMSNLayer", "ViTMAELayer", "IJepaLayer", "ASTLayer", sublayers=2
)
def vit(block: Any, x: Any, connect: Connect, attention_mask: Any = None, **kwargs: Any) -> Any:
    """ViT and its relatives: dropout of what is added."""

    def attention(u: Tensor) -> Tensor:
        y, _ = block.attention(block.layernorm_before(u), attention_mask, **kwargs)
        return block.dropout(y)

    def feed_forward(u: Tensor) -> Tensor:
        return block.dropout(block.mlp(block.layernorm_after(u)))

    return connect(1, connect(0, x, attention), feed_forward)


@wide_block("Dinov2Layer", "Dinov2WithRegistersLayer", "DINOv3ViTLayer", sublayers=2)
def dino(block: Any, x: Any, connect: Connect, attention_mask: Any = None, **kwargs: Any) -> Any:
    """DINOv2 and v3: a learned scale of each channel that is added, and stochastic depth."""

    def attention(u: Tensor) -> Tensor:
        y, _ = block.attention(block.norm1(u), attention_mask=attention_mask, **kwargs)
        return block.drop_path(block.layer_scale1(y))

    def feed_forward(u: Tensor) -> Tensor:
        return block.drop_path(block.layer_scale2(block.mlp(block.norm2(u))))

    return connect(1, connect(0, x, attention), feed_forward)


@wide_block("CLIPEncoderLayer", "SiglipEncoderLayer", "Siglip2EncoderLayer", sublayers=2)
def clip(block: Any, x: Any, connect: Connect, attention_mask: Any = None, **kwargs: Any) -> Any:
    """One tower of CLIP or SigLIP."""
    kwargs["attention_mask"] = attention_mask
    x = connect(0, x, lambda u: block.self_attn(hidden_states=block.layer_norm1(u), **kwargs)[0])
    return connect(1, x, lambda u: block.mlp(block.layer_norm2(u)))
