"""Blocks of diffusion transformers."""

from typing import Any

from torch import Tensor

from mhc_lightning.errors import UserError
from mhc_lightning.upcycling.wide_block import Connect, wide_block


def _dit_sublayers(block: Any) -> int:
    if block.norm_type != "ada_norm_zero" or block.attn2 is not None:
        raise UserError(
            f"this BasicTransformerBlock has norm_type={block.norm_type!r}"
            f"{'' if block.attn2 is None else ' and cross-attention'}; only DiT's (ada_norm_zero)"
            " have an adapter, and docs/your_project/upcycling_families.md says how to write one"
        )
    return 2


@wide_block("BasicTransformerBlock", sublayers=_dit_sublayers)
def dit(
    block: Any,
    x: Any,
    connect: Connect,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    timestep: Any = None,
    cross_attention_kwargs: Any = None,
    class_labels: Any = None,
    added_cond_kwargs: Any = None,
) -> Any:
    """DiT of diffusers: shifts, scales and gates depend on time and class, not on the streams.

    `norm1` computes them all, and drops classes at random in training, so it runs once.
    """
    modulation: tuple[Tensor, ...] = ()

    def attention(u: Tensor) -> Tensor:
        nonlocal modulation
        normed, gate, *modulation = block.norm1(u, timestep, class_labels, hidden_dtype=u.dtype)
        y = block.attn1(normed, attention_mask=attention_mask, **(cross_attention_kwargs or {}))
        return gate.unsqueeze(1) * y

    def feed_forward(u: Tensor) -> Tensor:
        shift, scale, gate = (part.unsqueeze(1) for part in modulation)
        return gate * block.ff(block.norm3(u) * (1 + scale) + shift)

    return connect(1, connect(0, x, attention), feed_forward)
