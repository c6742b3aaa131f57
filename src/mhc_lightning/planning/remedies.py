"""Settings that would make a run fit."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from mhc_lightning.modules import Transformer
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.memory import Layout
from mhc_lightning.planning.pipeline_remedies import Change, device_settings, pipeline_changes
from mhc_lightning.planning.plan import Run, run_memory
from mhc_lightning.planning.precision import precision_of
from mhc_lightning.planning.recompute import best_block

_MOST_DEVICES = 1024
_SHORTEST_SEQUENCE = 128


def remedies(model: Transformer, run: Run, machine: Machine) -> list[str]:
    """Changes that each make ``run`` fit on devices such as ``machine`` has, as overrides.

    Of each kind there is the smallest change that suffices. Where a change of one kind does not
    suffice, sharding and the smallest micro-batch are tried together.

    Args:
        model: The model; it may be on the meta device.
        run: A run that does not fit.
        machine: Where it does not fit.
    """

    def fits(changed: Run) -> bool:
        return run_memory(model, changed, machine).total <= machine.kind.memory

    def first_of(kinds: Iterable[Iterable[Change]]) -> list[str]:
        found = (next((text for text, changed in kind if fits(changed)), None) for kind in kinds)
        return [text for text in found if text is not None]

    shorter = ((f"data.sequence_length={r.sequence_length}", r) for r in _shorter(run))
    lower = ((f"trainer.precision={name}", r) for name, r in _lower(run))
    if run.pipeline is not None:
        return first_of([*pipeline_changes(model, run, machine), shorter, lower])
    smaller = ((f"data.micro_batch_size={r.micro_batch_size}", r) for r in _smaller(run))
    sharded = ((_sharding(r, machine), r) for r in _sharded(run, machine))
    recomputing = (("recompute=auto", r) for r in _recomputing(run, model))
    found = first_of((recomputing, smaller, shorter, lower, sharded))
    if found:
        return found
    least = replace(run, micro_batch_size=1)
    both = (
        (f"{_sharding(r, machine)} data.micro_batch_size=1", r) for r in _sharded(least, machine)
    )
    return first_of([both])


def _recomputing(run: Run, model: Transformer) -> Iterator[Run]:
    if run.recompute_block == 0 < best_block(model):
        yield replace(run, recompute_block=best_block(model))


def _smaller(run: Run) -> Iterator[Run]:
    share = run.batch_size // run.layout.devices
    for size in range(run.micro_batch_size - 1, 0, -1):
        if share % size == 0:
            yield replace(run, micro_batch_size=size)


def _shorter(run: Run) -> Iterator[Run]:
    length = run.sequence_length // 2
    while length >= _SHORTEST_SEQUENCE:
        yield replace(run, sequence_length=length)
        length //= 2


def _lower(run: Run) -> Iterator[tuple[str, Run]]:
    # Not bf16-true, in which small updates are lost.
    precision = precision_of("bf16-mixed")
    if precision != run.precision and precision <= run.precision:
        yield "bf16-mixed", replace(run, precision=precision)


def _sharded(run: Run, machine: Machine) -> Iterator[Run]:
    """Twice as many devices each time, and as many as there are if they only need sharding."""
    devices = max(run.layout.devices, 1 if run.layout.sharded else machine.devices)
    while devices <= _MOST_DEVICES:
        layout = Layout(devices, sharded=True)
        divides = run.batch_size % (run.micro_batch_size * devices) == 0
        if devices > 1 and divides and layout != run.layout:
            yield replace(run, layout=layout)
        devices *= 2


def _sharding(run: Run, machine: Machine) -> str:
    """``strategy=fsdp`` with the devices that it needs."""
    return f"strategy=fsdp {device_settings(run.layout.devices, machine)}"
