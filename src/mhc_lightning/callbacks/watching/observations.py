"""Observations: the sub-layers of one step in the order of their calls, linked into chains."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mhc_lightning.errors import UserError
from mhc_lightning.kernels import StreamMappings


class Observation(NamedTuple):
    """One residual sub-layer as it was called.

    Attributes:
        name: Qualified name of the module that yielded the record.
        mappings: The record, detached: pre [..., n], post [..., n], residual [..., n, n].
        note: The result of the watcher's `note` function, or None.
        stage: The pipeline stage of the sub-layer; 0 without a pipeline.
        layer: The sub-layer's number, from 0 in the order of the calls.
        after: The number of the sub-layer whose output this one reads; None if it begins a chain.
    """

    name: str
    mappings: StreamMappings
    note: Any
    stage: int = 0
    layer: int = 0
    after: int | None = None


def predecessors(observations: Sequence[Observation]) -> list[int | None]:
    """For each observation the index, in this list, of its predecessor.

    None where the observation begins a chain, or where its predecessor is not in the list.
    """
    index = {observation.layer: k for k, observation in enumerate(observations)}
    return [None if o.after is None else index.get(o.after) for o in observations]


class Sighting(NamedTuple):
    """One record as a hook saw it; records that a module only passes on still count.

    Attributes:
        order: Larger than that of earlier sightings.
        name: As in `Observation`.
        mappings: The result of `extract`.
        note: As in `Observation`.
        stage: As in `Observation`.
        after: The order of the sighting whose output this one reads.
        compiled: True if the record comes from a compiled program: then `after` is not known yet.
    """

    order: int
    name: str
    mappings: StreamMappings
    note: Any
    stage: int = 0
    after: int | None = None
    compiled: bool = False


def in_order(
    sightings: Sequence[Sighting], program_starts: Mapping[int, int | None]
) -> tuple[list[Observation], str | None]:
    """The sub-layers in the order of their calls, each once.

    Args:
        sightings: In any order.
        program_starts: For each call of a compiled program: the order of its first sighting, mapped
            to the order of that sighting's predecessor.

    Returns:
        The observations, and the name of a module that was met again within one call of a compiled
        program, if there is one.

    Raises:
        UserError: A record is not a `StreamMappings`, or not of square matrices.
    """
    sightings = sorted(sightings, key=lambda sighting: sighting.order)
    after, met_again = _link_programs(sightings, program_starts)
    layer_of: dict[int, int] = {}  # by order
    by_record: dict[int, list[Sighting]] = {}
    observations: list[Observation] = []
    for s in sightings:
        same_record = by_record.setdefault(id(getattr(s.mappings, "residual", s)), [])
        source = next((other for other in same_record if _contains(s.name, other.name)), None)
        same_record.append(s)
        if source is not None:  # the module only passed on the record of a module inside it
            layer_of[s.order] = layer_of[source.order]
            continue
        layer_of[s.order] = layer = len(observations)
        before = after[s.order]
        before_layer = None if before is None else layer_of.get(before)
        record = _checked(s)
        observations.append(Observation(s.name, record, s.note, s.stage, layer, before_layer))
    return observations, met_again


def is_record(mappings: Any) -> bool:
    """True for a `StreamMappings` of three tensors."""
    return isinstance(mappings, StreamMappings) and all(isinstance(m, Tensor) for m in mappings)


def _link_programs(
    sightings: Sequence[Sighting], program_starts: Mapping[int, int | None]
) -> tuple[dict[int, int | None], str | None]:
    """By order, the predecessor of each sighting; and a module that one program called again.

    Inside a compiled program sub-layers follow one another until a module is met again, which
    begins a new chain.
    """
    after = {sighting.order: sighting.after for sighting in sightings}
    chain: set[str] = set()  # modules in the current chain of the program
    met_again = None
    for previous, sighting in zip([None, *sightings], sightings, strict=False):
        if not sighting.compiled:
            continue
        name = sighting.name
        if sighting.order in program_starts:
            after[sighting.order] = program_starts[sighting.order]
            chain = set()
        elif previous is None or not previous.compiled:
            chain = set()
        elif name in chain:
            met_again, chain = name, set()
        else:
            after[sighting.order] = previous.order
        chain.add(name)
    return after, met_again


def _contains(name: str, inner: str) -> bool:
    """True if the module `inner` is inside the module `name`."""
    return name == "" or inner.startswith(f"{name}.")


def _checked(sighting: Sighting) -> StreamMappings:
    """The record, detached.

    Raises:
        UserError: It is not a `StreamMappings`, or not of square matrices.
    """
    mappings = sighting.mappings
    if not isinstance(mappings, StreamMappings):
        raise UserError(
            f"extract returned a {type(mappings).__name__} for the module {sighting.name!r};"
            " return a StreamMappings, or None for modules that are not of interest"
        )
    residual = mappings.residual
    if (
        not isinstance(residual, Tensor)
        or residual.dim() < 2
        or residual.shape[-1] != residual.shape[-2]
    ):
        shape = tuple(residual.shape) if isinstance(residual, Tensor) else type(residual).__name__
        raise UserError(
            f"the residual mapping of the module {sighting.name!r} has shape {shape};"
            " [..., n, n] is needed, one matrix per token"
        )
    return StreamMappings(*(t.detach() if isinstance(t, Tensor) else t for t in mappings))
