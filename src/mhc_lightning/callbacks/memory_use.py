"""The callback that logs how a memory of n-grams is used: gates, rows, collisions, norms."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor

from mhc_lightning.callbacks.row_use import RowUse, row_use
from mhc_lightning.callbacks.sampler import Sampler
from mhc_lightning.callbacks.watching.memory_readings import ExtractReading, MemorySight
from mhc_lightning.callbacks.watching.memory_watcher import MemoryWatcher
from mhc_lightning.strategies.layout import layout_of


class MemoryUse(Sampler[dict[str, Tensor]]):
    """Logs what the first micro-batch of every n-th optimizer step shows of a model's memories.

    A place is `layer_<k>`, a memory in block k from 0, or `input`, a memory at the embedding.

    - `memory/gate/layer_<k>`: the mean gate over positions and streams;
      `memory/gate/layer_<k>/stream_<m>`: the same of stream m.
    - `memory/rows_touched`: the different rows that the micro-batch reads, of all tables;
      `memory/rows_touched/<place>`: of one.
    - `memory/collisions`: of the different n-grams of the micro-batch, as the hash sees them, the
      share whose row is also that of another one; each head by itself, then averaged over all
      n-grams and heads. Two n-grams of one class count as one. `memory/collisions/<place>` is of
      one table, and `memory/collisions/order_<n>` of the n-grams of n tokens. The share grows with
      the micro-batch.
    - `memory/added_norm/<place>`: ‖what the memory adds‖ / ‖what it adds to‖, both over the whole
      micro-batch: streams, or the embedding.

    Without a memory nothing is logged. Every process samples its own micro-batch, and loggers write
    rank zero's sample. Under a pipeline it is the first micro-batch, of all stages. Of a module
    that is called several times in a step the first call counts.

    Args:
        every_n_steps: Optimizer steps between samples; None takes the trainer's
            `log_every_n_steps`.
        extract: `(module, args, output) -> MemoryReading | None`, for modules of another project;
            several modules may each show a part of one memory. It must not wait for the device.

    Raises:
        UserError: The interval is not a positive integer; at the first sample, `extract` returned
            no reading, or rows that do not fit the rest of it.
    """

    _watcher: MemoryWatcher

    def __init__(
        self, every_n_steps: int | None = None, extract: ExtractReading | None = None
    ) -> None:
        super().__init__(every_n_steps, MemoryWatcher(extract))

    def _close(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, Tensor] | None:
        values = memory_numbers(self._watcher.close())
        layout = layout_of(trainer.strategy)
        if layout.pipeline_group is not None:
            # Stages hold different blocks; all of them have hashed the same tokens.
            here = {tag: value.cpu() for tag, value in values.items()}
            stages = layout.gather_over_pipeline(here)
            values = {tag: value for stage in stages for tag, value in stage.items()}
        return values or None


def memory_numbers(sights: Sequence[MemorySight]) -> dict[str, Tensor]:
    """The numbers of a sample by tag, each a scalar; the first sight of a place counts."""
    values: dict[str, Tensor] = {}
    uses: dict[str, tuple[RowUse, tuple[int, ...]]] = {}
    for place, gate, added, rows, suffixes, orders in sights:
        tag = f"memory/gate/{place}"
        if gate is not None and tag not in values:
            values[tag] = gate.mean()
            values.update({f"{tag}/stream_{m}": mean for m, mean in enumerate(gate.unbind())})
        if added is not None:
            values.setdefault(f"memory/added_norm/{place}", added)
        if rows is not None and suffixes is not None and place not in uses:
            uses[place] = row_use(rows, suffixes, orders), orders
    if uses:
        values.update(_rows_and_collisions(uses))
    return values


def _rows_and_collisions(
    uses: dict[str, tuple[RowUse, tuple[int, ...]]],
) -> dict[str, Tensor]:
    tables = [use for use, _ in uses.values()]
    whole = RowUse(*(torch.cat(counts) for counts in zip(*tables, strict=True)))
    orders = [n for _, of_heads in uses.values() for n in of_heads]
    values = {"memory/rows_touched": whole.touched.sum(), "memory/collisions": _share(whole)}
    for order in sorted(set(orders)):
        heads = [head for head, n in enumerate(orders) if n == order]
        of_order = RowUse(*(counts[heads] for counts in whole))
        values[f"memory/collisions/order_{order}"] = _share(of_order)
    for place, (use, _) in uses.items():
        values[f"memory/rows_touched/{place}"] = use.touched.sum()
        values[f"memory/collisions/{place}"] = _share(use)
    return values


def _share(use: RowUse) -> Tensor:
    return use.colliding.sum() / use.ngrams.sum()
