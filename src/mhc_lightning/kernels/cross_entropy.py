"""Output projection and cross-entropy together, a chunk of tokens at a time.

With a vocabulary of 129,280 the logits of one 4,096-token sequence take 2 GiB in float32. Here
only one chunk of logits exists at a time. Its gradient is taken at once, so nothing is recomputed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhc_lightning.errors import UserError
from mhc_lightning.kernels.argument_checks import check_values
from mhc_lightning.kernels.precision import compute_dtype, full_precision, widened
from mhc_lightning.kernels.transforms import transforming

IGNORE_INDEX = -100
"""The target that stands for none, as in torch."""

# Logits per chunk: 256 MiB in float32.
_CHUNK_LOGITS = 2**26


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward keeps the gradients of the losses' sum; backward divides them by their number.

    Undivided gradients are as large as weights and hidden values, which float16 holds. Divided by
    thousands of tokens they would vanish in float16 before a loss scale could raise them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index):  # type: ignore[no-untyped-def]
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        ctx.dtypes = hidden.dtype, weight.dtype
        low_weight = weight.to(hidden.dtype)
        losses = []
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=compute_dtype(weight)) if need_weight else None
        start = 0
        for rows, wanted in _chunks(hidden, targets, weight.shape[0]):
            ignored = (wanted == ignore_index)[:, None]
            rows = rows.masked_fill(ignored, 0)  # they add nothing to weight_grad
            log_probs = widened(rows @ low_weight.t()).log_softmax(-1)
            losses.append(
                F.nll_loss(log_probs, wanted, ignore_index=ignore_index, reduction="none")
            )
            if need_hidden or need_weight:
                grad = log_probs.exp_()
                column = wanted.masked_fill(ignored.squeeze(1), 0)
                grad[torch.arange(len(rows), device=rows.device), column] -= 1
                low_grad = grad.to(rows.dtype)
                if hidden_grad is not None:
                    part = hidden_grad[start : start + len(rows)]
                    torch.mm(low_grad, low_weight, out=part)
                    part.masked_fill_(ignored, 0)
                if weight_grad is not None:
                    # A sum over tokens can leave the range of float16.
                    narrow = rows.dtype == torch.float16
                    weight_grad += grad.t() @ rows.float() if narrow else low_grad.t() @ rows
            start += len(rows)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.count = (targets != ignore_index).sum().clamp(min=1)
        return torch.cat(losses).sum() / ctx.count

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            # A second derivative is wanted: have it refused, also where `grad` is a constant.
            grad = grad.detach().requires_grad_()
        return *_LinearCrossEntropy._scaled(ctx, grad), None, None

    @staticmethod
    @once_differentiable
    def _scaled(ctx, grad):  # type: ignore[no-untyped-def]
        scale = (grad / ctx.count).view(1)  # with a dimension, it keeps its dtype in products
        return tuple(
            None
            if undivided is None
            else torch.mul(undivided, scale, out=torch.empty_like(undivided, dtype=dtype))
            for undivided, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )


def _transformable(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The loss of all logits at once, for transforms of `torch.func`."""
    logits = widened(hidden @ weight.to(hidden.dtype).t())
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1)


def tokens_per_chunk(vocabulary: int) -> int:
    """Number of tokens whose logits exist at once."""
    return max(1, _CHUNK_LOGITS // vocabulary)


def _chunks(hidden: Tensor, targets: Tensor, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    size = tokens_per_chunk(vocabulary)
    return list(zip(hidden.split(size), targets.split(size), strict=True))


def check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Refuse a target that is no class. A GPU stops by itself, later: the host does not wait.

    Raises:
        UserError: A target is neither from 0 to `vocabulary - 1` nor `ignore_index`.
    """
    fits = ((targets >= 0) & (targets < vocabulary)) | (targets == ignore_index)
    what = f"targets must be from 0 to {vocabulary - 1}, or {ignore_index} for none"
    try:
        check_values(fits.all(), what)
    except UserError as error:
        raise UserError(f"{what}, not {targets[~fits][0]}") from error


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T` against `targets`, in nats.

    Products run in the dtype of `hidden`, softmax and sums in float32 (float64 for float64).
    Gradients are multiplied by the incoming gradient before they are rounded to the dtypes of
    `hidden` and `weight`, so that a loss scale does its work in float16.

    Args:
        hidden: [tokens, C].
        weight: [V, C]; it is taken to the dtype of `hidden`.
        targets: Class indices [tokens], int64.
        ignore_index: The target of tokens that are left out: the mean is over the others, and they
            get no gradient. Without any others the loss and its gradients are 0.

    Returns:
        A scalar, float32 (float64 for float64 `hidden`).

    Raises:
        UserError: A target is neither a class nor `ignore_index`. On a GPU that is an assertion
            on the device, since raising here would have to wait for it.
        RuntimeError: A second derivative is asked for.
    """
    if transforming():
        with full_precision(hidden):
            return _transformable(hidden, weight, targets, ignore_index)
    check_targets(targets, weight.shape[0], ignore_index)
    with full_precision(hidden):
        return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index)


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """The cross-entropy of every token [tokens], without a gradient; arguments as above.

    It is 0 where the target is `ignore_index`.
    """
    check_targets(targets, weight.shape[0], ignore_index)
    with full_precision(hidden):
        low_weight = weight.to(hidden.dtype)
        return torch.cat(
            [
                F.cross_entropy(
                    widened(rows @ low_weight.t()),
                    wanted,
                    ignore_index=ignore_index,
                    reduction="none",
                )
                for rows, wanted in _chunks(hidden, targets, weight.shape[0])
            ]
        )
