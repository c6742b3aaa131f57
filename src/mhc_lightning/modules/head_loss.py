"""The loss of hidden vectors under an output projection, fused with it where that is possible.

Shapes: B batch, S sequence, C width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_lightning.kernels import linear_cross_entropy, token_losses
from mhc_lightning.kernels.cross_entropy import check_targets
from mhc_lightning.kernels.precision import widened
from mhc_lightning.modules.plain_projection import plain_weight


def count_targets(targets: Tensor, ignore_index: int) -> Tensor:
    """The number of targets that count in a mean loss, an int64 scalar."""
    return (targets != ignore_index).sum()


def mean_head_loss(output: nn.Module, hidden: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy of targets [B, S] for `hidden` [B, S, C], a float32 scalar.

    The logits [B, S, V] exist at once only if `output` is no plain projection and has to be called:
    see `plain_weight`.
    """
    weight = plain_weight(output)
    if weight is None:
        losses = _losses_of_called(output, hidden, targets, ignore_index)
        return losses.sum() / count_targets(targets, ignore_index).clamp(min=1)
    return linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), ignore_index)


def head_token_losses(
    output: nn.Module, hidden: Tensor, targets: Tensor, ignore_index: int
) -> Tensor:
    """Cross-entropy of each target [B, S], float32, without a gradient; 0 where it is ignored."""
    weight = plain_weight(output)
    if weight is None:
        with torch.no_grad():
            losses = _losses_of_called(output, hidden, targets, ignore_index)
    else:
        losses = token_losses(hidden.flatten(0, 1), weight, targets.flatten(), ignore_index)
    return losses.view(targets.shape)


def _losses_of_called(
    output: nn.Module, hidden: Tensor, targets: Tensor, ignore_index: int
) -> Tensor:
    """The loss of each target [B·S], by an output that may be any module."""
    logits = output(hidden).flatten(0, 1)  # [B·S, V]
    check_targets(targets, logits.shape[-1], ignore_index)
    return F.cross_entropy(
        widened(logits), targets.flatten(), ignore_index=ignore_index, reduction="none"
    )
