"""Muon for matrices and AdamW for all other parameters, as one optimizer.

torch's own Muon takes two-dimensional parameters only. Here the experts of a layer are one
three-dimensional parameter, and with FSDP2 parameters are sharded. The Newton-Schulz iteration is
the hybrid one of DeepSeek-V4 (arXiv 2606.19348).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

from mhc_lightning.optimizers.meshes import by_mesh
from mhc_lightning.optimizers.row_updates import ROWS, UpdatesRows

# Eight steps that drive all singular values near one, and two that converge to one.
_NEWTON_SCHULZ = 8 * [(3.4445, -4.7750, 2.0315)] + 2 * [(2.0, -1.5, 0.5)]

# The norm at which an update is halved. Norms that matter in training are far larger (1e-5 of a
# clipped gradient's norm is common). So a decayed direction, or pure rounding, moves nothing.
_FADES_AT = 1e-7


class MuonAdamW(UpdatesRows):
    """Orthogonalised momentum for groups with `muon=True`, torch's AdamW for the others.

    A Muon step treats each matrix, also each matrix of a stack, by itself (arXiv 2502.16982):

        momentum ← β · momentum + (1 - β) · grad
        look_ahead = β · momentum + (1 - β) · grad
        matrix ← (1 - lr · weight_decay) · matrix
                 - lr · update_rms · sqrt(max(m, n)) · orthogonalise(look_ahead)

    A matrix whose gradient is zero (an expert without tokens) follows its momentum, as in other
    implementations, until the momentum has decayed: see `orthogonalise`.

    Schedulers that cycle the momentum, such as `OneCycleLR`, cycle AdamW's first beta and do not
    change Muon's momentum.

    Args:
        groups: Parameter groups: dicts with `params`, `muon`, and values that differ from those
            below. The parameters of a Muon group are matrices [m, n] or stacks [..., m, n]. AdamW
            trains a group that is added later without `muon`. Groups with `rows` hold tables, and
            are neither's: see `row_updates`.
        lr: Learning rate of both.
        momentum: β of Muon.
        update_rms: Root mean square of a Muon update before the learning rate: about that of
            AdamW's updates, so that both can share a learning rate.
        betas: AdamW's betas.
        eps: AdamW's epsilon.
        weight_decay: Weight decay of both; multiplied by the learning rate.
        fused: Whether AdamW runs as one kernel.

    Raises:
        ValueError: No group has `muon`, a parameter is complex, or a parameter of a Muon group is
            no matrix.
        RuntimeError: A gradient is sparse; nothing has been updated.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float | Tensor,
        momentum: float = 0.95,
        update_rms: float = 0.18,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
        weight_decay: float = 0.1,
        fused: bool = True,
    ) -> None:
        groups = list(groups)
        if not any(isinstance(group, dict) and "muon" in group for group in groups):
            raise ValueError(
                "MuonAdamW takes parameter groups that say whose they are:"
                ' [{"params": matrices, "muon": True}, {"params": others, "muon": False}]'
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "update_rms": update_rms,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "fused": fused,
            "muon": False,
            ROWS: None,
        }
        super().__init__(groups, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load a saved or copied state; groups of older versions may lack some settings."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, from the next step on.

        Raises:
            ValueError: As for the class.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        shapes = [tuple(p.shape) for p in group["params"] if group["muon"] and p.dim() < 2]
        refused = f"a Muon group takes matrices, not shape {shapes[0]}" if shapes else None
        if any(p.is_complex() for p in group["params"]):
            refused = "complex parameters are not supported"
        if refused:
            self.param_groups.pop()
            raise ValueError(f"MuonAdamW: {refused}; give them to another group or optimizer")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        dense = [group for group in self.param_groups if not group[ROWS]]
        trained = [[p for p in group["params"] if p.grad is not None] for group in dense]
        if any(p.grad.layout != torch.strided for parameters in trained for p in parameters):
            raise RuntimeError(
                "MuonAdamW does not support sparse gradients; use nn.Embedding(sparse=False)"
            )
        for group in self.param_groups:
            if group[ROWS]:
                self.update_rows(group)
        for group, parameters in zip(dense, trained, strict=True):
            if not group["muon"]:
                for alike in by_mesh(parameters):
                    self._adamw_step(alike, group)
                continue
            for parameter in parameters:
                self._muon_step(parameter, group)
        return loss

    def _muon_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        direction = _orthogonal_like(grad.lerp(momentum, group["momentum"]))
        scale = group["update_rms"] * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * scale)

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if "exp_avg" not in state:
                device = parameter.device if group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _orthogonal_like(matrices: Tensor) -> Tensor:
    """`orthogonalise` for sharded matrices too: experts stay local, others are gathered."""
    if not isinstance(matrices, DTensor):
        return orthogonalise(matrices)
    mesh, placements = matrices.device_mesh, matrices.placements
    # Of experts that are spread over processes, FSDP2's own cut has another class than Shard.
    if matrices.dim() > 2 and all(getattr(p, "dim", None) == 0 for p in placements):
        local = orthogonalise(matrices.to_local())
        return DTensor.from_local(
            local, mesh, placements, shape=matrices.shape, stride=matrices.stride()
        )
    return distribute_tensor(orthogonalise(matrices.full_tensor()), mesh, placements)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearly orthogonal factor of matrices [..., m, n]: their singular values become one.

    The result is accurate for all norms that the dtype can hold. A norm not well above 1e-7 is
    treated as the rest of a decayed momentum, or as rounding: the factor is multiplied by
    norm / (norm + 1e-7), with the Frobenius norm of each matrix. Zeros give zeros.

    The iteration runs in bfloat16 on a GPU and in float32 elsewhere, or in float64 for float64
    matrices.

    Returns:
        The factors [..., m, n], in the dtype of `matrices`.
    """
    if matrices.numel() == 0:
        return matrices.clone()
    wide = matrices.shape[-1] > matrices.shape[-2]
    x = matrices.mT if wide else matrices
    precise = torch.promote_types(x.dtype, torch.float32)
    x = x.to(precise)
    # float32 cannot hold the squares of values below 1e-23 or above 1e19.
    largest = torch.linalg.vector_norm(x, math.inf, dim=(-2, -1), keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    x = x.to(torch.bfloat16 if x.is_cuda and precise == torch.float32 else precise)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=precise)
    x = x / norm.clamp(min=1).to(x.dtype)  # at least 1, unless the matrix is zero
    for a, b, c in _NEWTON_SCHULZ:
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * (gram @ gram))
    x = x / (1 + _FADES_AT / (norm * largest))
    return (x.mT if wide else x).to(matrices.dtype)
