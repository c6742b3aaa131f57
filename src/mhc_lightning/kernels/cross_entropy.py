"""Output projection and cross-entropy together, a chunk of tokens at a time.

With a vocabulary of 129,280 the logits of one 4,096-token sequence take 2 GiB in float32. Here
no more than a chunk of them exists, and its gradient is taken at once, so nothing is recomputed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits per chunk: 256 MiB in float32.
_CHUNK_LOGITS = 2**26


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):  # type: ignore[no-untyped-def]
        need_hidden, need_weight, _ = ctx.needs_input_grad
        ctx.dtypes = hidden.dtype, weight.dtype
        low_weight = weight.to(hidden.dtype)
        losses = []
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=_wide(weight)) if need_weight else None
        start = 0
        for rows, targets_of_rows in _chunks(hidden, targets, weight.shape[0]):
            log_probs = (rows @ low_weight.t()).to(_wide(rows)).log_softmax(-1)
            losses.append(F.nll_loss(log_probs, targets_of_rows, reduction="none"))
            if need_hidden or need_weight:
                grad = log_probs.exp_()
                grad[torch.arange(len(rows), device=rows.device), targets_of_rows] -= 1
                grad = grad.div_(len(targets)).to(rows.dtype)
                if hidden_grad is not None:
                    torch.mm(grad, low_weight, out=hidden_grad[start : start + len(rows)])
                if weight_grad is not None:
                    weight_grad += grad.t() @ rows
            start += len(rows)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return torch.cat(losses).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        hidden_grad, weight_grad = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if hidden_grad is None else (hidden_grad * grad).to(hidden_dtype),
            None if weight_grad is None else (weight_grad * grad).to(weight_dtype),
            None,
        )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def tokens_per_chunk(vocabulary: int) -> int:
    """How many tokens' logits exist at once."""
    return max(1, _CHUNK_LOGITS // vocabulary)


def _chunks(hidden: Tensor, targets: Tensor, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    size = tokens_per_chunk(vocabulary)
    return list(zip(hidden.split(size), targets.split(size), strict=True))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of ``hidden @ weight.T`` against ``targets``, in nats.

    Products run in the dtype of ``hidden``, softmax and sums in float32 (float64 for float64).

    Args:
        hidden: [tokens, C].
        weight: [V, C]; it is taken to the dtype of ``hidden``.
        targets: Class indices [tokens], int64.

    Returns:
        A scalar, float32 (float64 for float64 ``hidden``).
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, targets)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of every token [tokens], without a gradient; arguments as above."""
    with torch.autocast(hidden.device.type, enabled=False):
        low_weight = weight.to(hidden.dtype)
        return torch.cat(
            [
                F.cross_entropy((rows @ low_weight.t()).to(_wide(rows)), wanted, reduction="none")
                for rows, wanted in _chunks(hidden, targets, weight.shape[0])
            ]
        )
