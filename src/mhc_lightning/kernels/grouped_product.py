"""Grouped matrix product: each run of rows times its own matrix, for mixtures of experts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mhc_lightning.kernels.transforms import transforming


def grouped_product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply each run of `rows` by its own matrix, in the dtype of `rows`.

    Within a transform of `torch.func`, which may batch `ends`, every matrix multiplies all rows: E
    times the work.

    Args:
        rows: [R, in], one run after the other.
        weights: [E, in, out], a matrix for each run; it is taken to the dtype of `rows`.
        ends: The end of each run [E], int32, ascending to R.

    Returns:
        [R, out].
    """
    weights = weights.to(rows.dtype)
    if transforming():
        return _by_choice(rows, weights, ends)
    # torch's `grouped_mm` takes no float64, and only widths that are multiples of 16 bytes. It can
    # be traced in bfloat16 only.
    aligned = all(width * rows.dtype.itemsize % 16 == 0 for width in weights.shape[1:])
    traced = torch.compiler.is_compiling() or rows.is_meta or isinstance(rows, FakeTensor)
    empty = not traced and not len(rows)  # the experts of this process may have no tokens
    fits = aligned and rows.dtype != torch.float64 and not empty
    if fits and not (traced and rows.dtype != torch.bfloat16):
        return F.grouped_mm(rows, weights, offs=ends)
    return grouped_product_op(rows, weights, ends) if traced else _by_runs(rows, weights, ends)


def _by_choice(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The products of all rows with each matrix, from which each run takes its own."""
    places = torch.arange(rows.shape[0], device=rows.device)[:, None]
    products = rows @ weights[-1]
    for k in reversed(range(weights.shape[0] - 1)):
        products = torch.where(places < ends[k], rows @ weights[k], products)
    return products


def _by_runs(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    runs = _runs(rows, ends)
    return torch.cat([run @ weight for run, weight in zip(runs, weights, strict=True)])


def _runs(rows: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    return rows.tensor_split(ends[:-1].long().cpu())


@torch.library.custom_op("mhc_lightning::grouped_product", mutates_args=())
def grouped_product_op(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """[R, in], [E, in, out], [E] -> [R, out]."""
    return _by_runs(rows, weights, ends)


@torch.library.custom_op("mhc_lightning::grouped_product_backward", mutates_args=())
def grouped_product_backward_op(
    grad: Tensor, rows: Tensor, weights: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights."""
    pairs = zip(_runs(rows, ends), _runs(grad, ends), strict=True)
    weights_grad = torch.stack([run.t() @ run_grad for run, run_grad in pairs])
    return _by_runs(grad, weights.mT, ends), weights_grad


@grouped_product_op.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


@grouped_product_backward_op.register_fake
def _(grad: Tensor, rows: Tensor, weights: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *grouped_product_backward_op(grad, *ctx.saved_tensors), None


grouped_product_op.register_autograd(_backward, setup_context=_setup_context)
