"""The watcher of memories: gates, rows and norms in a model's forward passes, by hooks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mhc_lightning.callbacks.watching.compiled_regions import (
    HookGuards,
    SwitchableHook,
    modules_in_compiled_regions,
)
from mhc_lightning.callbacks.watching.memory_readings import (
    ExtractReading,
    MemorySight,
    added_norm,
    condensed,
    mean_gate,
)
from mhc_lightning.callbacks.watching.stream_watcher import in_backward, in_transform
from mhc_lightning.modules.memory import BlockMemory, InputMemory, Memory
from mhc_lightning.modules.memory.memory import INPUT


def place_name(place: int) -> str:
    """The name in tags of a place of `Recalled`."""
    return "input" if place == INPUT else f"layer_{place}"


# What hooks see of the package's own parts. A compiled program is traced once for all modules of a
# kind, so a hook keeps what it sees in the module, and the place is looked up later.


def _see_gate(module: nn.Module, args: tuple[Any, ...], output: Any) -> MemorySight:
    return MemorySight("", gate=mean_gate(output))


def _see_part(module: nn.Module, args: tuple[Any, ...], output: Any) -> MemorySight:
    streams = args[0]
    if isinstance(module, InputMemory):
        streams = streams * module.word_scale
    return MemorySight("", added=added_norm(streams, output))


def _see_hash(module: nn.Module, args: tuple[Any, ...], output: Any) -> MemorySight:
    look_back: Any = module.look_back
    return MemorySight("", rows=output, suffixes=torch.stack(look_back(*args), -1))


See = Callable[[nn.Module, tuple[Any, ...], Any], MemorySight | None]


class _Watched(NamedTuple):
    """A module, how it is looked at, and the places that it belongs to."""

    module: nn.Module
    see: See
    places: tuple[str, ...]
    orders: tuple[int, ...] = ()


class MemoryWatcher:
    """Watches the memories of one model, between `open` and `close`, by forward hooks.

    By itself it watches the parts of the package's memories. Of each module the first call counts.
    Forward passes that autograd replays (activation checkpointing) are left out, and so are those
    that `torch.func` transforms.

    Args:
        extract: Gets a reading out of a module call of another project's model.
    """

    def __init__(self, extract: ExtractReading | None = None) -> None:
        self._extract = extract
        self._slot = f"_memory_sights_{id(self):x}"
        kinds = (_see_gate, _see_part, _see_hash, self._see_foreign)
        # One hook for each kind: what a compiled program holds must not change.
        self._hooks: dict[See, Any] = {see: partial(self._hook, see) for see in kinds}
        self._hooks[self._see_foreign].only_observes = True  # as in `StreamWatcher`
        self._watched: list[_Watched] = []
        self._handles: list[RemovableHandle] = []
        self._switches: dict[nn.Module, SwitchableHook] = {}
        self._guards = HookGuards()
        self._running: Callable[[], tuple[int, int] | None] | None = None
        self._open = False

    @property
    def is_open(self) -> bool:
        """True if hooks are installed."""
        return self._open

    def prepare(self, root: nn.Module) -> None:
        """Let compiled regions notice hooks, if they hold a module to watch."""
        inside = modules_in_compiled_regions(root)
        if any(watched.module in inside for watched in self._parts(root)):
            self._guards.enable()

    def open(
        self, root: nn.Module, place: Callable[[], tuple[int, int] | None] | None = None
    ) -> None:
        """Install the hooks.

        Args:
            root: The model to watch.
            place: Gives (stage, micro-batch) of the forward pass that is running, under a pipeline.
                Then only the first micro-batch is watched.
        """
        self.close()
        self._open, self._running = True, place
        inside = modules_in_compiled_regions(root)
        self._watched = list(self._parts(root))
        for module, see, *_ in self._watched:
            setattr(module, self._slot, [])
            if module not in inside:
                handle = module.register_forward_hook(self._hooks[see], with_kwargs=True)
                self._handles.append(handle)
            elif module in self._switches:
                self._switches[module].put_back()
            else:
                self._switches[module] = SwitchableHook(module, self._hooks[see])

    def close(self) -> list[MemorySight]:
        """Remove the hooks and return what was seen."""
        self._open = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        sights: list[MemorySight] = []
        for module, see, places, orders in self._watched:
            if module in self._switches:
                self._switches[module].remove()
            for sight in getattr(module, self._slot):
                if see is _see_hash:
                    sights += [
                        sight._replace(place=place, rows=rows, orders=orders)
                        for place, rows in zip(places, sight.rows, strict=True)
                    ]
                else:
                    sights.append(sight._replace(place=places[0]) if places else sight)
            delattr(module, self._slot)
        self._watched.clear()
        return sights

    def release(self) -> None:
        """Remove all hooks, and restore dynamo's setting."""
        self.close()
        self._switches.clear()
        self._guards.restore()

    def _parts(self, root: nn.Module) -> Iterator[_Watched]:
        own: set[nn.Module] = set()
        for module in root.modules():
            if isinstance(module, Memory) and module.hash is not None:
                places = tuple(place_name(place) for place in module.places)
                layout = module.hash.layout
                orders = tuple(n for n in layout.orders for _ in range(layout.num_heads))
                yield _Watched(module.hash, _see_hash, places, orders)
                own.add(module.hash)
            elif isinstance(module, InputMemory | BlockMemory):
                block = module.block if isinstance(module, BlockMemory) else INPUT
                yield _Watched(module, _see_part, (place_name(block),))
                window = module.gate_window if isinstance(module, BlockMemory) else None
                if window is not None:
                    yield _Watched(window, _see_gate, (place_name(block),))
                    own.add(window)
                own.add(module)
        if self._extract is not None:
            for module in root.modules():
                if module not in own:
                    yield _Watched(module, self._see_foreign, ())

    def _hook(
        self,
        see: See,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if not torch.compiler.is_compiling() and not self._is_first_pass():
            return
        seen = getattr(module, self._slot)
        if not seen:
            with torch.no_grad():
                sight = see(module, (*args, *kwargs.values()), output)
            if sight is not None:
                seen.append(sight)

    def _is_first_pass(self) -> bool:
        if in_backward() or in_transform():
            return False
        return ((self._running and self._running()) or (0, 0))[1] == 0

    def _see_foreign(
        self, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> MemorySight | None:
        assert self._extract is not None
        reading = self._extract(module, args, output)
        return None if reading is None else condensed(reading, type(module).__name__)
