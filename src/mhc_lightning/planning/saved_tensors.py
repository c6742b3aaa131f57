"""Counts the tensors that a forward pass saves for its backward pass, without computing values.

A part of a network is copied with parameters that have shapes only, and run as on the CPU. The
storages that autograd saves are added up, each once.

GPUs are assumed to save the same, since the operators are the same. RMSNorm is the exception: on a
GPU it is one operator that saves its input and one number per token; the CPU composes it of
several. The routing of tokens to experts changes no size.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_lightning.modules import Connection, GatedHyperConnection
from mhc_lightning.planning.errors import NotPlannableError
from mhc_lightning.planning.precision import Precision

# Attributes of modules that are not settings; `reset_parameters` may be a function on a module.
_STATE = vars(nn.Module()).keys() - {"training"} | {"reset_parameters"}
# `mix` of connections whose kernels compute the matrices.
_NO_MIX = GatedHyperConnection.mix

NORMS, WEIGHT_COPIES = "norms", "weight_copies"


class Passed(NamedTuple):
    """A tensor that one part of a network hands to the next.

    Attributes:
        size: Shape.
        stride: Stride of each dimension, in elements.
        dtype: Type of the elements.
        nbytes: Bytes of its storage.
        kept_as: Kind of the tensor, if the part that makes it saves it; else empty.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    kept_as: str = ""


def contiguous(size: Sequence[int], dtype: torch.dtype) -> Passed:
    """A tensor that fills its storage in row-major order."""
    tensor = torch.empty(*size, dtype=dtype, device="meta")
    return Passed(tuple(size), tensor.stride(), dtype, tensor.nbytes)


class Kept(NamedTuple):
    """The tensors that a part of a network saves.

    Attributes:
        sizes: Bytes by kind, without the tensors that enter and leave.
        entered: The kind of each entering tensor, if it is saved; else empty.
        leaving: The tensors that leave.
    """

    sizes: dict[str, int]
    entered: tuple[str, ...]
    leaving: tuple[Passed, ...]


class Keeping:
    """The tensors saved so far in one forward pass, by kind.

    Attributes:
        kind: Tensors saved from now on count as this kind.
    """

    def __init__(self, module: nn.Module, kind: str, fused_norm: bool, mixed: bool) -> None:
        self.kind = kind
        self.fused_norm = fused_norm
        self._mixed = mixed
        self._own = {_storage(t) for t in (*module.parameters(), *module.buffers())}
        self._copies: set[int] = set()
        self._found: dict[int, tuple[str, int]] = {}
        self._held: list[Tensor] = []  # so that no storage's number is used twice

    @contextmanager
    def counted_as(self, kind: str) -> Iterator[None]:
        """Count the tensors saved within as `kind`."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def keep(self, tensor: Tensor) -> Tensor:
        """Note that autograd saves a tensor; a tensor with values is older and not counted."""
        number = _storage(tensor)
        known = number in self._found or number in self._own
        if not known and isinstance(tensor, FakeTensor):
            self._held.append(tensor)
            self._found[number] = self.kind, tensor.untyped_storage().nbytes()
        return tensor

    def note_cast(self, source: Tensor, result: Tensor) -> None:
        """Note a cast; the lower-precision copy of a weight is shared by all passes."""
        lower = result.element_size() < source.element_size()
        if self._mixed and lower and _storage(source) in self._own:
            self._held.append(result)
            self._copies.add(_storage(result))

    def note_view(self, source: Tensor, result: Tensor) -> None:
        """Note a view; the view of a tensor with values is not counted either."""
        if not isinstance(source, FakeTensor):
            self._held.append(result)
            self._own.add(_storage(result))

    def result(self, entering: Sequence[Tensor], leaving: Sequence[Tensor]) -> Kept:
        """The result, with entering and leaving tensors apart."""

        def kept_as(tensor: Tensor) -> str:
            return self._found.get(_storage(tensor), ("", 0))[0]

        ends = {_storage(tensor) for tensor in (*entering, *leaving)}
        sizes = Counter[str]()
        for number, (kind, size) in self._found.items():
            if number not in ends:
                sizes[WEIGHT_COPIES if number in self._copies else kind] += size
        return Kept(
            dict(sizes),
            tuple(kept_as(tensor) for tensor in entering),
            tuple(_passed(tensor, kept_as(tensor)) for tensor in leaving),
        )


def kept_by(
    module: nn.Module,
    run: Callable[..., Sequence[Tensor]],
    entering: Sequence[Passed],
    kind: str,
    precision: Precision,
    fused_norm: bool,
) -> Kept:
    """Count the tensors that a forward pass of a module saves.

    Args:
        module: A part of a network, on any device; it is not changed.
        run: Called with a copy of `module`, a `Keeping` and the entering tensors; returns the
            leaving tensors.
        entering: The tensors that enter.
        kind: Kind of the saved tensors, unless `run` or a norm sets another.
        precision: Sizes of parameters and of computed values.
        fused_norm: Whether RMSNorm is one operator.

    Raises:
        NotPlannableError: The module cannot run on tensors without values.
    """
    shapes = _on_meta(module).to(precision.weight_dtype)
    constants = _constant_bytes(shapes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_values(shapes)
        keeping = Keeping(shapes, kind, fused_norm, precision.is_mixed)
        tensors = [_tensor(each) for each in entering]
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision.is_mixed)
        hooks = torch.autograd.graph.saved_tensors_hooks(keeping.keep, lambda kept: kept)
        try:
            with torch.enable_grad(), _Operators(keeping), _Functions(keeping), autocast, hooks:
                leaving = run(shapes, keeping, *tensors)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            named = dict.fromkeys(type(part).__name__ for part in module.modules())
            reason = " ".join(str(error).split())
            raise NotPlannableError(
                f"what is kept for backward cannot be counted: one of {', '.join(named)} does not"
                f" run on tensors without values ({reason[:200]})"
            ) from error
        kept = keeping.result(tensors, leaving)
    if constants:
        kept.sizes[kind] -= constants
    return kept


class _Operators(TorchDispatchMode):
    """Watches operators as they run below autograd and autocast."""

    def __init__(self, keeping: Keeping) -> None:
        super().__init__()
        self._keeping = keeping

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # The operator runs, but torch's shape function for it takes only bfloat16 (torch 2.13).
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self._keeping.note_cast(args[0], result)
        elif func.is_view and isinstance(result, Tensor):
            self._keeping.note_view(args[0], result)
        return result


class _Functions(TorchFunctionMode):
    """Replaces functions that a GPU computes differently, or that need values."""

    def __init__(self, keeping: Keeping) -> None:
        super().__init__()
        self._keeping = keeping

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm:
            with self._keeping.counted_as(NORMS):
                if self._keeping.fused_norm:
                    return _fused_rms_norm(*args, **kwargs)
                return func(*args, **kwargs)
        if func is Tensor.tensor_split and isinstance(args[1], Tensor):
            # The places are values. All pieces are views of one storage, wherever it is cut.
            return func(args[0], len(args[1]) + 1, *args[2:], **kwargs)
        return func(*args, **kwargs)


class _FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=wide))
        return torch.empty_like(x)


def _fused_rms_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _FusedRMSNorm.apply(x, weight)


def _constant_bytes(module: nn.Module) -> int:
    """Bytes of the constants that `mix` of connections saves once for all passes.

    Two passes with values save the same storage for the constants. Without values, each pass would
    count them again.
    """
    total = 0
    for part in module.modules():
        if isinstance(part, GatedHyperConnection) and type(part).mix is not _NO_MIX:
            count = len(part.bias) - 2 * part.num_streams
            passes: list[list[Tensor]] = [[], []]
            for kept in passes:
                logits = torch.zeros(1, count, dtype=part.bias.dtype, device="cpu")

                def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
                    kept.append(tensor)
                    return tensor

                hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
                with torch.enable_grad(), hooks:
                    part.mix(logits.requires_grad_())
            first = {_storage(tensor) for tensor in passes[0]}
            again = [tensor for tensor in passes[1] if _storage(tensor) in first]
            total += sum(tensor.untyped_storage().nbytes() for tensor in again)
    return total


def likeness(module: nn.Module) -> tuple:
    """A key that two modules share if they save the same: kinds, shapes and settings, no values."""
    found = []
    for name, part in module.named_modules():
        settings = {key: value for key, value in vars(part).items() if key not in _STATE}
        if isinstance(part, Connection):
            del settings["layer_index"]  # changes the initial values alone
        tensors = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        shapes = tuple((key, t.shape, t.dtype, t.requires_grad) for key, t in tensors)
        found.append((name, type(part), repr(sorted(settings.items())), shapes))
    return tuple(found)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and buffers have shapes only."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        shape = torch.empty_like(tensor, device="meta")
        wants = tensor.requires_grad
        memo[id(tensor)] = nn.Parameter(shape, wants) if isinstance(tensor, nn.Parameter) else shape
    return copy.deepcopy(module, memo)


def _without_values(module: nn.Module) -> None:
    """Replace the tensors on meta by CPU tensors without values."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="cpu")
                part._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="cpu")


def _tensor(passed: Passed) -> Tensor:
    tensor = torch.empty_strided(passed.size, passed.stride, dtype=passed.dtype)
    return tensor.requires_grad_(passed.dtype.is_floating_point)


def _passed(tensor: Tensor, kept_as: str) -> Passed:
    nbytes = tensor.untyped_storage().nbytes()
    return Passed(tuple(tensor.shape), tensor.stride(), tensor.dtype, nbytes, kept_as)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
