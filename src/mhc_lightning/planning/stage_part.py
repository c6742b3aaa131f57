"""The part of a network that one pipeline stage holds."""

import copy

from torch import nn

from mhc_lightning.modules import Transformer


def part_of(model: Transformer, blocks: range) -> Transformer:
    """Consecutive blocks of a model, with the embedding or the head at the model's ends.

    Args:
        model: The whole model; the part shares its modules.
        blocks: Numbers of the blocks.

    Returns:
        A network for counting, not for running: missing modules are `nn.Identity`.
    """
    part = copy.copy(model)
    part._modules = dict(model._modules)
    part.blocks = nn.ModuleList(model.blocks[k] for k in blocks)
    absent = [] if blocks.start == 0 else [*model.parts_before_blocks]
    absent += [] if blocks.stop == len(model.blocks) else [*model.parts_behind_blocks]
    for name in absent:
        setattr(part, name, nn.Identity())
    return part


def has_embedding(part: Transformer) -> bool:
    """True if the part takes tokens."""
    return isinstance(part.embedding, nn.Embedding)


def has_head(part: Transformer) -> bool:
    """True if the part computes the loss."""
    return isinstance(part.output, nn.Linear)


def width_of(part: Transformer) -> int:
    """Width of the streams, C."""
    return part.blocks[0].attention_connection.dim  # type: ignore[return-value]
