"""Blocks of a residual network that run on n streams, and the adapters that describe them.

A wide block is the original block, whose class is replaced by a subclass with another `forward`. So
its parameters keep their names and `isinstance` holds. Between wide blocks the network's own code
passes the streams [..., n, C] on in place of the hidden state [..., C]; where connections have a
carry, it passes a pair of both.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.kernels import aggregate_streams, expand_streams, mean_streams
from mhc_lightning.modules import Connection, Unmerged

Sublayer = Callable[[Tensor], Tensor]
BlockFunction = Callable[..., Any]  # (block, x, connect, **kwargs) -> x or (x, ...)
CountSublayers = Callable[[Any], int]


class Adapter(NamedTuple):
    """How blocks of a class run on streams.

    Attributes:
        function: The block's forward pass, with `connect` where the block adds.
        sublayers: How often it calls `connect`, or a function of the block that says so.
    """

    function: BlockFunction
    sublayers: int | CountSublayers

    def count(self, block: nn.Module) -> int:
        """How often the function calls `connect` for `block`.

        Raises:
            UserError: A block with these settings cannot run on streams.
        """
        return self.sublayers if isinstance(self.sublayers, int) else self.sublayers(block)


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

# By the name of a class of blocks.
REGISTERED: dict[str, Adapter] = {}


def wide_block(
    *names: str, sublayers: int | CountSublayers
) -> Callable[[BlockFunction], BlockFunction]:
    """Register a function as the forward pass of blocks on streams.

    The function is called with the block, `x` and `connect`, and with the further arguments of the
    block's own `forward` by name. It returns the last `x`, or a tuple that begins with it where the
    block's own `forward` returns a tuple. `x` stands for the streams: only `connect` takes it.

    ```python
    @wide_block("MyBlock", sublayers=1)
    def my_block(block, x, connect, mask=None):
        return connect(0, x, lambda u: block.attention(block.norm(u), mask))
    ```

    Args:
        names: Names of the classes of blocks.
        sublayers: How often the function calls `connect`, at least once; or a function of the
            block, where that depends on its settings.

    Raises:
        UserError: No name is given, or `sublayers` is below 1.
    """
    if not names or (isinstance(sublayers, int) and sublayers < 1):
        raise UserError(
            f"wide_block{names} with sublayers={sublayers} registers nothing; give it the names of"
            " the classes of blocks, and the number of their sub-layers, at least 1"
        )

    def register(function: BlockFunction) -> BlockFunction:
        REGISTERED.update(dict.fromkeys(names, Adapter(function, sublayers)))
        return function

    return register


class _Entry(NamedTuple):
    """The streams [..., n, C] that enter a block, and their carry."""

    streams: Tensor
    carry: Tensor | None


class Connect:
    """Runs the connections of one block, in their order.

    Args:
        block: The wide block.
    """

    def __init__(self, block: "WideBlock") -> None:
        self._block = block
        self._due = 0

    def __call__(self, index: int, x: Any, sublayer: Sublayer) -> Any:
        """Run connection `index` of the block around a sub-layer.

        Args:
            index: The sub-layer's number in the block, from 0.
            x: The streams, as the block got them or the connection before returned them.
            sublayer: [..., C] -> [..., C], its norm included.

        Returns:
            The streams, for the next connection or to be returned by the block.

        Raises:
            UserError: The connections are not called in order, or the sub-layer's output has not
                the shape of its input.
        """
        connections, name = self._block.connections, type(self._block).__name__
        if index != self._due or index >= len(connections):
            raise UserError(
                f"the adapter of {name} calls connection {index} where {self._due} of"
                f" {len(connections)} is due; number the sub-layers 0, 1, … in their order, and"
                " give their count as sublayers=…"
            )
        if not isinstance(x, _Entry | Unmerged):
            raise UserError(
                f"the adapter of {name} gives connection {index} a {type(x).__name__}; give it"
                " the x that the adapter got, or that connect returned"
            )
        self._due += 1

        def checked(u: Tensor) -> Tensor:
            output = sublayer(u)
            if not isinstance(output, Tensor) or output.shape != u.shape:
                got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise UserError(
                    f"sub-layer {index} of {name} returns {got} for an input of shape"
                    f" {list(u.shape)}; it has to return one tensor of the shape of its input"
                )
            return output

        connection: Any = connections[index]
        if isinstance(x, Unmerged):
            return connection.run(x, checked)
        return connection.run(x.streams, checked, x.carry)

    def merged(self, x: Any) -> tuple[Tensor, Tensor | None]:
        """The streams after the last connection, and their carry.

        Raises:
            UserError: Not all connections have been called.
        """
        if not isinstance(x, Unmerged) or self._due != len(self._block.connections):
            raise UserError(
                f"the adapter of {type(self._block).__name__} calls {self._due} of"
                f" {len(self._block.connections)} connections and returns a {type(x).__name__};"
                " it has to return what the last connect returned, alone or first in a tuple"
            )
        return x.merge()


class WideBlock:
    """What the blocks of an upcycled network have in common.

    Attributes:
        connections: The connections of the block's sub-layers.
    """

    adapter: ClassVar[Adapter]
    original_class: ClassVar[type[nn.Module]]
    argument_names: ClassVar[Sequence[str]]  # of the original `forward`, from the hidden state on

    connections: nn.ModuleList
    _is_first: bool
    _is_last: bool
    _returns_carry: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block with a hidden state, or what the wide block before returned."""
        name = type(self).argument_names[0]
        if not args and name in kwargs:
            args = (kwargs.pop(name),)
        # Reentrant checkpoints give gradients to tensors that are arguments or results themselves,
        # not to those in tuples. So `forward` takes and returns the carry as one of these.
        if args and isinstance(args[0], tuple):
            args, kwargs = (*args[0], *args[1:]), {**kwargs, "carried": True}
        returned = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if not self._returns_carry:
            return returned
        streams, carry, *extras = returned
        return ((streams, carry), *extras[0]) if extras else (streams, carry)

    def forward(self, hidden: Any, *args: Any, carried: bool = False, **kwargs: Any) -> Any:
        """Run the block on streams.

        Args:
            hidden: The hidden state [..., C] if this is the first block, else streams [..., n, C].
            args: The carry first if `carried`; then arguments of the original `forward`.
            carried: Whether there is a carry.
            kwargs: Arguments of the original `forward`.

        Returns:
            The hidden state [..., C] if this is the last block, else streams [..., n, C]; behind
            streams the carry, if connections have one. What else the block returns comes last, as
            in the original block; behind a carry, as one tuple.

        Raises:
            UserError: The hidden state's width is not that of the connections.
        """
        if isinstance(hidden, tuple):
            hidden, args, carried = hidden[0], (hidden[1], *args), True
        carry, *args = args if carried else (None, *args)  # type: ignore[assignment]
        first: Any = self.connections[0]
        if self._is_first:
            if hidden.shape[-1] != first.dim:
                raise UserError(
                    f"the first {type(self).__name__} gets hidden states {list(hidden.shape)}, and"
                    f" the connections were built for a width of {first.dim}; give upcycle the"
                    " right dim=…"
                )
            hidden = expand_streams(hidden, first.num_streams)
        kwargs.update(zip(type(self).argument_names[1:], args, strict=False))
        connect = Connect(self)
        returned = type(self).adapter.function(self, _Entry(hidden, carry), connect, **kwargs)
        alone = isinstance(returned, _Entry | Unmerged) or not isinstance(returned, tuple)
        x, *extras = (returned,) if alone else returned
        streams, carry = connect.merged(x)
        if self._is_last:
            out = mean_streams(streams) if carry is None else aggregate_streams(streams, carry)
        else:
            out = streams
        if self._returns_carry:
            return (out, carry) if alone else (out, carry, tuple(extras))
        return out if alone else (out, *extras)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the original class and the adapter: this class has no name."""
        cls, state = type(self), nn.Module.__getstate__(self)  # type: ignore[arg-type]
        return _new_block, (cls.original_class, cls.adapter), state


def widen(
    block: nn.Module, adapter: Adapter, connections: Sequence[Connection], first: bool, last: bool
) -> None:
    """Make a block run on streams, in place.

    Args:
        block: The block.
        adapter: Its adapter.
        connections: A connection for each of its sub-layers.
        first: Whether it is the first of its network, which gets a hidden state.
        last: Whether it is the last, which returns one.
    """
    like = torch.empty(1, connections[-1].num_streams, connections[-1].dim, device="meta")
    carries = connections[-1].carry_like(like) is not None
    wide: Any = block
    wide.__class__ = wide_class(wide.__class__, adapter)
    wide.connections = nn.ModuleList(connections).train(block.training)
    wide._is_first, wide._is_last, wide._returns_carry = first, last, carries and not last


@cache
def wide_class(original: Any, adapter: Adapter) -> type[nn.Module]:
    """The class of wide blocks made of `original`."""
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]  # not `self`
    attributes = {
        "__module__": original.__module__,
        "__doc__": f"{original.__name__} on several residual streams.",
        "adapter": adapter,
        "original_class": original,
        "argument_names": tuple(p.name for p in parameters if p.kind in _POSITIONAL),
    }
    # Other libraries look for classes of blocks by their names.
    return type(original.__name__, (WideBlock, original), attributes)


def _new_block(original: Any, adapter: Adapter) -> nn.Module:
    cls = wide_class(original, adapter)
    return cls.__new__(cls)
