"""The watcher: collects the records of mappings in a model's forward passes, by hooks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mhc_lightning.callbacks.watching.compiled_regions import (
    HookGuards,
    ProgramCalls,
    SwitchableHook,
    declares_mappings,
    modules_in_compiled_regions,
)
from mhc_lightning.callbacks.watching.lineage import Lineage
from mhc_lightning.callbacks.watching.observations import Observation, Sighting, in_order, is_record
from mhc_lightning.kernels import StreamMappings
from mhc_lightning.modules.memory import BlockMemory

Extract = Callable[[nn.Module, tuple[Any, ...], Any], StreamMappings | None]
"""From (module, arguments, output) of one call to its record, or None for other modules.

The arguments are the positional ones followed by the values of the keyword ones.
"""


def record_in_output(
    module: nn.Module, args: tuple[Any, ...], output: Any
) -> StreamMappings | None:
    """The default extraction: the module's output, where it is a `StreamMappings`."""
    return output if isinstance(output, StreamMappings) else None


def in_backward() -> bool:
    """True while autograd runs: activation checkpointing replays forward passes there."""
    return torch._C._current_graph_task_id() != -1


def in_transform() -> bool:
    """True within grad, vmap and the like, where tensors are wrappers without meaning outside."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class StreamWatcher:
    """Watches one model, between `open` and `close`, by forward hooks.

    Nothing is installed outside that time. Calls are listed in the order in which they happen, in
    eager and in compiled code. A module that passes on the record of a module inside it adds
    nothing; a module called twice counts twice. Forward passes that autograd replays (activation
    checkpointing) are left out, and so are those that `torch.func` transforms.

    The streams show the predecessor of each sub-layer (see `Lineage`), so that independent forward
    passes are chains of their own. Inside one compiled program no streams are seen: sub-layers
    follow one another there, and a module that is called again begins a new chain, with a warning.
    The stages of a pipeline are one chain, which `across_stages` makes.

    Args:
        extract: Gets a record out of a module call; None takes every output that is a
            `StreamMappings`.
        note: Called in the forward pass, without gradients, as `note(module, args, output,
            mappings)`; its result is kept with the record. It serves values that are too large to
            keep, such as the streams.
    """

    def __init__(
        self,
        extract: Extract | None = None,
        note: Callable[[nn.Module, tuple[Any, ...], Any, StreamMappings], Any] | None = None,
    ) -> None:
        self._extract = extract or record_in_output
        self._default = extract is None
        self._note = note
        self._handles: list[RemovableHandle] = []
        self._switches: dict[nn.Module, SwitchableHook] = {}
        self._compiled: dict[nn.Module, str] = {}
        self._guards = HookGuards()
        self._sightings: list[Sighting] = []
        self._slot = f"_stream_sightings_{id(self):x}"
        # A tensor, because a compiled program repeats what happens to tensors, not to numbers.
        # On the host, whatever the default device: each call reads it, and must not wait for a GPU.
        self._clock = torch.zeros((), dtype=torch.int64, device="cpu")
        self._lineage = Lineage()
        self._programs = ProgramCalls(self._lineage, self._clock)
        self._warned = False
        self._open = False
        self._place: Callable[[], tuple[int, int] | None] | None = None

    @property
    def is_open(self) -> bool:
        """True if hooks are installed."""
        return self._open

    def prepare(self, root: nn.Module) -> None:
        """Let compiled regions notice hooks, where needed; call it before the first forward pass.

        Only a compiled region that holds a module of interest is touched. With the default
        extraction that is a module whose `forward` is annotated `-> StreamMappings`; with a user's
        `extract` it is every module.
        """
        if self._candidates(root, modules_in_compiled_regions(root)):
            self._guards.enable()

    def open(
        self, root: nn.Module, place: Callable[[], tuple[int, int] | None] | None = None
    ) -> None:
        """Install the hooks on every module of `root`.

        Args:
            root: The model to watch.
            place: Gives (stage, micro-batch) of the forward pass that is running, under a pipeline.
                Then only the first micro-batch of each stage is watched, and no compiled code.
        """
        self.close()
        self._open = True
        self._place = place
        self._clock.zero_()
        if place is None:
            self._lineage.open()
        inside = modules_in_compiled_regions(root)
        for name, module in root.named_modules():
            if module not in inside:
                hook: Any = partial(self._see, name)
                hook.only_observes = True  # a projection may stay fused, without a call of its hook
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        self._compiled = {} if place is not None else self._candidates(root, inside)
        for module in self._compiled:
            setattr(module, self._slot, [])
            if module in self._switches:
                self._switches[module].put_back()
            else:
                self._switches[module] = SwitchableHook(module, self._see_compiled)
        if self._compiled:
            self._programs.open(root)

    def close(self) -> list[Observation]:
        """Remove the hooks and return the sub-layers seen, in the order of the calls.

        Raises:
            UserError: `extract` returned a value that is not a record of square matrices.
        """
        if not self._open:
            return []
        self._open = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._lineage.close()
        program_starts = self._programs.close()
        for module, name in self._compiled.items():
            self._switches[module].remove()
            for order, mappings, note in getattr(module, self._slot):
                sighting = Sighting(int(order), name, mappings, note, compiled=True)
                self._sightings.append(sighting)
            delattr(module, self._slot)
        sightings, self._sightings = self._sightings, []
        observations, met_again = in_order(sightings, program_starts)
        if met_again and not self._warned:
            self._warned = True
            from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # `inspect` needs none

            rank_zero_warn(
                f"{met_again} is called more than once in one compiled program, where the streams"
                " that it reads are not seen: composite gains and products begin anew with each"
                " call. Compile the called module, instead of its caller, to link the calls."
            )
        return observations

    def release(self) -> None:
        """Remove all hooks, and restore dynamo's setting."""
        self.close()
        self._switches.clear()
        self._guards.restore()

    def _candidates(self, root: nn.Module, inside: set[nn.Module]) -> dict[nn.Module, str]:
        return {
            module: name
            for name, module in root.named_modules()
            if module in inside and (not self._default or declares_mappings(module))
        }

    def _see(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if torch.compiler.is_compiling() or in_backward() or in_transform():
            return
        stage, micro_batch = (self._place and self._place()) or (0, 0)
        if micro_batch > 0:
            return
        args = (*args, *kwargs.values())
        mappings = self._extract(module, args, output)
        if mappings is not None:
            note = self._take_note(module, args, output, mappings)
            order, after = int(self._clock), None
            if self._place is None and is_record(mappings):
                after = self._lineage.arrive(order, name, args, mappings)
            self._sightings.append(Sighting(order, name, mappings, note, stage, after))
            self._clock += 1
        if self._place is None:
            if isinstance(module, BlockMemory):
                self._lineage.continue_streams(args[0], output)
            self._lineage.leave(name, output)

    def _see_compiled(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        # Traced once for all modules of a kind: this code must not depend on the single module.
        if not torch.compiler.is_compiling() and in_backward():
            return
        args = (*args, *kwargs.values())
        mappings = self._extract(module, args, output)
        if mappings is not None:
            note = self._take_note(module, args, output, mappings)
            getattr(module, self._slot).append((self._clock.clone(), mappings, note))
            self._clock.add_(1)

    def _take_note(
        self, module: nn.Module, args: tuple[Any, ...], output: Any, mappings: StreamMappings
    ) -> Any:
        if self._note is None:
            return None
        with torch.no_grad():
            return self._note(module, args, output, mappings)
