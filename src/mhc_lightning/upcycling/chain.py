"""Where the blocks of a network are."""

import re
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from mhc_lightning.errors import UserError
from mhc_lightning.upcycling.families.refused import REASONS
from mhc_lightning.upcycling.wide_block import REGISTERED, Adapter, BlockFunction

_WHAT_IT_IS = re.compile("(Decoder|Encoder)?(Layer|Block)$")  # behind a family's name
_PAGE = "docs/your_project/upcycling_families.md"


class Chain(NamedTuple):
    """The consecutive blocks of a network, each with its adapter."""

    blocks: list[nn.Module]
    adapters: list[Adapter]


def find_chain(model: nn.Module) -> Chain:
    """The blocks of a model, by the registered names of their classes.

    Raises:
        UserError: There are none, or several lists of them, or a list with other blocks between;
            or they are known not to be sums.
    """
    found: dict[str, nn.Module] = {}  # by name, the containers of registered blocks
    for name, module in model.named_modules():
        if any(type(child).__name__ in REGISTERED for child in module.children()):
            inside = any(name.startswith(f"{outer}.") for outer in found)
            if not inside:
                found[name] = module
    if not found:
        for module in model.modules():
            if reason := REASONS.get(type(module).__name__):
                raise UserError(
                    f"{type(model).__name__} cannot compute the same function on streams: its"
                    f" blocks ({type(module).__name__}) are no sums; {reason}"
                )
        block = _likely_block(model)
        raise UserError(
            f"there is no adapter for {type(model).__name__} with its blocks {block} (the nearest"
            f" that there is: {_nearest(block)}); {_PAGE} says how to write one"
        )
    if len(found) > 1:
        raise UserError(
            f"this {type(model).__name__} has several networks of blocks"
            f" ({', '.join(map(repr, found))}); say with blocks=… which one to upcycle"
        )
    ((name, container),) = found.items()
    return _chain(name, container)


def named_chain(
    model: nn.Module, blocks: str, forward: BlockFunction | None, sublayers: int
) -> Chain:
    """The blocks that a user names, with registered adapters or a given one.

    Raises:
        UserError: There are no blocks of that name, or one has no adapter.
    """
    try:
        container = model.get_submodule(blocks)
    except AttributeError as error:
        lists = [
            repr(name)
            for name, module in model.named_modules()
            if name and isinstance(module, nn.ModuleList | nn.Sequential)
        ]
        raise UserError(
            f"this {type(model).__name__} has no blocks={blocks!r}; lists of modules in it:"
            f" {', '.join(lists) or 'none'}"
        ) from error
    return _chain(blocks, container, None if forward is None else Adapter(forward, sublayers))


def _chain(name: str, container: nn.Module, given: Adapter | None = None) -> Chain:
    blocks = list(container.children())
    if not blocks:
        raise UserError(f"there is no block in {name!r}; name a list with blocks")
    adapters = []
    for key, block in container.named_children():
        adapter = given or REGISTERED.get(type(block).__name__)
        if adapter is None:
            raise UserError(
                f"{name}.{key} is a {type(block).__name__}, of which there is no adapter; {_PAGE}"
                " says how to write one"
            )
        if "forward" in vars(block):
            raise UserError(
                f"the forward of {name}.{key} ({type(block).__name__}) has been replaced, as"
                " accelerate's hooks do; upcycle the model before that"
            )
        if "connections" in vars(block) or hasattr(block, "connections"):
            raise UserError(
                f"{name}.{key} ({type(block).__name__}) has an attribute `connections` of its own,"
                " where the connections would go; rename it"
            )
        adapters.append(adapter)
    return Chain(blocks, adapters)


def _nearest(block: str) -> str:
    """The registered class whose family has the name that is most like that of `block`."""
    families = {_WHAT_IT_IS.sub("", name): name for name in REGISTERED}
    (nearest,) = get_close_matches(_WHAT_IT_IS.sub("", block), families, n=1, cutoff=0)
    return families[nearest]


def _likely_block(model: nn.Module) -> str:
    """The name of the class that the blocks of a model probably have."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)]
    longest = max(lists, key=len, default=None)
    return type(model if longest is None else longest[0]).__name__
