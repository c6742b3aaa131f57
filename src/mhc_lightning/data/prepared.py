"""A prepared folder: its record, its chunk files, and the checks that are made before training.

Layout: ``prepared.json`` (the record), ``tokenizer.json`` if there is one, and ``train`` and
``validation``, each a litdata dataset of tokens (``index.json`` and chunk files).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.remote import ChunkCache, is_url
from mhc_lightning.data.shard import Counts, file_sha256
from mhc_lightning.data.tokenizers import Tokenizer, tokenizer_from_record
from mhc_lightning.data.units import Skipped
from mhc_lightning.errors import UserError

RECORD_FILE = "prepared.json"
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
FORMAT = 1


@dataclass(frozen=True)
class Chunk:
    """One file of consecutive tokens.

    Attributes:
        name: Path below the prepared folder, ``train/chunk-….bin``.
        tokens: Number of tokens.
        offset: Bytes before the first token (litdata's header).
        size: Bytes of the file.
        sha256: Checksum of the file.
    """

    name: str
    tokens: int
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What ``prepared.json`` says.

    Attributes:
        identity: Equal for two folders exactly when they were made from the same input with the
            same settings.
        content: Checksum of all tokens and of the tokenizer; names the data in checkpoints.
        tokenizer: See :meth:`mhc_lightning.data.tokenizers.Tokenizer.record`.
        dtype: Type of the stored tokens.
        counts: Documents, tokens and bytes of each split.
        skipped: What was left out of the input.
        chunks: The chunk files of each split, in order.
        settings: How `prepare` was called, for people.
    """

    identity: str
    content: str
    tokenizer: dict[str, Any]
    dtype: str
    counts: dict[str, Counts]
    skipped: Skipped
    chunks: dict[str, list[Chunk]]
    settings: dict[str, Any]

    def to_json(self) -> str:
        """The text of ``prepared.json``."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Record":
        """Read ``prepared.json``.

        Raises:
            ValueError: It is no record of this format.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError("another format")
        try:
            content["counts"] = {
                split: Counts(**value) for split, value in content["counts"].items()
            }
            content["skipped"] = Skipped(**content["skipped"])
            content["chunks"] = {
                split: [Chunk(**chunk) for chunk in chunks]
                for split, chunks in content["chunks"].items()
            }
            return cls(**content)
        except (KeyError, TypeError) as error:
            raise ValueError(str(error)) from error


class PreparedData:
    """A prepared folder, local or at an object-store URL.

    Args:
        path: The folder that `prepare` wrote, or the URL (``s3://``, ``gs://``, ``azure://``,
            ``r2://``, ``hf://``, ``local:``) that it was copied to.
        cache_dir: Where chunks of a URL are kept; by default below ``~/.cache/mhc_lightning``.
        storage_options: Passed to the object store's client.

    Raises:
        UserError: There is no prepared folder, or one of its files is missing or cut short.
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
                " it was cut short or made by another version: run `prepare` again"
            ) from error
        if self.cache is not None:
            self._folder = self.cache.bind(self.record.content)
        else:
            self._check_sizes()

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
            size = path.stat().st_size if path.exists() else None
            if size != chunk.size:
                found = "is missing" if size is None else f"has {size} bytes, not {chunk.size}"
                raise UserError(f"chunk file {path} {found}; {self.how_to_mend}")

    @property
    def how_to_mend(self) -> str:
        """The end of error messages about damaged chunks."""
        return f"copy it again, or delete {self.path} and run `prepare` again"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens were made with."""
        if self.cache is not None and "file" in self.record.tokenizer:
            self.cache.keep_small(self.record.tokenizer["file"])
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

    def tokens(self, chunk: Chunk) -> np.ndarray:
        """The tokens of a chunk, [tokens] in :attr:`dtype`, mapped from its file.

        Raises:
            UserError: The file is missing or cut short, or cannot be fetched.
        """
        path = self._folder / chunk.name
        for attempt in range(3):
            if self.cache is not None:
                self.cache.fetch(chunk.name, chunk.size)
            try:
                return np.memmap(path, self.dtype, "r", offset=chunk.offset, shape=(chunk.tokens,))
            except (OSError, ValueError) as error:
                # Another process may have made room in the cache just now.
                gone = self.cache is not None and isinstance(error, FileNotFoundError)
                if not gone or attempt == 2:
                    raise UserError(
                        f"chunk file {path} cannot be read: {error}; {self.how_to_mend}"
                    ) from error
        raise AssertionError("unreachable")

    def documents(self, split: str) -> Iterator[bytes]:
        """The documents of a split in order; with the byte tokenizer exactly the input's bytes."""
        rest: list[np.ndarray] = []
        end = self.tokenizer.end_of_document
        for chunk in self.chunks(split):
            tokens = np.asarray(self.tokens(chunk))
            *ended, last = np.split(tokens, np.flatnonzero(tokens == end) + 1)
            for part in ended:
                yield self.tokenizer.decode_bytes(np.concatenate([*rest, part[:-1]]))
                rest = []
            rest.append(last)
        if sum(map(len, rest)):
            yield self.tokenizer.decode_bytes(np.concatenate(rest))

    def verify(self) -> None:
        """Compare every chunk with its checksum; reads (and fetches) all of the data.

        Raises:
            UserError: A chunk is not what `prepare` wrote.
        """
        for chunk in self.all_chunks():
            if self.cache is not None:
                self.cache.fetch(chunk.name, chunk.size)
            if file_sha256(self._folder / chunk.name) != chunk.sha256:
                raise UserError(
                    f"chunk file {self._folder / chunk.name} is damaged (checksum);"
                    f" {self.how_to_mend}"
                )
