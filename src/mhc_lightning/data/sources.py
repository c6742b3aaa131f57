"""The data that training reads, and their weights: the values of `data.path`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_lightning.data.chunk_cache import is_url
from mhc_lightning.data.prepared_data import PreparedData
from mhc_lightning.data.prepared_record import RECORD_FILE, TRAIN
from mhc_lightning.data.sequence_reader import sequences_in
from mhc_lightning.data.token_data.detection import find_token_files
from mhc_lightning.data.token_data.span_reader import IdLimit
from mhc_lightning.data.token_data.token_data import TokenData
from mhc_lightning.data.token_source import TokenSource
from mhc_lightning.data.tokenizers import Tokenizer, load_tokenizer
from mhc_lightning.errors import UserError


@dataclass(frozen=True)
class Source:
    """One prepared folder, or token data made elsewhere.

    Attributes:
        path: Folder, file or object-store URL.
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
    validation_fraction: float = 0.0,
) -> tuple[list[TokenSource], list[float]]:
    """Open the data, and check that training can combine them.

    Args:
        sources: The prepared folders and token data.
        sequence_length: Tokens to predict per sequence.
        tokenizer: The tokenizer that all tokens must have been made with; None for any.
        cache_dir: See `PreparedData`.
        storage_options: See `PreparedData`.
        validation_fraction: See `TokenData`.

    Returns:
        The opened data, and the weight of each.

    Raises:
        UserError: A source is missing or damaged, the tokenizers differ or are not known, or
            sequences are longer than the data.
    """
    opened = [
        _open(source.path, cache_dir, storage_options, validation_fraction) for source in sources
    ]
    _check_tokenizers(opened, tokenizer)
    for data in opened:
        chunks = data.chunks(TRAIN)
        if not any(sequences_in(chunk, sequence_length) for chunk in chunks):
            longest = max(chunk.tokens for chunk in chunks)
            raise UserError(
                f"data.sequence_length={sequence_length} is longer than the chunks of {data.path}:"
                f" the longest has {longest} tokens, enough for {longest - 1}; shorten it, or"
                f" {data.how_to_lengthen}"
            )
    weights = [
        float(data.num_tokens(TRAIN)) if source.weight is None else source.weight
        for source, data in zip(sources, opened, strict=True)
    ]
    return opened, weights


def _open(
    path: str,
    cache_dir: str | None,
    storage_options: dict[str, Any] | None,
    validation_fraction: float,
) -> TokenSource:
    if not is_url(path) and not (Path(path) / RECORD_FILE).exists():
        found = find_token_files(Path(path))
        if found is not None:
            return TokenData(path, found, validation_fraction)
    return PreparedData(path, cache_dir, storage_options)


def _check_tokenizers(opened: Sequence[TokenSource], tokenizer: str | None) -> None:
    """Check that all tokens were made with one tokenizer, and give it to token data."""
    prepared = [data for data in opened if isinstance(data, PreparedData)]
    others = [data for data in opened if isinstance(data, TokenData)]
    if tokenizer is not None:
        named = _named_tokenizer(tokenizer, prepared)
        for data in prepared[:1]:
            if named.fingerprint != data.tokenizer_fingerprint:
                raise UserError(
                    f"{data.path} was prepared with another tokenizer ({_describe(data)}) than"
                    f" data.tokenizer={tokenizer}; prepare it again with this one, or leave the key"
                    " out"
                )
        for each in others:
            each.name_tokenizer(named)
    elif prepared and others:
        raise UserError(
            f"{others[0].path} does not say which tokenizer its tokens were made with, and"
            f" {prepared[0].path} was prepared with {_describe(prepared[0])}; if it is the same,"
            " say so with data.tokenizer=…"
        )
    for other in prepared[1:]:
        if other.tokenizer_fingerprint != prepared[0].tokenizer_fingerprint:
            raise UserError(
                f"{prepared[0].path} ({_describe(prepared[0])}) and {other.path}"
                f" ({_describe(other)}) were prepared with different tokenizers; prepare both with"
                " the same one"
            )


def _named_tokenizer(spec: str, prepared: Sequence[PreparedData]) -> Tokenizer:
    """The tokenizer of `data.tokenizer`, with the ends of documents that prepared data have."""
    record = prepared[0].record.tokenizer if prepared else {}
    if "end_of_document" not in record:
        return load_tokenizer(spec)
    return load_tokenizer(spec, record["end_of_document"], record.get("begin_of_document", ""))


def end_of_document(sources: Sequence[TokenSource], given: int | None) -> int | None:
    """Id of the token that ends each document; None if nothing says it.

    Args:
        sources: The opened data.
        given: The id that is to be used where the data do not say it.

    Raises:
        UserError: The data say another one.
    """
    known = {data.end_of_document for data in sources}
    end = known.pop() if len(known) == 1 else None
    if given is not None and end is not None and given != end:
        raise UserError(
            f"data.end_of_document={given}, and the documents of {sources[0].path} end with {end};"
            " leave the key out"
        )
    return end if given is None else given


def limit_ids(
    sources: Sequence[TokenSource], vocab_size: int, pretrained: str | None = None
) -> None:
    """Refuse ids that a model has no row for; those of token data also as they are read.

    Args:
        sources: The opened data.
        vocab_size: The ids of the model.
        pretrained: The pretrained model that has them; None for one of `model.vocab_size`.

    Raises:
        UserError: The tokenizer has more ids than the model, or token data have one that the model
            has not.
    """
    has, to_set = f"model.vocab_size={vocab_size}", "set it to {}"
    if pretrained is not None:
        has = f"{pretrained} has {vocab_size}"
        to_set = f"tokenize the text with its own tokenizer (prepare.tokenizer={pretrained})"
    for data in sources:
        ids = data.vocab_size
        if ids is not None and ids > vocab_size:
            remedy = to_set.format(f"{ids} or more")
            raise UserError(f"the tokenizer of {data.path} has {ids} ids but {has}; {remedy}")
        if isinstance(data, TokenData):
            remedy = to_set.format("the number of ids of the tokenizer that made the data")
            data.limit_ids(IdLimit(vocab_size, has, remedy))


def _describe(data: PreparedData) -> str:
    return f"{data.record.tokenizer['kind']}, {data.vocab_size} ids"
