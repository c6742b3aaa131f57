"""Making a trained residual network n streams wide."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Connection, ManifoldHyperConnection, Transformer
from mhc_lightning.upcycling.chain import Chain, find_chain, named_chain
from mhc_lightning.upcycling.own_transformer import upcycle_transformer
from mhc_lightning.upcycling.starting import started
from mhc_lightning.upcycling.wide_block import BlockFunction, WideBlock, widen


def upcycle(
    model: nn.Module,
    connection: Callable[..., Connection] = ManifoldHyperConnection,
    num_streams: int = 4,
    *,
    blocks: str | None = None,
    forward: BlockFunction | None = None,
    sublayers: int = 2,
    dim: int | None = None,
) -> Any:
    """Make a trained residual network n streams wide; it computes the same function at first.

    The blocks of the network become wide blocks in place: the first copies its input to n streams,
    the last reads them out. Everything else stays as it is: weights, names, dtypes, devices,
    training mode, and the network's own code. The connections' parameters are float32
    (`connections.0.phi` … in each block), and trainable.

    Blocks are known by the names of their classes, as registered with `wide_block`. A `Transformer`
    of this package with residual connections gets other ones.

    Args:
        model: The network, or a module that contains it.
        connection: Builds a connection from `dim`, `num_streams` and `layer_index`.
        num_streams: n.
        blocks: Where the blocks are, such as `"encoder.layers"`; needed with `forward`, and where a
            model has several networks.
        forward: The forward pass of the blocks on streams, as described at `wide_block`, where
            their class is not registered.
        sublayers: How often `forward` calls `connect`.
        dim: The width C of a stream, where neither the blocks nor the model's `config` have it as
            `hidden_size`.

    Returns:
        The same object.

    Raises:
        UserError: There is no adapter for the model, it is upcycled already, sizes do not fit, or
            the connection cannot start as a residual connection. The model is unchanged then.
    """
    if any(isinstance(module, WideBlock) for module in model.modules()):
        raise UserError(
            f"this {type(model).__name__} is upcycled already; upcycle the pretrained model, or"
            " go on with this one"
        )
    own = [module for module in model.modules() if isinstance(module, Transformer)]
    if own and blocks is None and forward is None:
        upcycle_transformer(own, connection, num_streams)
        return model
    if blocks is None:
        if forward is not None:
            raise UserError(
                "upcycle got forward=… and not where the blocks are; give it"
                ' blocks="…" too, such as blocks="encoder.layers"'
            )
        chain = find_chain(model)
    else:
        chain = named_chain(model, blocks, forward, sublayers)
    width = dim if dim is not None else _width(model, chain)
    _widen_chain(chain, connection, num_streams, width)
    return model


def _width(model: nn.Module, chain: Chain) -> int:
    """The width of the hidden states between blocks."""
    config: Any = getattr(model, "config", None)
    if callable(getattr(config, "get_text_config", None)):
        config = config.get_text_config()
    for holder, name in (
        (chain.blocks[0], "hidden_size"),
        (config, "hidden_size"),
        (chain.blocks[0], "dim"),
    ):
        width = getattr(holder, name, None)
        if isinstance(width, int):
            return width
    raise UserError(
        f"neither the blocks ({type(chain.blocks[0]).__name__}) nor the config of"
        f" {type(model).__name__} have a hidden_size; give upcycle the width of the hidden"
        " states as dim=…"
    )


def _widen_chain(
    chain: Chain, connection: Callable[..., Connection], num_streams: int, width: int
) -> None:
    built: list[Sequence[Connection]] = []
    index = 0
    for block, adapter in zip(chain.blocks, chain.adapters, strict=True):
        indices = range(index, index + adapter.count(block))
        index = indices.stop
        built.append([started(connection, width, num_streams, k, like=block) for k in indices])
    last = len(built) - 1
    for k, (block, adapter) in enumerate(zip(chain.blocks, chain.adapters, strict=True)):
        widen(block, adapter, built[k], first=k == 0, last=k == last)
