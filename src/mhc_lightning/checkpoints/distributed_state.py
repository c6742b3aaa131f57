"""The state of a module that is spread over processes, and of its optimizers.

A whole state is the state that a single device would save: an optimizer's parameters are numbered
as in the whole module. In a state in parts, each process keeps its own tensors, by the names of the
whole module.

`torch.distributed.checkpoint.state_dict` does not suit optimizers: it runs an optimizer step to
make missing state, fails if only some parameters have state, accepts state of other parameters, and
does not gather over the stages of a pipeline. Whole files number parameters in any case, because
Lightning's own strategies read and write such files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mhc_lightning.checkpoints.gathering import whole_tensors
from mhc_lightning.checkpoints.reading import load_folder, numbered_state
from mhc_lightning.checkpoints.row_state import gathered as gathered_rows
from mhc_lightning.checkpoints.row_state import overlapping, parse_piece, pieces
from mhc_lightning.checkpoints.saved_tensors import SavedTensors, load_weights
from mhc_lightning.modules.initialisation import held_rows
from mhc_lightning.optimizers.parameter_names import NAMES, check_names
from mhc_lightning.optimizers.row_updates import ROWS, RowState, UpdatesRows


class DistributedState:
    """Saves and loads the state of a module and its optimizers, whole or in parts.

    Args:
        module: The module, still whole; it may be on `meta`. It becomes this process's part.
        device: The device from which this process sends, and on which it receives.
        shards: The processes that hold shards of the same tensors; None if each process has all of
            every tensor.
        stages: The processes of a pipeline; None without one.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        shards: DeviceMesh | None,
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
        """The whole state dict on rank zero, in the whole module's order; empty elsewhere."""
        gathered = self._gather(self._module.state_dict())
        return {name: gathered[name] for name in self._state_order if name in gathered}

    def load_module(self, weights: Mapping[str, Tensor]) -> None:
        """Copy this process's part of a whole state dict into the module."""
        load_weights(self._module, weights)

    def load_file(
        self, path: str | Path, optimizers: Sequence[Optimizer], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load this process's part of a checkpoint file, and return all of it.

        Args:
            path: The file, as one process would have saved it.
            optimizers: The optimizers to load; none in a run that does not train.
            weights_only: That of `torch.load`.
        """
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        self.load_module(checkpoint["state_dict"])
        if optimizers:
            for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=True):
                self.load_optimizer(optimizer, state)
        return checkpoint

    def load_folder(
        self, path: Path, optimizers: Sequence[Optimizer], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load this process's part of a checkpoint folder, and return all that is no tensor.

        Only shards that overlap with this part are read, one at a time.

        Args:
            path: The folder.
            optimizers: The optimizers to load; none in a run that does not train.
            weights_only: That of `torch.load`.
        """
        checkpoint = load_folder(path, trusted=weights_only is False)
        self.load_module(checkpoint["state_dict"])
        if optimizers:
            states = checkpoint["optimizer_states"]
            for k, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
                saved = SavedTensors(path, f"optimizer_states.{k}.")
                self._load_optimizer_part(optimizer, saved, state["param_groups"])
        return checkpoint

    # ---- optimizers

    def optimizer_part(self, optimizer: Optimizer) -> tuple[dict[str, Tensor], list[dict]]:
        """This process's part of an optimizer's state; every process must call this.

        Returns:
            The tensors themselves, by `<entry>.<name of the parameter>`, the state of tables in
            `pieces`; and the parameter groups of the whole optimizer, with the parameters' names.
        """
        groups = self._whole_groups(optimizer)
        tensors = self._optimizer_tensors(optimizer)
        for name, state in self._row_states(optimizer).items():
            tensors |= pieces(state, name)
        return tensors, _saved_groups(optimizer, groups)

    def gather_optimizer(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole optimizer's `state_dict` on rank zero, empty elsewhere.

        Every process must call this.
        """
        groups = self._whole_groups(optimizer)
        tensors = self._optimizer_tensors(optimizer)
        for name, state in self._row_states(optimizer).items():
            entries = dict(state.items())
            if not state.is_whole:
                assert self._shards is not None
                entries = gathered_rows(state, self._shards, self._device)
            if entries and len(entries[ROWS]):
                tensors |= {f"{entry}.{name}": tensor for entry, tensor in entries.items()}
        gathered = self._gather(tensors)
        if dist.get_rank() != 0:
            return {}
        return numbered_state(gathered, _saved_groups(optimizer, groups))

    def load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Load this process's part of a whole optimizer's `state_dict`.

        Raises:
            UserError: The state belongs to other parameters.
        """
        parameters = {name: p for p, name in self._names().items()}
        whole_groups = self._whole_groups(optimizer)
        check_names([group.get(NAMES) for group in state["param_groups"]], whole_groups)
        values = {
            name: entries
            if ROWS in entries  # of all rows: the optimizer takes this process's
            else {key: _part(value, parameters[name]) for key, value in entries.items()}
            for names, group in zip(whole_groups, state["param_groups"], strict=True)
            for name, number in zip(names, group["params"], strict=True)
            if name in parameters and (entries := state["state"].get(number)) is not None
        }
        self._install(optimizer, values, state["param_groups"])

    def _load_optimizer_part(
        self, optimizer: Optimizer, saved: SavedTensors, groups: Sequence[Mapping[str, Any]]
    ) -> None:
        check_names([group["params"] for group in groups], self._whole_groups(optimizer))
        parameters = {name: p for p, name in self._names().items()}
        parts: dict[str, Tensor] = {}
        values: dict[str, dict[str, Tensor]] = {}
        for key, like in saved.on_meta.items():
            entry, name = key.split(".", 1)
            if name in parameters and parse_piece(key) is None:
                parts[key] = values.setdefault(name, {})[entry] = _empty_part(
                    like, parameters[name]
                )
        saved.load_into(parts)
        values |= overlapping(saved, parameters)
        self._install(optimizer, values, groups)

    def _install(
        self,
        optimizer: Optimizer,
        values: Mapping[str, Mapping[str, Any]],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        """Load an optimizer with state of its parameters, by name, and with saved settings."""
        names = self._names()
        local = optimizer.state_dict()["param_groups"]
        numbers = [number for group in local for number in group["params"]]
        own = [names[p] for group in optimizer.param_groups for p in group["params"]]
        state = {k: values[name] for k, name in zip(numbers, own, strict=True) if name in values}
        merged = [
            {**saved, **{key: ours[key] for key in ("params", NAMES) if key in ours}}
            for saved, ours in zip(groups, local, strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": merged})

    def _optimizer_tensors(self, optimizer: Optimizer) -> dict[str, Tensor]:
        names = self._names()
        return {
            f"{entry}.{names[parameter]}": value
            for parameter, state in optimizer.state.items()
            if not isinstance(state, RowState)
            for entry, value in state.items()
            if isinstance(value, Tensor)
        }

    def _row_states(self, optimizer: Optimizer) -> dict[str, RowState]:
        names = self._names()
        states = optimizer.row_states() if isinstance(optimizer, UpdatesRows) else {}
        return {names[weight]: state for weight, state in states.items()}

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._module.named_parameters()}

    def _whole_groups(self, optimizer: Optimizer) -> list[list[str]]:
        """The names in each parameter group of the whole optimizer, in the module's order."""
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
        """The tensors of all stages, whole and on the CPU, on rank zero; empty elsewhere."""
        group = None if self._stages is None else self._stages.get_group()
        place, count = 0, 1
        if self._stages is not None:
            place, count = self._stages.get_local_rank(), self._stages.size()
        # All processes of a stage make its tensors whole; the first one sends them.
        moves = self._shards is None or self._shards.get_local_rank() == 0
        gathered: dict[str, Tensor] = {}
        if place > 0:
            listing: list[Any] = [[(n, t.shape, t.dtype) for n, t in tensors.items()]]
            if moves:
                dist.send_object_list(listing, group=group, group_dst=0, device=self._device)
            for _, whole in whole_tensors(tensors):
                if moves:
                    dist.send(whole.to(self._device).contiguous(), group=group, group_dst=0)
            return gathered
        for name, whole in whole_tensors(tensors):
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


def _saved_groups(optimizer: Optimizer, names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """An optimizer's groups; their `params` are the names of the whole optimizer's parameters."""
    groups = optimizer.state_dict()["param_groups"]
    return [
        {**group, "params": list(listed), **({NAMES: list(listed)} if NAMES in group else {})}
        for group, listed in zip(groups, names, strict=True)
    ]


def _empty_part(like: Tensor, parameter: Tensor) -> Tensor:
    """Memory for a process's part of an optimizer's value of a parameter."""
    if like.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=like.dtype, requires_grad=False)
    return torch.empty_like(like, device="cpu")


def _part(value: Any, parameter: Tensor) -> Any:
    """A process's part of an optimizer's value of a whole parameter."""
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
