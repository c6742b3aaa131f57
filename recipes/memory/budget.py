"""Sparse parameters exchanged: experts, feed-forward width and rows of memories, for a budget."""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from commands import command

from mhc_lightning.modules.memory.layout import NgramLayout, prime_layout, spaced_layout

ORDERS = (2, 3)
HEADS = 4  # of each order


@dataclass(frozen=True)
class Sizes:
    """The sizes of an experiment that parameters are counted from.

    Attributes:
        vocabulary: V.
        dim: C.
        streams: n.
        blocks: Blocks.
        expert_blocks: Those with experts.
        expert_dim: Width of one expert.
        experts: Routed experts of a block.
        active: Of these, active for a token.
        shared: Shared experts.
        steps: Optimizer steps.
    """

    vocabulary: int
    dim: int
    streams: int
    blocks: int
    expert_blocks: int
    expert_dim: int
    experts: int
    active: int
    shared: int
    steps: int

    @property
    def per_expert(self) -> int:
        """Parameters of one expert."""
        return 3 * self.dim * self.expert_dim

    @property
    def row_width(self) -> int:
        """Width of a row: all rows of a position together are as wide as a stream."""
        return self.dim // (len(ORDERS) * HEADS)


def read_sizes(config: str, overrides: Sequence[str]) -> Sizes:
    """The sizes that an experiment has with these overrides.

    Raises:
        SystemExit: `fit` refuses them; with its exit code.
    """
    words = command("fit", "--config", config, *overrides, "--print-config")
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    config_values: dict[str, Any] = yaml.safe_load(done.stdout)
    model = config_values["model"]
    residual = config_values["connection"]["_target_"].endswith(".ResidualConnection")
    return Sizes(
        vocabulary=model["vocab_size"],
        dim=model["dim"],
        streams=1 if residual else model["num_streams"],
        blocks=model["num_layers"],
        expert_blocks=model["num_layers"] - model["num_dense_layers"],
        expert_dim=model["ffn_dim"],
        experts=model["num_experts"],
        active=model["num_active_experts"],
        shared=model["num_shared_experts"],
        steps=config_values["trainer"]["max_steps"],
    )


def engram_words(sizes: Sizes, rows: int, blocks: Sequence[int]) -> tuple[str, ...]:
    """The settings of Engram with so many rows per head in these blocks."""
    return (
        *("memory=engram", f"memory.num_heads={HEADS}", f"memory.dim={HEADS * sizes.row_width}"),
        *(f"memory.rows={rows}", f"memory.layers=[{','.join(map(str, blocks))}]"),
    )


def over_encoding_words(sizes: Sizes, rows: int) -> tuple[str, ...]:
    """The settings of Over-Encoding with so many rows in its first head."""
    return (
        *("memory=over_encoding", f"memory.num_heads={HEADS}"),
        *(f"memory.dim={HEADS * sizes.row_width}", f"memory.rows={rows}"),
    )


def table_parameters(layout: NgramLayout, sizes: Sizes) -> int:
    """Parameters of the tables, with the rows that fill them up to a whole size."""
    return len(layout.tables) * layout.heads * layout.rows_per_head * sizes.row_width


def engram_rows(sizes: Sizes, parameters: int, blocks: Sequence[int]) -> int:
    """The most rows per head with which Engram's tables have no more than so many parameters."""
    return _most_rows(
        lambda rows: table_parameters(prime_layout(blocks, ORDERS, HEADS, rows), sizes), parameters
    )


def over_encoding_rows(sizes: Sizes, parameters: int) -> int:
    """The same for Over-Encoding; an odd number, so that no head's is a multiple of V."""

    def counted(pairs: int) -> int:
        layout = spaced_layout(ORDERS, HEADS, 2 * pairs + 1, sizes.vocabulary)
        return table_parameters(layout, sizes)

    return 2 * _most_rows(counted, parameters) + 1


def engram_projections(sizes: Sizes, blocks: Sequence[int]) -> int:
    """Parameters of Engram's keys and values; every token passes them."""
    width = len(ORDERS) * HEADS * sizes.row_width
    return len(blocks) * (sizes.streams + 1) * sizes.dim * width


def _most_rows(counted: Callable[[int], int], parameters: int) -> int:
    """The largest number whose count is within the parameters.

    Raises:
        SystemExit: Not even the smallest is.
    """
    low, high = len(ORDERS) * HEADS, parameters
    if counted(low) > parameters:
        raise SystemExit(
            f"error: {parameters:,} parameters are too few for the smallest memory,"
            f" {counted(low):,}; use a larger model"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if counted(middle) <= parameters else (low, middle)
    return low
