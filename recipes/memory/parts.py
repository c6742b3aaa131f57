"""The parts of the recipe: which variants each compares, and with what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from budget import (
    Sizes,
    engram_projections,
    engram_rows,
    engram_words,
    over_encoding_rows,
    over_encoding_words,
    read_sizes,
)
from commands import shown
from gaps import Cost

from mhc_lightning.modules.memory.engram import default_blocks

HERE = Path(__file__).parent
DENSE, EXPERTS = HERE / "cpu.yaml", HERE / "cpu_experts.yaml"

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Shares of the sparse parameters that remain experts'."""
ROWS = (1031, 4099, 16411, 65537, 262147)
"""Rows per head; primes, and so no multiples of the vocabulary."""
MIDDLE = ROWS[2]
MEMORIES = ("engram", "over_encoding")
CONNECTIONS = ("residual", "hc", "mhc")
FEW_EXPERTS = 16
EXTRA_EXPERTS = 24
"""As many parameters as these have are put in one place or another by `what_for`."""
EQUAL_FLOPS = ", equal FLOPs"
"""Ends the names of runs that are shorter, since a token costs more."""
_SAME_FLOPS = 0.02  # a smaller difference counts as none


@dataclass(frozen=True)
class Variant:
    """One thing that a part trains, with every seed.

    Attributes:
        name: Within its part.
        run: The name of its runs; parts that train the same share them.
        config: The experiment.
        overrides: Settings that differ from it.
        baseline: The variant that its losses are compared with; None for a baseline.
        place: Where it stands on the part's axis, if there is one.
    """

    name: str
    run: str
    config: str
    overrides: tuple[str, ...]
    baseline: str | None = None
    place: float | None = None


Costs = Callable[[str, Sequence[str]], Cost]
"""The cost of an experiment with overrides, as `plan` counts it."""


def allocation(words: tuple[str, ...], costs: Costs) -> list[Variant]:
    """A fixed number of sparse parameters, moved from routed experts to Engram.

    Sparse parameters are, as in the paper, those of experts that a token does not pass, and of
    tables.
    """
    config = shown(EXPERTS)
    sizes = read_sizes(config, words)
    inactive, blocks = sizes.experts - sizes.active, _two_blocks(sizes)
    variants: list[Variant] = []
    for share in SHARES:
        moved = round((1 - share) * inactive)
        overrides = words
        if moved:
            rows = engram_rows(sizes, moved * sizes.per_expert * sizes.expert_blocks, blocks)
            experts = (f"model.num_experts={sizes.experts - moved}",)
            overrides = (*words, *experts, *engram_words(sizes, rows, blocks))
        name, place = f"{share:.0%}", 1 - moved / inactive
        baseline = None if not variants else variants[0].name
        variants.append(
            Variant(name, f"allocation_{share:.1f}", config, overrides, baseline, place)
        )
    return variants


def scaling(words: tuple[str, ...], costs: Costs) -> list[Variant]:
    """Engram and Over-Encoding with more and more rows."""
    config = shown(DENSE)
    sizes = read_sizes(config, words)
    variants = [_none(config, words)]
    for memory in MEMORIES:
        for rows in ROWS:
            own = _memory(memory, sizes, rows)
            run = f"dense_{memory}_{rows}"
            variants.append(
                Variant(f"{memory} {rows:,}", run, config, (*words, *own), "none", rows)
            )
    return variants


def where(words: tuple[str, ...], costs: Costs) -> list[Variant]:
    """One Engram module in each block, and the same parameters in two blocks."""
    config = shown(DENSE)
    sizes = read_sizes(config, words)
    variants = [_none(config, words)]
    for block in range(sizes.blocks):
        own = engram_words(sizes, MIDDLE, [block])
        run = f"where_block_{block}"
        variants.append(
            Variant(f"block {block}", run, config, (*words, *own), "none", float(block))
        )
    blocks = _two_blocks(sizes)
    own = engram_words(sizes, MIDDLE // 2, blocks)
    name = f"blocks {' and '.join(map(str, blocks))}"
    return [*variants, Variant(name, "where_two_blocks", config, (*words, *own), "none")]


def what_for(words: tuple[str, ...], costs: Costs) -> list[Variant]:
    """The same extra parameters in feed-forward width, experts, Over-Encoding or Engram.

    Each for the same tokens; and, where a token costs more, for the same FLOPs.
    """
    config, few = shown(EXPERTS), (*words, f"model.num_experts={FEW_EXPERTS}")
    sizes = read_sizes(config, few)
    router = sizes.dim
    extra = EXTRA_EXPERTS * (sizes.per_expert + router) * sizes.expert_blocks
    shared = round(extra / (sizes.per_expert * sizes.blocks))  # dense blocks widen with them
    blocks = _two_blocks(sizes)
    tables = extra - engram_projections(sizes, blocks)
    own = {
        "none": (),
        "ffn": (f"model.num_shared_experts={sizes.shared + shared}",),
        "experts": (f"model.num_experts={FEW_EXPERTS + EXTRA_EXPERTS}",),
        "over_encoding": over_encoding_words(
            sizes, over_encoding_rows(sizes, extra - sizes.dim**2)
        ),
        "engram": engram_words(sizes, engram_rows(sizes, tables, blocks), blocks),
    }
    variants = [
        Variant(name, f"what_for_{name}", config, (*few, *more), None if not more else "none")
        for name, more in own.items()
    ]
    base = costs(config, variants[0].overrides).flops_per_token
    for variant in variants[1:]:
        dearer = costs(config, variant.overrides).flops_per_token / base
        if abs(dearer - 1) > _SAME_FLOPS:
            steps = max(1, round(sizes.steps / dearer))
            length = (f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}")
            name = f"{variant.name}{EQUAL_FLOPS}"
            run, overrides = f"{variant.run}_equal_flops", (*variant.overrides, *length)
            variants.append(Variant(name, run, config, overrides, "none"))
    return variants


def connections(words: tuple[str, ...], costs: Costs) -> list[Variant]:
    """Each memory with each connection, against the connection without memory."""
    config = shown(DENSE)
    variants = []
    for connection in CONNECTIONS:
        # The configuration's own is not named: other parts train the same runs.
        default = connection == CONNECTIONS[0]
        own = words if default else (*words, f"connection={connection}")
        runs = "dense" if default else f"dense_{connection}"
        sizes = read_sizes(config, own)
        variants.append(Variant(connection, f"{runs}_none", config, own))
        for memory in MEMORIES:
            overrides = (*own, *_memory(memory, sizes, MIDDLE))
            name = f"{connection}, {memory}"
            run = f"{runs}_{memory}_{MIDDLE}"
            variants.append(Variant(name, run, config, overrides, connection))
    return variants


PARTS = {
    "allocation": allocation,
    "scaling": scaling,
    "where": where,
    "what_for": what_for,
    "connections": connections,
}


def _none(config: str, words: tuple[str, ...]) -> Variant:
    return Variant("none", "dense_none", config, words)


def _memory(memory: str, sizes: Sizes, rows: int) -> tuple[str, ...]:
    if memory == "engram":
        return engram_words(sizes, rows, _two_blocks(sizes))
    return over_encoding_words(sizes, rows)


def _two_blocks(sizes: Sizes) -> list[int]:
    return default_blocks(sizes.blocks)
