"""What was seen at the residual sub-layers of a step: in order, and what comes after what."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mhc_lightning.errors import UserError
from mhc_lightning.kernels import StreamMappings


class Observation(NamedTuple):
    """What was seen at one residual sub-layer.

    Attributes:
        name: Qualified name of the module that yielded the record.
        mappings: The record, detached.
        note: What the watcher's `note` function made of the call, or None.
        stage: The pipeline stage that the sub-layer is on; 0 without a pipeline.
        layer: Its number, from 0 in the order of the calls.
        after: The number of the sub-layer whose output it reads; None if it begins a chain.
    """

    name: str
    mappings: StreamMappings
    note: Any
    stage: int = 0
    layer: int = 0
    after: int | None = None


def links(observations: Sequence[Observation]) -> list[int | None]:
    """What each comes after, as a place among these observations; None if that is not there."""
    places = {observation.layer: place for place, observation in enumerate(observations)}
    return [None if o.after is None else places.get(o.after) for o in observations]


class Sighting(NamedTuple):
    """One record as it was found, before records that are only handed on are left out.

    Attributes:
        order: Larger than that of earlier ones.
        name: As in `Observation`.
        mappings: What `extract` returned.
        note: As in `Observation`.
        stage: As in `Observation`.
        after: The order of the one whose output it reads.
        compiled: Whether it is from a compiled program, so that `after` is still to be found.
    """

    order: int
    name: str
    mappings: StreamMappings
    note: Any
    stage: int = 0
    after: int | None = None
    compiled: bool = False


def in_order(
    sightings: Sequence[Sighting], programs: Mapping[int, int | None]
) -> tuple[list[Observation], str | None]:
    """The sub-layers in the order of their calls, each once.

    Args:
        sightings: In any order.
        programs: For the first sighting in each call of a compiled program, by its order, the order
            of the one that it comes after.

    Returns:
        The observations, and the name of a module that was met again within one call of a compiled
        program, if there is one.

    Raises:
        UserError: A record is none, or not of square matrices.
    """
    sightings = sorted(sightings, key=lambda sighting: sighting.order)
    after, unclear = _in_programs(sightings, programs)
    layers: dict[int, int] = {}  # by order
    by_record: dict[int, list[Sighting]] = {}
    observations: list[Observation] = []
    for s in sightings:
        alike = by_record.setdefault(id(getattr(s.mappings, "residual", s)), [])
        inside = next((other for other in alike if _holds(s.name, other.name)), None)
        alike.append(s)
        if inside is not None:  # the module only handed on what one inside it had returned
            layers[s.order] = layers[inside.order]
            continue
        layers[s.order] = layer = len(observations)
        before = after[s.order]
        place = None if before is None else layers.get(before)
        observations.append(Observation(s.name, _checked(s), s.note, s.stage, layer, place))
    return observations, unclear


def is_record(mappings: Any) -> bool:
    """Whether this is a record of three tensors."""
    return isinstance(mappings, StreamMappings) and all(isinstance(m, Tensor) for m in mappings)


def _in_programs(
    sightings: Sequence[Sighting], programs: Mapping[int, int | None]
) -> tuple[dict[int, int | None], str | None]:
    """What each comes after, those in compiled programs too, and a module that was met again."""
    after = {sighting.order: sighting.after for sighting in sightings}
    chain: set[str] = set()  # modules of the program's chain that is being followed
    unclear = None
    for previous, sighting in zip([None, *sightings], sightings, strict=False):
        if not sighting.compiled:
            continue
        name = sighting.name
        if sighting.order in programs:
            after[sighting.order] = programs[sighting.order]
            chain = set()
        elif previous is None or not previous.compiled:
            chain = set()
        elif name in chain:
            unclear, chain = name, set()
        else:
            after[sighting.order] = previous.order
        chain.add(name)
    return after, unclear


def _holds(name: str, inner: str) -> bool:
    return name == "" or inner.startswith(f"{name}.")


def _checked(sighting: Sighting) -> StreamMappings:
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
