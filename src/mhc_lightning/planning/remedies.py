"""Changes of settings that make a run fit into memory."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from mhc_lightning.modules import Transformer
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.pipeline_remedies import Change, device_settings, pipeline_changes
from mhc_lightning.planning.planned_run import PlannedRun, run_fits
from mhc_lightning.planning.precision import precision_of
from mhc_lightning.planning.recompute import best_block
from mhc_lightning.planning.tables import ngram_tables

_MOST_DEVICES = 1024
_SHORTEST_SEQUENCE = 128


def remedies(model: Transformer, run: PlannedRun, machine: Machine) -> list[str]:
    """Changes that each make `run` fit on devices of `machine`'s kind, as overrides.

    Of each kind of change, the smallest that suffices is given. If no change of one kind suffices,
    sharding and the smallest micro-batch are tried together.

    Args:
        model: The model; it may be on the meta device.
        run: A run that does not fit.
        machine: The machine on which the run does not fit.
    """

    def fits(changed: PlannedRun) -> bool:
        return run_fits(model, changed, machine)

    def first_of(kinds: Iterable[Iterable[Change]]) -> list[str]:
        found = (next((text for text, changed in kind if fits(changed)), None) for kind in kinds)
        return [text for text in found if text is not None]

    shorter = ((f"data.sequence_length={r.sequence_length}", r) for r in _shorter(run))
    lower = ((f"trainer.precision={name}", r) for name, r in _lower(run))
    placed = [[(f"memory.placement={r.rows.placement}", r)] for r in _placed(run, model)]
    if run.pipeline is not None:
        return first_of([*pipeline_changes(model, run, machine), *placed, shorter, lower])
    smaller = ((f"data.micro_batch_size={r.micro_batch_size}", r) for r in _smaller(run))
    sharded = ((_sharding(r, machine), r) for r in _sharded(run, machine))
    recomputing = (("recompute=auto", r) for r in _recomputing(run, model))
    found = first_of((*placed, recomputing, smaller, shorter, lower, sharded))
    if found:
        return found
    least = replace(run, micro_batch_size=1)
    both = (
        (f"{_sharding(r, machine)} data.micro_batch_size=1", r) for r in _sharded(least, machine)
    )
    elsewhere = (
        (f"memory.placement={r.rows.placement} data.micro_batch_size=1", r)
        for r in _placed(least, model)
    )
    return first_of([elsewhere, both])


def _recomputing(run: PlannedRun, model: Transformer) -> Iterator[PlannedRun]:
    if run.recompute_block == 0 < best_block(model):
        yield replace(run, recompute_block=best_block(model))


def _placed(run: PlannedRun, model: Transformer) -> Iterator[PlannedRun]:
    """The other placements of a memory's tables."""
    if ngram_tables(model):
        now = run.sharing.placement
        for name in ("sharded", "host"):
            changed = replace(run, rows=replace(run.rows, placement=name))
            if name != now and (name == "host" or run.replicas.devices > 1):
                yield changed


def _smaller(run: PlannedRun) -> Iterator[PlannedRun]:
    share = run.batch_size // run.replicas.devices
    for size in range(run.micro_batch_size - 1, 0, -1):
        if share % size == 0:
            yield replace(run, micro_batch_size=size)


def _shorter(run: PlannedRun) -> Iterator[PlannedRun]:
    length = run.sequence_length // 2
    while length >= _SHORTEST_SEQUENCE:
        yield replace(run, sequence_length=length)
        length //= 2


def _lower(run: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    # Not bf16-true, in which small updates are lost.
    precision = precision_of("bf16-mixed")
    if precision != run.precision and precision <= run.precision:
        yield "bf16-mixed", replace(run, precision=precision)


def _sharded(run: PlannedRun, machine: Machine) -> Iterator[PlannedRun]:
    """Twice as many devices each time; first the present ones, if only sharding is missing."""
    devices = max(run.replicas.devices, 1 if run.replicas.sharded else machine.devices)
    while devices <= _MOST_DEVICES:
        layout = replace(run.replicas, devices=devices, sharded=True, copies_gradients=False)
        divides = run.batch_size % (run.micro_batch_size * devices) == 0
        if devices > 1 and divides and layout != run.replicas:
            yield replace(run, replicas=layout)
        devices *= 2


def _sharding(run: PlannedRun, machine: Machine) -> str:
    """`strategy=fsdp` with the devices that it needs."""
    return f"strategy=fsdp {device_settings(run.replicas.devices, machine)}"
