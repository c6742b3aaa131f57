"""A context in which models are built for their shapes alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class ShapesOnly(TorchFunctionMode):
    """A context that builds modules on the meta device, and draws no values.

    Drawing values there would change nothing, but loads parts of torch, which takes seconds.
    """

    def __enter__(self) -> "ShapesOnly":
        self._device = torch.device("meta")
        self._device.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._device.__exit__(*exception)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Skip the drawing of values, make identity matrices by shape alone, and run the rest."""
        name = getattr(func, "__name__", "")
        if name == "normal_":
            return args[0] if args else (kwargs or {})["tensor"]
        if name == "eye":
            return torch.empty(args[0], args[0], **(kwargs or {}))
        return func(*args, **(kwargs or {}))
