"""A prepared folder: its record, its chunk files, and the checks that are made before training.

Layout: ``prepared.json`` (the record), ``tokenizer.json`` if there is one, and ``train`` and
``validation``, each a litdata dataset of tokens (``index.json`` and chunk files).

Nothing is believed because it lies on the disk: the record has a checksum of itself and of every
other file. Small files are checked when the folder is opened, chunks when they are.
"""

import math
import stat
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.chunk_cache import ChunkCache, is_url
from mhc_lightning.data.chunk_file import Chunk, ChunkFile, DamagedChunkError
from mhc_lightning.data.prepared_record import RECORD_FILE, SPLITS, VALIDATION, Record
from mhc_lightning.data.tokenizers import Tokenizer, json_fingerprint, tokenizer_from_record
from mhc_lightning.errors import UserError
from mhc_lightning.files.checksums import file_sha256, file_xxh3

_ATTEMPTS = 3


class PreparedData:
    """A prepared folder, local or at an object-store URL.

    Args:
        path: The folder that `prepare` wrote, or the URL (``s3://``, ``gs://``, ``azure://``,
            ``r2://``, ``hf://``, ``local:``) that it was copied to.
        cache_dir: Where chunks of a URL are kept; by default below ``~/.cache/mhc_lightning``.
        storage_options: Passed to the object store's client.

    Raises:
        UserError: There is no prepared folder, its record, index or tokenizer is damaged, or one of
            its files is missing or cut short.
    """

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
            self.record = Record.from_json(text)
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
            found = "is not a prepared folder" if self._folder.exists() else "does not exist"
            raise UserError(
                f"data.path {self.path} {found}; make it with `prepare input=… output={self.path}`"
            ) from error
        except OSError as error:
            raise UserError(f"data.path {self.path} cannot be read: {error.strerror}") from error

    def _check_sizes(self) -> None:
        for chunk in self.all_chunks():
            path = self._folder / chunk.name
            try:
                status = path.stat()
            except FileNotFoundError:
                found = "is missing"
            except OSError as error:
                found = f"cannot be read: {error.strerror}"
            else:
                if status.st_size == chunk.size and stat.S_ISREG(status.st_mode):
                    continue
                found = f"has {status.st_size} bytes, not {chunk.size}"
                if not stat.S_ISREG(status.st_mode):
                    found = "is no file"
            raise UserError(f"chunk file {path} {found}; {self.how_to_mend}")

    def _check_small_files(self) -> None:
        """Compare the indices and the tokenizer with their checksums."""
        for name, checksum in self.record.files.items():
            self._check_small(name, file_xxh3, checksum)
        tokenizer = self.record.tokenizer
        if "file" in tokenizer:
            end = tokenizer["end_of_document"]
            self._check_small(
                tokenizer["file"],
                lambda path: json_fingerprint(path.read_bytes(), end),
                tokenizer["fingerprint"],
            )

    def _check_small(self, name: str, checksum: Callable[[Path], str], expected: str) -> None:
        path = self._folder / name
        try:
            if self.cache is not None:
                self.cache.keep_small(name)
                if checksum(path) != expected:  # the copy may be damaged alone
                    self.cache.discard(name)
                    self.cache.keep_small(name)
            if checksum(path) == expected:
                return
            found = "is damaged (checksum)"
        except OSError as error:
            found = f"cannot be read: {error.strerror}"
        shown = path if self.cache is None else f"{self.path}/{name}"
        raise UserError(f"{shown} {found}; {self.how_to_mend}")

    @property
    def unchecked(self) -> str:
        """What of the folder has no checksum, for a note; empty if everything has one."""
        if self.record.files:
            return ""
        return (
            f"{self.path} was prepared by an earlier version: its chunks and tokenizer are checked,"
            f" but {RECORD_FILE} and the index files have no checksums; for these run `prepare`"
            " again with overwrite=true"
        )

    @property
    def how_to_mend(self) -> str:
        """The end of error messages about damaged chunks."""
        if self.cache is not None:
            return "copy the prepared folder to the object store again"
        return f"copy it again, or delete {self.path} and run `prepare` again"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens were made with."""
        return tokenizer_from_record(self.record.tokenizer, self._folder)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored tokens."""
        return np.dtype(self.record.dtype)

    def chunks(self, split: str) -> list[Chunk]:
        """The chunks of ``train`` or ``validation``, in order."""
        return self.record.chunks[split]

    def all_chunks(self) -> list[Chunk]:
        """The chunks of both splits."""
        return [chunk for split in SPLITS for chunk in self.chunks(split)]

    def bytes_per_token(self, split: str = VALIDATION) -> float:
        """Bytes of text per token, [bytes/token]; NaN for an empty split.

        A loss in nats per token is ``loss / ln 2 / bytes_per_token`` bits per byte. The tokens
        that end documents count as tokens and not as bytes, so their cost is included.
        """
        counts = self.record.counts[split]
        return counts.bytes / counts.tokens if counts.tokens else math.nan

    def open_chunk(self, chunk: Chunk) -> ChunkFile:
        """A chunk, compared with its checksum unless this process did so; fetched if need be.

        Raises:
            UserError: The file is missing, damaged or cannot be fetched.
        """
        path = self._folder / chunk.name
        shown = str(path) if self.cache is None else f"{self.path}/{chunk.name}"
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if self.cache is not None:
                    self.cache.fetch(chunk.name, chunk.size)
                return ChunkFile(path, chunk, self.dtype, shown, self.how_to_mend)
            except FileNotFoundError as error:
                # Another process may have made room in the cache just now.
                if self.cache is None or attempt == _ATTEMPTS:
                    raise UserError(f"chunk file {shown} is missing; {self.how_to_mend}") from error
            except DamagedChunkError:
                if self.cache is None:
                    raise
                self.cache.discard(chunk.name)  # the copy may be damaged alone
                if attempt == _ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def tokens(self, chunk: Chunk) -> np.ndarray:
        """All tokens of a chunk, [tokens] in :attr:`dtype`.

        Raises:
            UserError: As :meth:`open_chunk`.
        """
        opened = self.open_chunk(chunk)
        try:
            return opened.read(0, chunk.tokens)
        finally:
            opened.close()

    def documents(self, split: str) -> Iterator[bytes]:
        """The documents of a split in order; with the byte tokenizer exactly the input's bytes."""
        rest: list[np.ndarray] = []
        end = self.tokenizer.end_of_document
        for chunk in self.chunks(split):
            tokens = self.tokens(chunk)
            *ended, last = np.split(tokens, np.flatnonzero(tokens == end) + 1)
            for part in ended:
                yield self.tokenizer.decode_bytes(np.concatenate([*rest, part[:-1]]))
                rest = []
            rest.append(last)
        if sum(map(len, rest)):
            yield self.tokenizer.decode_bytes(np.concatenate(rest))

    def verify(self) -> None:
        """Compare every chunk with its SHA-256; reads (and fetches) all of the data.

        Raises:
            UserError: A chunk is not what `prepare` wrote.
        """
        for chunk in self.all_chunks():
            self.open_chunk(chunk).close()
            if file_sha256(self._folder / chunk.name) != chunk.sha256:
                raise UserError(
                    f"chunk file {self._folder / chunk.name} is damaged (checksum);"
                    f" {self.how_to_mend}"
                )
