"""Forward hooks inside what `torch.compile` has compiled.

A module that is called in eager code runs its hooks, even beside compiled modules. Inside a
compiled region hooks are part of the traced program. Hooks added after the compilation are ignored,
unless dynamo guards on them; then every new hook would compile the region anew. So each watched
module in such a region gets one hook that keeps its key in the module's table of hooks. Two
programs exist, with and without the hook; switching between them compiles nothing.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from mhc_lightning.callbacks.watching.lineage import Lineage, floating_tensors
from mhc_lightning.kernels import StreamMappings

if TYPE_CHECKING:
    from torch._dynamo import OptimizedModule


def modules_in_compiled_regions(root: nn.Module) -> set[nn.Module]:
    """All modules below `root` that run inside a compiled program.

    These are modules wrapped by `torch.compile(module)`, those compiled in place by
    `module.compile()`, and a LightningModule that was compiled as a whole.
    """
    inside: set[nn.Module] = set()
    if getattr(root, "_compiler_ctx", None) is not None:  # Lightning's from_compiled
        inside.update(root.modules())
    for module in root.modules():
        if _is_optimized(module):
            inside.update(module._orig_mod.modules())
        elif getattr(module, "_compiled_call_impl", None) is not None:
            inside.update(module.modules())
    return inside


def _is_optimized(module: nn.Module) -> "TypeGuard[OptimizedModule]":
    """Whether `torch.compile` wrapped a module; without such a one, nobody waits for its class."""
    if "_orig_mod" not in module._modules:
        return False
    from torch._dynamo import OptimizedModule

    return isinstance(module, OptimizedModule)


def declares_mappings(module: nn.Module) -> bool:
    """True if the module's `forward` is annotated to return `StreamMappings`."""
    declared = getattr(type(module).forward, "__annotations__", {}).get("return")
    return declared is StreamMappings or "StreamMappings" in str(declared)


class HookGuards:
    """Makes dynamo notice hooks that are added to compiled modules, as long as a fit lasts."""

    def __init__(self) -> None:
        self._previous: bool | None = None

    def enable(self) -> None:
        """Turn the guards on; programs compiled without them are dropped and compiled again."""
        config = torch._dynamo.config
        if config.skip_nnmodule_hook_guards:
            self._previous = True
            config.skip_nnmodule_hook_guards = False
            torch.compiler.reset()

    def restore(self) -> None:
        """Restore dynamo's setting."""
        if self._previous is not None:
            torch._dynamo.config.skip_nnmodule_hook_guards = self._previous
            self._previous = None


class SwitchableHook:
    """One forward hook on one module that can be removed and put back under the same key."""

    def __init__(self, module: nn.Module, hook: object) -> None:
        self._module, self._hook = module, hook
        self._handle = module.register_forward_hook(hook, with_kwargs=True)  # type: ignore[arg-type]

    def put_back(self) -> None:
        """Install the hook again after `remove`."""
        self._module._forward_hooks[self._handle.id] = self._hook  # type: ignore[assignment]
        self._module._forward_hooks_with_kwargs[self._handle.id] = True

    def remove(self) -> None:
        """Remove the hook; the module's tables of hooks are then as before."""
        self._handle.remove()


class ProgramCalls:
    """Watches the calls of compiled programs from outside, and reports them to a `Lineage`.

    Args:
        lineage: Learns the inputs and outputs of programs.
        clock: The number of sub-layers seen so far, in compiled code too.
    """

    def __init__(self, lineage: Lineage, clock: Tensor) -> None:
        self._lineage, self._clock = lineage, clock
        self._wrapped: dict[nn.Module, tuple[str, Any]] = {}
        self._starts: dict[int, int | None] = {}

    def open(self, root: nn.Module) -> None:
        """Wrap every compiled program that modules below `root` call."""
        inside: set[nn.Module] = set()
        for name, module in root.named_modules():
            call, attribute = _program(module)
            if call is not None and module not in inside:
                inside.update(module.modules())
                self._wrapped[module] = attribute, call
                module.__dict__[attribute] = partial(self._call, name, call)

    def close(self) -> dict[int, int | None]:
        """Unwrap the programs.

        Returns:
            For each call of a program: the number of its first sub-layer, mapped to the number of
            that sub-layer's predecessor, or None.
        """
        for module, (attribute, call) in self._wrapped.items():
            module.__dict__[attribute] = call
        self._wrapped.clear()
        starts, self._starts = self._starts, {}
        return starts

    def _call(self, name: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return call(*args, **kwargs)
        arguments = (*args, *kwargs.values())
        first = int(self._clock)
        after = self._lineage.find(floating_tensors(arguments[:1]))
        output = call(*args, **kwargs)
        end = int(self._clock)
        if end > first:
            self._starts[first] = after
            self._lineage.leave_program(end - 1, name, arguments, output)
        return output


def _program(module: nn.Module) -> tuple[Any, str]:
    """The callable of a module's compiled program, or None, and the attribute that holds it."""
    if _is_optimized(module):
        return module.__dict__.get("forward"), "forward"
    return getattr(module, "_compiled_call_impl", None), "_compiled_call_impl"
