"""Muon for matrices, AdamW for the rest, as one optimizer.

torch's own Muon takes two-dimensional parameters only; the experts of a layer are one
three-dimensional parameter, and with FSDP2 parameters are sharded. Both are handled here, with the
hybrid Newton-Schulz iteration of DeepSeek-V4 (arXiv 2606.19348).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

# Eight steps that drive all singular values near one, and two that settle them there.
_NEWTON_SCHULZ = 8 * [(3.4445, -4.7750, 2.0315)] + 2 * [(2.0, -1.5, 0.5)]


class MuonAdamW(torch.optim.Optimizer):
    """Orthogonalised momentum for groups with ``muon=True``, torch's AdamW for the others.

    Args:
        groups: Parameter groups with ``params``, ``weight_decay`` and ``muon``. The parameters of
            a Muon group are matrices [m, n] or stacks of matrices [k, m, n].
        lr: Learning rate of both.
        momentum: Of Muon, with Nesterov's look-ahead.
        update_rms: Root mean square of a Muon update before the learning rate. About that of
            AdamW's updates, so that both can share a learning rate.
        betas: Of AdamW.
        eps: Of AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        update_rms: float = 0.18,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
    ) -> None:
        self._adamw: torch.optim.AdamW | None = None
        super().__init__(groups, {"lr": lr, "momentum": momentum, "update_rms": update_rms})
        plain = [group for group in self.param_groups if not group["muon"]]
        if plain:
            self._adamw = torch.optim.AdamW(plain, lr=lr, betas=betas, eps=eps, fused=True)
        self._share_state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded state, for AdamW too."""
        super().__setstate__(state)
        self._share_state()

    def _share_state(self) -> None:
        """Let AdamW work on these groups and this state: schedulers and checkpoints see one."""
        if self._adamw is not None:
            self._adamw.param_groups = [g for g in self.param_groups if not g["muon"]]
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._muon_step(parameter, parameter.grad, group)
        if self._adamw is not None:
            self._adamw.step()
        return loss

    def _muon_step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        direction = _orthogonal_like(grad.lerp(momentum, group["momentum"]))
        scale = group["update_rms"] * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * scale)


def _orthogonal_like(matrices: Tensor) -> Tensor:
    """``orthogonalise``, also for sharded matrices: whole experts stay put, others are gathered."""
    if not isinstance(matrices, DTensor):
        return orthogonalise(matrices)
    mesh, placements = matrices.device_mesh, matrices.placements
    if matrices.dim() > 2 and all(p == Shard(0) for p in placements):
        local = orthogonalise(matrices.to_local())
        return DTensor.from_local(
            local, mesh, placements, shape=matrices.shape, stride=matrices.stride()
        )
    return distribute_tensor(orthogonalise(matrices.full_tensor()), mesh, placements)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearly orthogonal factor of matrices [..., m, n]: singular values driven to one.

    Runs in bfloat16 on a GPU and in float32 elsewhere; returns the dtype of ``matrices``.
    """
    wide = matrices.shape[-1] > matrices.shape[-2]
    x = matrices.mT if wide else matrices
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    for a, b, c in _NEWTON_SCHULZ:
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * (gram @ gram))
    return (x.mT if wide else x).to(matrices.dtype)
