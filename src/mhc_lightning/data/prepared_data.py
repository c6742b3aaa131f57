"""A prepared folder, opened and checked: its record, tokenizer and chunk files.

Layout: `prepared.json` (the record), `tokenizer.json` if there is one, and `train` and
`validation`, each a litdata dataset of tokens (`index.json` and chunk files).

The record has a checksum of itself and of every other file. Small files are checked when the folder
is opened, each chunk when it is opened.
"""

import math
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.chunk_cache import ChunkCache, is_url
from mhc_lightning.data.chunk_file import Chunk, ChunkFile, DamagedChunkError
from mhc_lightning.data.context_tokens import ContextChunkFile, ids_of
from mhc_lightning.data.prepared_record import (
    ANSWERS,
    RECORD_FILE,
    SPLITS,
    TRAIN,
    VALIDATION,
    PreparedRecord,
)
from mhc_lightning.data.token_source import TokenSource
from mhc_lightning.data.tokenizers import Tokenizer, json_fingerprint, tokenizer_from_record
from mhc_lightning.errors import UserError
from mhc_lightning.files.checksums import file_sha256, file_xxh3

_ATTEMPTS = 3


class PreparedData(TokenSource):
    """A prepared folder, local or at an object-store URL.

    Args:
        path: The folder that `prepare` wrote, or the URL (`s3://`, `gs://`, `azure://`,
            `r2://`, `hf://`, `local:`) of a copy.
        cache_dir: Folder for copies of a URL's files; by default below `~/.cache/mhc_lightning`.
        storage_options: Options of the object store's client.

    Raises:
        UserError: The folder is missing or not prepared, a file is missing or cut short, or the
            record, an index or the tokenizer is damaged.
    """

    kind = "prepared folder"

    def __init__(
        self,
        path: str | Path,
        cache_dir: str | Path | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.path = str(path)
        self.cache: ChunkCache | None = None
        self._folder = Path(path)
        if is_url(self.path):
            self.cache = ChunkCache(self.path, cache_dir, storage_options)
            text = self.cache.fetch_small(RECORD_FILE)
        else:
            text = self._read_record()
        try:
            self.record = PreparedRecord.from_json(text)
        except ValueError as error:
            raise UserError(
                f"{self.path}/{RECORD_FILE} cannot be understood ({error});"
                " it was changed, cut short or made by another version: copy it again, or run"
                " `prepare` again"
            ) from error
        if self.cache is not None:
            self._folder = self.cache.bind(self.record.content)
        else:
            self._check_sizes()
        self._check_small_files()

    def _read_record(self) -> bytes:
        try:
            return (self._folder / RECORD_FILE).read_bytes()
        except FileNotFoundError as error:
            fault = "is not a prepared folder" if self._folder.exists() else "does not exist"
            raise UserError(
                f"data.path {self.path} {fault}; make it with `prepare input=… output={self.path}`"
            ) from error
        except OSError as error:
            raise UserError(f"data.path {self.path} cannot be read: {error.strerror}") from error

    def _check_sizes(self) -> None:
        for chunk in self.all_chunks():
            path = self._folder / chunk.name
            try:
                status = path.stat()
            except FileNotFoundError:
                fault = "is missing"
            except OSError as error:
                fault = f"cannot be read: {error.strerror}"
            else:
                if status.st_size == chunk.size and stat.S_ISREG(status.st_mode):
                    continue
                fault = f"has {status.st_size} bytes, not {chunk.size}"
                if not stat.S_ISREG(status.st_mode):
                    fault = "is no file"
            raise UserError(f"chunk file {path} {fault}; {self.how_to_fix}")

    def _check_small_files(self) -> None:
        """Compare the indices and the tokenizer with their checksums."""
        for name, checksum in self.record.files.items():
            self._check_small(name, file_xxh3, checksum)
        tokenizer = self.record.tokenizer
        if "file" in tokenizer:
            tokens = tokenizer["end_of_document"], tokenizer.get("begin_of_document", "")
            self._check_small(
                tokenizer["file"],
                lambda path: json_fingerprint(path.read_bytes(), *tokens),
                tokenizer["fingerprint"],
            )

    def _check_small(self, name: str, checksum: Callable[[Path], str], expected: str) -> None:
        path = self._folder / name
        try:
            if self.cache is not None:
                self.cache.keep_small(name)
                if checksum(path) != expected:  # perhaps only the copy is damaged
                    self.cache.discard(name)
                    self.cache.keep_small(name)
            if checksum(path) == expected:
                return
            fault = "is damaged (checksum)"
        except OSError as error:
            fault = f"cannot be read: {error.strerror}"
        raise UserError(f"{self._shown(name)} {fault}; {self.how_to_fix}")

    def _shown(self, name: str) -> str:
        """Name of a file in error messages: its path, or its URL."""
        return str(self._folder / name) if self.cache is None else f"{self.path}/{name}"

    @property
    def unchecked(self) -> str:
        """A note on files without a checksum; empty if every file has one."""
        if self.record.files:
            return ""
        return (
            f"{self.path} was prepared by an earlier version: its chunks and tokenizer are checked,"
            f" but {RECORD_FILE} and the index files have no checksums; for these run `prepare`"
            " again with overwrite=true"
        )

    @property
    def how_to_fix(self) -> str:
        """The end of error messages about damaged chunks."""
        if self.cache is not None:
            return "copy the prepared folder to the object store again"
        return f"copy it again, or delete {self.path} and run `prepare` again"

    @property
    def content(self) -> str:
        """See `PreparedRecord`."""
        return self.record.content

    @property
    def tokenizer_fingerprint(self) -> str:
        """See `Tokenizer.fingerprint`."""
        return str(self.record.tokenizer["fingerprint"])

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer."""
        return int(self.record.tokenizer["vocab_size"])

    @property
    def end_of_document(self) -> int:
        """Id of the token that ends each document."""
        return self.tokenizer.end_of_document

    @property
    def description(self) -> str:
        """See `TokenSource`."""
        train, held_out = (self.record.counts[split].tokens for split in (TRAIN, VALIDATION))
        return f"{self.kind}: {train:,} tokens to train on, {held_out:,} held out"

    @property
    def how_to_hold_out(self) -> str:
        """See `TokenSource`."""
        return "run `prepare` with a larger validation_fraction"

    @property
    def how_to_lengthen(self) -> str:
        """See `TokenSource`."""
        return "run `prepare` with more text or a larger chunk_bytes"

    @cached_property
    def tokenizer(self) -> Tokenizer:  # type: ignore[override]
        """The tokenizer that the tokens were made with."""
        return tokenizer_from_record(self.record.tokenizer, self._folder)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored tokens."""
        return np.dtype(self.record.dtype)

    def chunks(self, split: str) -> list[Chunk]:
        """The chunks of `train` or `validation`, in order."""
        return self.record.chunks[split]

    def all_chunks(self) -> list[Chunk]:
        """The chunks of both splits."""
        return [chunk for split in SPLITS for chunk in self.chunks(split)]

    def bytes_per_token(self, split: str = VALIDATION) -> float:
        """Bytes of text per token, [bytes/token]; NaN for an empty split.

        A loss in nats per token is `loss / ln 2 / bytes_per_token` bits per byte. The tokens
        that end documents count as tokens and not as bytes, so their cost is included.
        """
        counts = self.record.counts[split]
        if self.record.targets == ANSWERS:
            return math.nan  # the bytes of what is predicted are not counted
        return counts.bytes / counts.tokens if counts.tokens else math.nan

    def open_chunk(self, chunk: Chunk) -> ChunkFile:
        """A chunk, fetched if necessary, and compared with its checksum once per process.

        Raises:
            UserError: The file is missing, damaged or cannot be fetched.
        """
        path = self._folder / chunk.name
        shown = self._shown(chunk.name)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if self.cache is not None:
                    self.cache.fetch(chunk.name, chunk.size)
                kind = ContextChunkFile if self.record.targets == ANSWERS else ChunkFile
                return kind(path, chunk, self.dtype, shown, self.how_to_fix)
            except FileNotFoundError as error:
                # Another process may have just deleted the copy to make room in the cache.
                if self.cache is None or attempt == _ATTEMPTS:
                    raise UserError(f"chunk file {shown} is missing; {self.how_to_fix}") from error
            except DamagedChunkError:
                if self.cache is None:
                    raise
                self.cache.discard(chunk.name)  # perhaps only the copy is damaged
                if attempt == _ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def prefetch(self, chunks: Sequence[Chunk]) -> None:
        """See `ChunkCache.prefetch`."""
        if self.cache is not None:
            self.cache.prefetch([(chunk.name, chunk.size) for chunk in chunks])

    def tokens(self, chunk: Chunk) -> np.ndarray:
        """All tokens of a chunk, [tokens] in `dtype`.

        Raises:
            UserError: As `open_chunk`.
        """
        opened = self.open_chunk(chunk)
        try:
            return ids_of(opened.read(0, chunk.tokens)).astype(self.dtype, copy=False)
        finally:
            opened.close()

    def documents(self, split: str) -> Iterator[bytes]:
        """The documents of a split in order; with the byte tokenizer exactly the input's bytes."""
        unfinished: list[np.ndarray] = []  # tokens of a document that goes on in the next chunk
        end = self.tokenizer.end_of_document
        for chunk in self.chunks(split):
            tokens = self.tokens(chunk)
            *ended, last = np.split(tokens, np.flatnonzero(tokens == end) + 1)
            for part in ended:
                yield self.tokenizer.decode_bytes(np.concatenate([*unfinished, part[:-1]]))
                unfinished = []
            unfinished.append(last)
        if sum(map(len, unfinished)):
            yield self.tokenizer.decode_bytes(np.concatenate(unfinished))

    def verify(self) -> None:
        """Compare every chunk with its SHA-256; reads (and fetches) all data.

        Raises:
            UserError: A chunk is missing or damaged.
        """
        for chunk in self.all_chunks():
            self.open_chunk(chunk).close()
            if file_sha256(self._folder / chunk.name) != chunk.sha256:
                raise UserError(
                    f"chunk file {self._folder / chunk.name} is damaged (checksum);"
                    f" {self.how_to_fix}"
                )
