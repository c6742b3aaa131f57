"""Gradient checkpointing of blocks, as transformers' models have it."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn


def checkpoint_blocks(
    blocks: Iterable[nn.Module], enable: bool, function: Callable[..., Any], every: int
) -> None:
    """Have blocks run again in backward, or no longer.

    Args:
        blocks: The blocks, in their order.
        enable: Whether they do.
        function: `torch.utils.checkpoint.checkpoint`, with its settings.
        every: Only every so many of the blocks do.
    """
    for index, block in enumerate(blocks):
        chosen = enable and index % every == 0
        vars(block)["gradient_checkpointing"] = chosen
        inside = vars(block).pop("forward", None)  # ours, or what accelerate put there
        if isinstance(inside, partial) and inside.func is _checkpointed:
            inside = inside.args[2]
        if inside is not None:
            vars(block)["forward"] = inside
        if chosen:
            vars(block)["forward"] = partial(_checkpointed, block, function, inside)


def _checkpointed(
    block: nn.Module,
    function: Callable[..., Any],
    inside: Callable[..., Any] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A block's forward pass (its class's, or `inside`), run again in backward when it trains."""
    forward = inside or partial(type(block).forward, block)
    if block.training and torch.is_grad_enabled():
        return function(forward, *args, **kwargs)
    return forward(*args, **kwargs)
