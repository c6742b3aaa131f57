"""Token data made elsewhere, opened: a value of `data.path` beside prepared folders.

The tokens are trained on as they are: none is added or left out. Nothing is written, and nothing is
copied. As no checksums come with such data, a checksum of samples names them in checkpoints.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from mhc_lightning.data.context_tokens import ids_of
from mhc_lightning.data.prepared_record import SPLITS, TRAIN, VALIDATION
from mhc_lightning.data.token_data.detection import Found
from mhc_lightning.data.token_data.span_reader import (
    NO_LIMIT,
    FileSpan,
    IdLimit,
    SpanReader,
    state_of,
)
from mhc_lightning.data.token_source import TokenSource
from mhc_lightning.data.tokenizers import Tokenizer
from mhc_lightning.errors import UserError

_SPAN_TOKENS = 1 << 24  # the order of sequences is shuffled within a window of spans
_SAMPLE_TOKENS = 1 << 14
_SAMPLES = 1 << 12  # in all, at least one of each span
_NAMES_SHOWN = 3


class TokenData(TokenSource):
    """Token data that another program wrote.

    A file is divided into spans of 16 Mi tokens, which take the place of chunks. Where no file is
    held out by its name, the last part of each span is.

    Args:
        path: As in `data.path`.
        found: Its files.
        validation_fraction: Share of the tokens to hold out if no file is.

    Attributes:
        largest_id: The largest id in the samples.

    Raises:
        UserError: A file cannot be read, holds negative ids, or all are empty.
    """

    def __init__(self, path: str, found: Found, validation_fraction: float) -> None:
        self.path, self.kind = path, found.kind
        self.tokenizer: Tokenizer | None = None
        self._found, self._limit = found, NO_LIMIT
        self._files = [file for split in SPLITS for file in found.files[split]]
        self._states = [state_of(file) for file in self._files]
        self._own_validation = bool(found.files[VALIDATION])
        self._spans = self._divide(0.0 if self._own_validation else validation_fraction)
        if not self._spans[TRAIN]:
            raise UserError(f"data.path {path} has no tokens to train on; all its files are empty")
        self._content, self.largest_id = self._sample()

    def _divide(self, held_out: float) -> dict[str, list[FileSpan]]:
        spans: dict[str, list[FileSpan]] = {split: [] for split in SPLITS}
        root = Path(self.path)
        for number, file in enumerate(self._files):
            split = TRAIN if number < len(self._found.files[TRAIN]) else VALIDATION
            inside = root.is_dir() and file.path.is_relative_to(root)
            name = file.path.relative_to(root).as_posix() if inside else file.path.name
            for start in range(0, file.tokens, _SPAN_TOKENS):
                tokens = min(_SPAN_TOKENS, file.tokens - start)
                kept = tokens - round(held_out * tokens)
                if kept:
                    spans[split].append(FileSpan(name, kept, number, start))
                if kept < tokens:
                    spans[VALIDATION].append(FileSpan(name, tokens - kept, number, start + kept))
        return spans

    def _sample(self) -> tuple[str, int]:
        """Checksum of the splits and of samples of their tokens, and the largest id in these."""
        import xxhash

        spans = [span for split in SPLITS for span in self._spans[split]]
        per_span = max(1, _SAMPLES // len(spans))
        digest, largest = xxhash.xxh3_128(f"{self.kind}/{self._files[0].dtype.name}".encode()), -1
        for split in SPLITS:
            for span in self._spans[split]:
                digest.update(f"\n{split}/{span.start}/{span.tokens}\n".encode())
                reader = self.open_chunk(span)
                try:
                    for start, count in _places(span.tokens, per_span):
                        tokens = reader.read(start, count)
                        digest.update(tokens.tobytes())
                        largest = max(largest, int(ids_of(tokens).max()))
                finally:
                    reader.close()
        return digest.hexdigest(), largest

    @property
    def content(self) -> str:
        """See `TokenSource`."""
        return self._content

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """See `TokenSource`."""
        return None if self.tokenizer is None else self.tokenizer.fingerprint

    @property
    def vocab_size(self) -> int | None:
        """See `TokenSource`."""
        return None if self.tokenizer is None else self.tokenizer.vocab_size

    @property
    def end_of_document(self) -> int | None:
        """The tokenizer's; without one the token with which the documents that are known end."""
        return self._last_token if self.tokenizer is None else self.tokenizer.end_of_document

    @cached_property
    def _last_token(self) -> int | None:
        """The token that all sampled documents end with; None if there is none."""
        found: set[int] = set()
        for number, file in enumerate(self._files):
            if file.documents is None:
                return None
            whole = FileSpan(file.path.name, file.tokens, number, 0)
            reader = self.open_chunk(whole)
            try:
                places = file.documents.last_tokens
                found |= {int(ids_of(reader.read(place, 1))[0]) for place in places}
            finally:
                reader.close()
            if len(found) > 1:
                return None
        one_document = sum(file.documents.count for file in self._files if file.documents) < 2
        return None if one_document or not found else found.pop()

    @property
    def description(self) -> str:
        """See `TokenSource`."""
        train, held_out = (self.num_tokens(split) for split in (TRAIN, VALIDATION))
        text = f"{self.kind}, {self._files[0].dtype.name}: {train:,} tokens to train on"
        text += f" ({self._names(TRAIN)}), {held_out:,} held out"
        if held_out:
            own = self._names(VALIDATION) if self._own_validation else "the last of each span"
            text += f" ({own})"
        documents = [file.documents.count for file in self._files if file.documents is not None]
        if documents:
            end = "no token of their own" if self._last_token is None else f"{self._last_token}"
            text += f"; {sum(documents):,} documents, which end with {end}"
        notes = sorted({file.note for file in self._files if file.note})
        masked = sum(file.context is not None for file in self._files)
        if masked:
            notes.append(f"{masked} of {len(self._files)} files say which tokens are not predicted")
        if self._found.not_read:
            notes.append(f"not read: {_some(self._found.not_read)}")
        return "; ".join([text, *notes])

    def _names(self, split: str) -> str:
        return _some(list(dict.fromkeys(span.name for span in self._spans[split])))

    @property
    def how_to_hold_out(self) -> str:
        """See `TokenSource`."""
        return "give a larger data.validation_fraction, or a file with `val` in its name"

    @property
    def how_to_lengthen(self) -> str:
        """See `TokenSource`."""
        return "give files with more tokens"

    def chunks(self, split: str) -> list[FileSpan]:
        """See `TokenSource`."""
        return self._spans[split]

    def open_chunk(self, chunk: FileSpan) -> SpanReader:
        """See `TokenSource`."""
        return SpanReader(self._files[chunk.file], chunk, self._states[chunk.file], self._limit)

    def name_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Take the tokenizer that the tokens are said to be made with.

        Raises:
            UserError: It does not have their ids.
        """
        self.tokenizer = tokenizer
        self.limit_ids(
            IdLimit(
                tokenizer.vocab_size,
                f"the tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids",
                "name the tokenizer that the tokens were made with: data.tokenizer=…",
            )
        )

    def limit_ids(self, limit: IdLimit) -> None:
        """Refuse ids from a limit on, also in what is read from now on.

        Raises:
            UserError: The samples have such an id.
        """
        if self.largest_id >= limit.limit:
            raise UserError(
                f"{self.path} has the id {self.largest_id}, and {limit.reason}; {limit.remedy}"
            )
        if limit.limit < self._limit.limit:
            self._limit = limit


def _places(tokens: int, samples: int) -> Iterator[tuple[int, int]]:
    """The starts and lengths of samples of a span: all of it, if that is not more."""
    if tokens <= samples * _SAMPLE_TOKENS:
        for start in range(0, tokens, _SAMPLE_TOKENS):
            yield start, min(_SAMPLE_TOKENS, tokens - start)
        return
    for start in np.linspace(0, tokens - _SAMPLE_TOKENS, samples).astype(np.int64):
        yield int(start), _SAMPLE_TOKENS


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
