"""The record of a prepared folder, `prepared.json`: its content, counts and checksums."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mhc_lightning.data.chunk_file import Chunk
from mhc_lightning.data.documents import Skipped
from mhc_lightning.data.tokenizers import ByteTokenizer, smallest_dtype
from mhc_lightning.files.checksums import json_sha256

RECORD_FILE = "prepared.json"
LISTING_FILE = "inputs.jsonl"
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
FORMAT = 1
ANSWERS_FORMAT = 2  # tokens that are not predicted are marked: see `context_tokens`
ALL, ANSWERS = "all", "answers"
_CHECKSUM = "checksum"


@dataclass
class TextCounts:
    """Amount of text in a split, a work unit, or a whole prepared folder.

    Attributes:
        documents: Documents; a file of which the end is held out counts in both splits.
        tokens: Tokens, the end of each document included.
        bytes: Bytes of text.
        invalid_utf8: Documents (or parts of very long ones) with invalid UTF-8.
        with_nul: Documents (or parts) with NUL bytes.
        unknown: Tokens that stand for text which the tokenizer does not know.
        unproven_cuts: Places where a long document was cut for want of memory, and the tokens
            beside the cut may differ from those of the whole.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    invalid_utf8: int = 0
    with_nul: int = 0
    unknown: int = 0
    unproven_cuts: int = 0

    def add(self, other: "TextCounts") -> None:
        """Add other counts to these."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.invalid_utf8 += other.invalid_utf8
        self.with_nul += other.with_nul
        self.unknown += other.unknown
        self.unproven_cuts += other.unproven_cuts


@dataclass(frozen=True)
class PreparedRecord:
    """The content of `prepared.json`.

    Attributes:
        identity: Equal for two folders exactly when they were made from the same input with the
            same settings.
        content: Checksum of all tokens and of the tokenizer; names the data in checkpoints.
        tokenizer: See `Tokenizer.record`.
        dtype: Type of the stored tokens.
        counts: Documents, tokens and bytes of each split.
        skipped: What was left out of the input.
        chunks: The chunk files of each split, in order.
        settings: The arguments of `prepare`, for human readers.
        forms: Number of input files by format and ending.
        files: XXH3 checksums of the listing and litdata's index files, by path; empty where an
            earlier version made the folder, which then also has no checksum of the record itself.
        targets: Which tokens are predicted: `all`, or `answers` of conversations.
    """

    identity: str
    content: str
    tokenizer: dict[str, Any]
    dtype: str
    counts: dict[str, TextCounts]
    skipped: Skipped
    chunks: dict[str, list[Chunk]]
    settings: dict[str, Any]
    forms: dict[str, dict[str, int]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    targets: str = ALL

    def to_json(self) -> str:
        """The text of `prepared.json`, which includes a checksum of itself."""
        content = {"format": FORMAT, **asdict(self)}
        if self.targets == ALL:
            del content["targets"]  # as earlier versions have it
        else:
            content["format"] = ANSWERS_FORMAT
        return json.dumps({**content, _CHECKSUM: json_sha256(content)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "PreparedRecord":
        """Read `prepared.json`.

        Raises:
            ValueError: The text is no record of this format, was changed, or contradicts itself.
        """
        content = json.loads(text)
        known = {FORMAT: ALL, ANSWERS_FORMAT: ANSWERS}
        if not isinstance(content, dict) or content.get("format") not in known:
            raise ValueError("another format")
        if content.get("targets", ALL) != known[content["format"]]:
            raise ValueError("its targets are not those of its format")
        checksum = content.pop(_CHECKSUM, None)
        if checksum is not None and checksum != json_sha256(content):
            raise ValueError("it is damaged: its checksum is another")
        del content["format"]
        try:
            content["counts"] = {
                split: TextCounts(**value) for split, value in content["counts"].items()
            }
            content["skipped"] = Skipped(**content["skipped"])
            content["chunks"] = {
                split: [Chunk(**chunk) for chunk in chunks]
                for split, chunks in content["chunks"].items()
            }
            record = cls(**content)
            contradiction = record._contradiction()
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(str(error)) from error
        if contradiction:
            raise ValueError(f"it is damaged: {contradiction}")
        return record

    def _contradiction(self) -> str:
        """A contradiction in the record, in words; empty if there is none.

        In a record without a checksum, only a contradiction shows damage.
        """
        kind, byte_record = self.tokenizer["kind"], ByteTokenizer().record()
        if kind not in ("bytes", "json") or (kind == "bytes" and self.tokenizer != byte_record):
            return f"there is no tokenizer {self.tokenizer}"
        dtype = smallest_dtype(self.tokenizer["vocab_size"])
        if self.targets == ANSWERS:
            dtype = np.dtype(np.uint32)
        if self.dtype != dtype.name:
            return f"the type of tokens is {self.dtype}"
        for split in SPLITS:
            chunks, counts = self.chunks[split], self.counts[split]
            if sum(chunk.tokens for chunk in chunks) != counts.tokens:
                return f"the chunks of {split} do not have its {counts.tokens} tokens"
            for chunk in chunks:
                if chunk.offset + chunk.tokens * dtype.itemsize != chunk.size:
                    return f"{chunk.name} cannot have {chunk.tokens} tokens"
            exact = kind == "bytes" and self.targets == ALL
            if exact and counts.bytes + counts.documents != counts.tokens:
                return f"{split} does not have {counts.bytes} bytes"
        if self.content != content_checksum(self.chunks, self.tokenizer["fingerprint"]):
            return "the checksums of the chunks are others"
        return ""


def content_checksum(chunks: dict[str, list[Chunk]], fingerprint: str) -> str:
    """The checksum of all tokens and of their tokenizer, from the checksums of the chunks.

    Args:
        chunks: The chunks of each split.
        fingerprint: Fingerprint of the tokenizer.
    """
    digest = hashlib.sha256(fingerprint.encode())
    for split in SPLITS:
        digest.update(f"\n{split}".encode())
        for chunk in chunks[split]:
            digest.update(f"\n{chunk.sha256}".encode())
    return digest.hexdigest()
