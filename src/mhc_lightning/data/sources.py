"""The prepared folders that training reads, and their weights: the values of `data.path`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mhc_lightning.data.prepared_data import PreparedData
from mhc_lightning.data.prepared_record import TRAIN
from mhc_lightning.data.sequence_reader import sequences_in
from mhc_lightning.data.tokenizers import load_tokenizer
from mhc_lightning.errors import UserError


@dataclass(frozen=True)
class Source:
    """One prepared folder.

    Attributes:
        path: Folder or object-store URL.
        weight: Relative frequency of its sequences; None stands for its number of tokens.
    """

    path: str
    weight: float | None = None


def parse_sources(path: Any) -> list[Source]:
    """Read `data.path`: a path, a list of paths and `{path, weight}`, or a mapping.

    A mapping is one `{path, weight}`, or maps names (for people) to paths or `{path, weight}`.

    Raises:
        UserError: `path` is none of these, or weights are given for some sources only.
    """
    if isinstance(path, Mapping) and "path" not in path:
        entries = list(path.values())
    elif isinstance(path, Sequence) and not isinstance(path, str):
        entries = list(path)
    else:
        entries = [path]
    sources = [_parse_source(entry) for entry in entries]
    if not sources:
        raise UserError("data.path names no source; give a prepared folder or its URL")
    if len({source.weight is None for source in sources}) > 1:
        raise UserError(
            "data.path gives weights for some sources only; give all of them one, or none"
        )
    if not math.isfinite(sum(source.weight or 0.0 for source in sources)):
        raise UserError("the weights in data.path are too large to add; give smaller ones")
    return sources


def _parse_source(entry: Any) -> Source:
    if isinstance(entry, Mapping):
        unknown = set(entry) - {"path", "weight"}
        if unknown or "path" not in entry:
            keys = ", ".join(map(str, entry))
            raise UserError(f"a source in data.path has the keys {keys}; it takes path and weight")
        weight = entry.get("weight")
        if weight is not None and not (
            isinstance(weight, int | float) and 0 < weight < float("inf")
        ):
            raise UserError(f"weight of {entry['path']} is {weight}; give a positive number")
        return Source(str(entry["path"]), None if weight is None else float(weight))
    if not entry or (isinstance(entry, Sequence) and not isinstance(entry, str)):
        raise UserError(
            f"data.path has the source {entry!r}; give a folder, a URL or path and weight"
        )
    return Source(str(entry))


def open_sources(
    sources: Sequence[Source],
    sequence_length: int,
    tokenizer: str | None = None,
    cache_dir: str | None = None,
    storage_options: dict[str, Any] | None = None,
) -> tuple[list[PreparedData], list[float]]:
    """Open the folders, and check that training can combine them.

    Args:
        sources: The folders.
        sequence_length: Tokens to predict per sequence.
        tokenizer: The tokenizer that the folders must have been prepared with; None for any.
        cache_dir: See `PreparedData`.
        storage_options: See `PreparedData`.

    Returns:
        The folders, and the weight of each.

    Raises:
        UserError: A folder is missing or damaged, the tokenizers differ, or sequences are longer
            than the chunks.
    """
    opened = [PreparedData(source.path, cache_dir, storage_options) for source in sources]
    first = opened[0]
    if tokenizer is not None:
        named = load_tokenizer(tokenizer, first.record.tokenizer.get("end_of_document"))
        if named.fingerprint != first.record.tokenizer["fingerprint"]:
            raise UserError(
                f"{first.path} was prepared with another tokenizer ({_describe(first)}) than"
                f" data.tokenizer={tokenizer}; prepare it again with this one, or leave the key out"
            )
    for other in opened[1:]:
        if other.record.tokenizer["fingerprint"] != first.record.tokenizer["fingerprint"]:
            raise UserError(
                f"{first.path} ({_describe(first)}) and {other.path} ({_describe(other)}) were"
                " prepared with different tokenizers; prepare both with the same one"
            )
    for data in opened:
        chunks = data.chunks(TRAIN)
        if not any(sequences_in(chunk, sequence_length) for chunk in chunks):
            longest = max(chunk.tokens for chunk in chunks)
            raise UserError(
                f"data.sequence_length={sequence_length} is longer than the chunks of {data.path}:"
                f" the longest has {longest} tokens, enough for {longest - 1}; shorten it, or run"
                " `prepare` with more text or a larger chunk_bytes"
            )
    weights = [
        float(data.record.counts[TRAIN].tokens) if source.weight is None else source.weight
        for source, data in zip(sources, opened, strict=True)
    ]
    return opened, weights


def _describe(data: PreparedData) -> str:
    record = data.record.tokenizer
    return f"{record['kind']}, {record['vocab_size']} ids"
