"""Tokenizers behind one small interface: bytes, or any `tokenizer.json`.

A prepared folder records its tokenizer (`Tokenizer.record`). So training, `generate` and later
readers all use the tokenizer that made the tokens.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.text_cuts import ANYWHERE, TextCuts, proven_cuts
from mhc_lightning.data.token_streams import ByteStream, JsonStream, TextStream
from mhc_lightning.data.tokenizer_files import (
    TOKENIZER_FILE,
    begin_of_document_token,
    end_of_document_token,
    read_tokenizer,
)
from mhc_lightning.data.tokenizer_sources import tokenizer_file
from mhc_lightning.errors import UserError


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest unsigned integer type (16 or 32 bits) that holds ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class Tokenizer(ABC):
    """The interface that training and generation need.

    Attributes:
        name: Short name for summaries.
        vocab_size: Number of ids; every id is below it.
        end_of_document: Id that follows each document.
        begin_of_document: Id that each document begins with; None if there is none.
        fingerprint: Equal for two tokenizers exactly when they give the same ids.
        unknown: Id for text which the tokenizer does not know; None if it has none.
        cuts: Where a long text can be cut.
    """

    name: str
    vocab_size: int
    end_of_document: int
    fingerprint: str
    begin_of_document: int | None = None
    unknown: int | None = None
    cuts: TextCuts = ANYWHERE

    @property
    def dtype(self) -> np.dtype[Any]:
        """Smallest unsigned integer type (16 or 32 bits) that holds every id."""
        return smallest_dtype(self.vocab_size)

    @property
    def beginning(self) -> list[int]:
        """The ids that a text follows where it begins a document."""
        return [] if self.begin_of_document is None else [self.begin_of_document]

    @abstractmethod
    def encode(self, text: bytes | str) -> np.ndarray:
        """Ids of a text, [tokens], in `dtype`; no token is added before or after."""

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of several documents, one array each."""
        return [self.encode(document) for document in documents]

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids; ids that stand for no bytes are left out."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def stream(self, after: Iterable[int] = ()) -> TextStream:
        """A decoder that takes ids one at a time, which follow others."""

    @abstractmethod
    def vocabulary(self) -> Iterator[tuple[str, str]]:
        """(text of the token alone, its entry in the vocabulary) of each id, ascending."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Everything that `tokenizer_from_record` needs to build this tokenizer again."""


class ByteTokenizer(Tokenizer):
    """One id per byte, 0-255, and 256 for the end of a document. Keeps any bytes as they are."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256
    fingerprint = "bytes-257"

    def encode(self, text: bytes | str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        data = text.encode("utf-8", errors="surrogateescape") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(self.dtype)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See `Tokenizer.decode_bytes`; ids from 256 on stand for no byte."""
        values = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes()

    def stream(self, after: Iterable[int] = ()) -> TextStream:
        """See `Tokenizer.stream`."""
        return ByteStream()

    def vocabulary(self) -> Iterator[tuple[str, str]]:
        """See `Tokenizer.vocabulary`."""
        for byte in range(256):
            yield bytes([byte]).decode("utf-8", errors="replace"), f"<0x{byte:02X}>"
        yield "", "<end of document>"

    def record(self) -> dict[str, Any]:
        """See `Tokenizer.record`."""
        return {"kind": "bytes", "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library.

    Text that spells a special token is encoded as ordinary text, so no document can forge a
    boundary. Invalid UTF-8 becomes U+FFFD before it is encoded.

    Args:
        path: A `tokenizer.json`, or a folder that holds one.
        end_of_document: The token that ends a document. By default the `eos_token` of a
            `tokenizer_config.json` beside it, else the first usual name in the vocabulary.
        begin_of_document: The token that a document begins with, empty for none. By default the
            one that the tokenizer puts before each text.

    Raises:
        UserError: The file is missing or is no tokenizer, or no such token is in the vocabulary.
    """

    def __init__(
        self,
        path: str | Path,
        end_of_document: str | None = None,
        begin_of_document: str | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            self.path = self.path / TOKENIZER_FILE
        self._tokenizer, content, self.unknown = read_tokenizer(self.path)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.end_of_document_token = end_of_document or end_of_document_token(self.path, vocabulary)
        if self.end_of_document_token not in vocabulary:
            raise UserError(
                f"{self.path} has no token {self.end_of_document_token!r} to end documents with;"
                " name one of its tokens with end_of_document=…"
            )
        if begin_of_document is None:
            begin_of_document = begin_of_document_token(self.path, self._tokenizer)
        self.begin_of_document_token = begin_of_document
        if begin_of_document and begin_of_document not in vocabulary:
            raise UserError(
                f"{self.path} has no token {begin_of_document!r} to begin documents with; name one"
                " of its tokens with begin_of_document=…"
            )
        # Text that spells a special token stays text. Any other added token would be found in it.
        special = [self.end_of_document_token, *filter(None, [begin_of_document])]
        self._tokenizer.add_special_tokens(special)
        self.name = self.path.parent.name or self.path.stem
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = vocabulary[self.end_of_document_token]
        self.begin_of_document = vocabulary[begin_of_document] if begin_of_document else None
        self.fingerprint = json_fingerprint(content, *special)
        self.cuts = proven_cuts(json.loads(content), self.end_of_document_token)

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonTokenizer, (
            self.path,
            self.end_of_document_token,
            self.begin_of_document_token,
        )

    def encode(self, text: bytes | str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        return self.encode_documents([text if isinstance(text, bytes) else _as_bytes(text)])[0]

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer.encode_documents`.

        Raises:
            UserError: The tokenizer cannot encode a text, or encodes it as an end of document.
        """
        texts = [document.decode("utf-8", errors="replace") for document in documents]
        encoded = self._encode(texts)
        for number, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            if self._has_end(ids):
                encoded[number] = self._encode_in_parts(text)
        return encoded

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library has no exception type of its own
            raise UserError(f"{self.path} cannot encode a text: {error}") from error
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def _has_end(self, ids: np.ndarray) -> bool:
        return bool((ids == self.end_of_document).any())

    def _encode_in_parts(self, text: str) -> np.ndarray:
        """Ids of a text that spells the end-of-document token, in parts that do not spell it.

        The tokenizer's model would encode the whole spelling as that token.
        """
        end = self.end_of_document_token
        first, *others = text.split(end)
        parts = [first] + [end[1:] + part for part in others]
        ids = np.concatenate(self._encode([part + end[:1] for part in parts[:-1]] + parts[-1:]))
        if self._has_end(ids):
            raise UserError(
                f"{self.path} encodes ordinary text as {end!r}, which ends documents; name another"
                " of its tokens with end_of_document=…"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`; special tokens are left out."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See `Tokenizer.decode_bytes`."""
        return self.decode(ids).encode("utf-8")

    def stream(self, after: Iterable[int] = ()) -> TextStream:
        """See `Tokenizer.stream`."""
        return JsonStream(self.decode, after)

    def vocabulary(self) -> Iterator[tuple[str, str]]:
        """See `Tokenizer.vocabulary`."""
        for token in range(self.vocab_size):
            entry = self._tokenizer.id_to_token(token) or f"<unused {token}>"
            yield self._tokenizer.decode([token], skip_special_tokens=False), entry

    def record(self) -> dict[str, Any]:
        """See `Tokenizer.record`."""
        begin = self.begin_of_document_token
        return {
            "kind": "json",
            "file": TOKENIZER_FILE,
            "end_of_document": self.end_of_document_token,
            **({"begin_of_document": begin} if begin else {}),
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }


def json_fingerprint(content: bytes, end_of_document: str, begin_of_document: str = "") -> str:
    """The fingerprint of a `JsonTokenizer`, from the bytes of its file."""
    tokens = "\0".join([end_of_document, *filter(None, [begin_of_document])])
    digest = hashlib.sha256(content + b"\0" + tokens.encode())
    return f"json-{digest.hexdigest()[:32]}"


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def load_tokenizer(
    spec: str | Path, end_of_document: str | None = None, begin_of_document: str | None = None
) -> Tokenizer:
    """The tokenizer of a configuration.

    Args:
        spec: `bytes`, or what `tokenizer_sources.tokenizer_file` takes: a `tokenizer.json`, a
            folder of transformers, a name on the hub, or a GGUF file.
        end_of_document: See `JsonTokenizer`; the byte tokenizer has an id of its own.
        begin_of_document: See `JsonTokenizer`; the byte tokenizer has none.

    Raises:
        UserError: As `JsonTokenizer`, and if the file cannot be had.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    return JsonTokenizer(tokenizer_file(spec), end_of_document, begin_of_document)


def tokenizer_from_record(record: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a prepared folder.

    Raises:
        UserError: The recorded file is missing or differs from the record.
    """
    if record["kind"] == "bytes":
        return ByteTokenizer()
    tokenizer = JsonTokenizer(
        folder / record["file"], record["end_of_document"], record.get("begin_of_document", "")
    )
    if tokenizer.record() != record:
        raise UserError(
            f"{tokenizer.path} is not the tokenizer its data were prepared with;"
            " put the original file back, or run `prepare` again"
        )
    return tokenizer
