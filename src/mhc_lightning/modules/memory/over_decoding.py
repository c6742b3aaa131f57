"""Over-Decoding: a loss of the token after the next, in training (after arXiv 2501.16975).

Shapes: B batch, S sequence, C width of the network.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mhc_lightning.modules.head_loss import count_targets, mean_head_loss
from mhc_lightning.modules.memory.memory import HeadMemory


class OverDecoding(HeadMemory):
    """Predicts the token after the next one with a projection of its own before the head.

    With h the hidden vector of a position, W_out the network's output projection and x the tokens,
    over the T next tokens x_{t+1} that count, where x_{t+2} counts too:

        weight · Σ_t -log softmax(W_out W h_t)[x_{t+2}] / T

    The paper weighs an n-gram prediction loss by 0.1 and does not say how its head looks. This one
    is the simplest that shares the output projection. It is a sum over T, as the loss of the next
    tokens is, so that neither depends on how a batch is cut into micro-batches.

    Args:
        dim: C.
        weight: Factor of the loss.
    """

    def __init__(self, dim: int, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.projection = nn.Linear(dim, dim, bias=False)

    def forward(
        self, output: nn.Module, hidden: Tensor, targets: Tensor, ignore_index: int
    ) -> Tensor:
        """See `HeadMemory`."""
        after = F.pad(targets[:, 1:], (0, 1), value=ignore_index)
        # Behind a next token that does not count is another document, or padding.
        after = after.masked_fill(targets == ignore_index, ignore_index)
        mean = mean_head_loss(output, self.projection(hidden), after, ignore_index)
        counted = count_targets(targets, ignore_index)
        return self.weight * mean * count_targets(after, ignore_index) / counted.clamp(min=1)
