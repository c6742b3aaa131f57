"""The state of a module whose stages and shards lie on different processes, as one process has it.

What is gathered is what a single device would save, and any layout loads its part of that: names
are those of the whole module, and an optimizer's parameters are numbered as in the whole one.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mhc_lightning.strategies.sharding import held_rows, load_rows


class WholeState:
    """Gathers to rank zero, and loads, the state of a module and its optimizers.

    Args:
        module: While it is still whole; it may be on ``meta``. It becomes this process's part.
        device: What this process sends from and receives to.
        shards: The processes that hold the shards of the same tensors.
        stages: The processes of a pipeline; None if each process has a part of every tensor.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        shards: DeviceMesh,
        stages: DeviceMesh | None = None,
    ) -> None:
        self._module = module
        self._device = device
        self._shards = shards
        self._stages = stages
        self._state_order = list(module.state_dict())
        self._parameter_order = {name: k for k, (name, _) in enumerate(module.named_parameters())}

    # ---- modules

    def gather_module(self) -> dict[str, Tensor]:
        """The whole state dict on rank zero, in the whole module's order; else an empty one."""
        gathered = self._gather(self._module.state_dict())
        return {name: gathered[name] for name in self._state_order if name in gathered}

    def load_module(self, weights: Mapping[str, Tensor]) -> None:
        """Copy this process's part of a whole state dict into the module."""
        load_rows(self._module, weights)

    def load_file(
        self, path: str | Path, optimizers: Sequence[Optimizer], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load this process's part of a checkpoint file, and return all of it.

        Args:
            path: As one process would have saved it, or any layout of ours.
            optimizers: Those whose state to load; none for a run that does not train.
            weights_only: ``torch.load``'s.
        """
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        self.load_module(checkpoint["state_dict"])
        if optimizers:
            for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=True):
                self.load_optimizer(optimizer, state)
        return checkpoint

    # ---- optimizers

    def gather_optimizer(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole optimizer's ``state_dict`` on rank zero; else an empty one.

        Every process must call it.
        """
        names = self._names()
        flat = {
            f"{key}\n{names[parameter]}": value
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        groups = self._whole_groups(optimizer)
        gathered = self._gather(flat)
        if dist.get_rank() != 0:
            return {}
        states: dict[int, dict[str, Tensor]] = {}
        numbers = {name: k for k, name in enumerate(name for group in groups for name in group)}
        for key in sorted(gathered):
            entry, name = key.split("\n")
            states.setdefault(numbers[name], {})[entry] = gathered[key]
        param_groups = [
            {
                **{k: v for k, v in group.items() if k != "params"},
                "params": [numbers[name] for name in whole],
            }
            for group, whole in zip(optimizer.param_groups, groups, strict=True)
        ]
        return {"state": dict(sorted(states.items())), "param_groups": param_groups}

    def load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Load this process's part of a whole optimizer's ``state_dict``."""
        parameters = {name: p for p, name in self._names().items()}
        local = optimizer.state_dict()
        numbers = [number for group in local["param_groups"] for number in group["params"]]
        own = [p for group in optimizer.param_groups for p in group["params"]]
        number_of = {id(p): number for p, number in zip(own, numbers, strict=True)}
        loaded: dict[int, dict[str, Any]] = {}
        for names, group in zip(self._whole_groups(optimizer), state["param_groups"], strict=True):
            for name, number in zip(names, group["params"], strict=True):
                if name in parameters and number in state["state"]:
                    parameter = parameters[name]
                    loaded[number_of[id(parameter)]] = {
                        key: _part(value, parameter)
                        for key, value in state["state"][number].items()
                    }
        groups = [
            {**{k: v for k, v in saved.items() if k != "params"}, "params": ours["params"]}
            for saved, ours in zip(state["param_groups"], local["param_groups"], strict=True)
        ]
        optimizer.load_state_dict({"state": loaded, "param_groups": groups})

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._module.named_parameters()}

    def _whole_groups(self, optimizer: Optimizer) -> list[list[str]]:
        """The names in each parameter group of the whole optimizer, in its order."""
        names = self._names()
        own = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        everybody: list[Any] = [own]
        if self._stages is not None:
            everybody = [None] * self._stages.size()
            dist.all_gather_object(everybody, own, group=self._stages.get_group())
        return [
            sorted((name for part in parts for name in part), key=self._parameter_order.__getitem__)
            for parts in zip(*everybody, strict=True)
        ]

    # ---- moving tensors

    def _gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every stage's tensors, whole and on the CPU, on rank zero; elsewhere nothing."""
        group = None if self._stages is None else self._stages.get_group()
        place, count = 0, 1
        if self._stages is not None:
            place, count = self._stages.get_local_rank(), self._stages.size()
        # Every process of a stage helps to make its tensors whole; the first one moves them.
        moves = self._shards.get_local_rank() == 0
        gathered: dict[str, Tensor] = {}
        if place > 0:
            listing: list[Any] = [[(n, t.shape, t.dtype) for n, t in tensors.items()]]
            if moves:
                dist.send_object_list(listing, group=group, group_dst=0, device=self._device)
            for _, whole in _whole_tensors(tensors):
                if moves:
                    dist.send(whole.to(self._device).contiguous(), group=group, group_dst=0)
            return gathered
        for name, whole in _whole_tensors(tensors):
            if moves:
                gathered[name] = whole.cpu().clone()
        for stage in range(1, count if moves else 1):
            listing = [None]
            dist.recv_object_list(listing, group=group, group_src=stage, device=self._device)
            for name, shape, dtype in listing[0]:
                buffer = torch.empty(shape, dtype=dtype, device=self._device)
                dist.recv(buffer, group=group, group_src=stage)
                gathered[name] = buffer.cpu()
        return gathered


def _whole_tensors(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _part(value: Any, parameter: Tensor) -> Any:
    """What a process holds of a value that belongs to the whole of a parameter."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape or not isinstance(parameter, DTensor):
        return value.clone()
    rows, first = held_rows(parameter)
    return DTensor.from_local(
        value[first : first + len(rows)].to(rows.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
        run_check=False,
    )
