"""The result of `prepare`, and the lines that it prints."""

from dataclasses import dataclass
from pathlib import Path

from mhc_lightning.data.file_formats import BINARY
from mhc_lightning.data.prepared_record import LISTING_FILE, SPLITS, PreparedRecord, TextCounts

_ENDINGS_NAMED = 6


@dataclass(frozen=True)
class PrepareSummary:
    """The result of `prepare`.

    Attributes:
        output: The prepared folder.
        record: Its record, with the counts of each split.
        seconds: Duration of the call.
        reused: True if the folder already existed, made from the same input and settings.
    """

    output: Path
    record: PreparedRecord
    seconds: float
    reused: bool = False

    @property
    def total(self) -> TextCounts:
        """Counts of both splits together."""
        total = TextCounts()
        for split in SPLITS:
            total.add(self.record.counts[split])
        return total

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, over both splits."""
        return self.total.bytes / self.total.tokens

    def __str__(self) -> str:
        total, skipped = self.total, self.record.skipped
        unknown = f"of text that the tokenizer does not know ({total.unknown / total.tokens:.2%})"
        notes = [
            f"{self.bytes_per_token:.3f} bytes per token",
            *_counted(skipped.binary_files, "binary file", "skipped"),
            *_counted(skipped.empty_documents, "empty document", "skipped"),
            *_counted(skipped.other_web_records, "web record", "skipped that is not plain text"),
            *_counted(total.invalid_utf8, "document", "with invalid UTF-8"),
            *_counted(total.with_nul, "document", "with NUL bytes"),
            *_counted(total.unknown, "token", unknown),
            *_counted(total.unproven_cuts, "cut", "in long documents that may change tokens there"),
            f"{self.seconds:.1f} s",
        ]
        lines = [f"{self.output} {'was prepared already' if self.reused else 'is prepared'}"]
        for split in SPLITS:
            counts = self.record.counts[split]
            lines.append(
                f"  {split:<10} {counts.documents:>12,} documents {counts.tokens:>15,} tokens"
                f" {counts.bytes:>15,} bytes"
            )
        lines.append(f"  {' · '.join(notes)}")
        if skipped.bad_records:
            bad = _counted(skipped.bad_records, "record", "skipped")[0]
            lines.append(
                f"  {bad} as on_bad_record=skip says; the first: {skipped.first_bad_record}"
            )
        for name, endings in self.record.forms.items():
            verb = "skipped as" if name == BINARY else "taken for"
            lines.append(f"  {verb} {name}: {_endings(endings)}")
        if LISTING_FILE in self.record.files:
            lines.append(f"  {self.output / LISTING_FILE} lists each file")
        if self.record.files:
            lines.append("  checksums (XXH3, 128 bits) are checked when a file is first read")
        else:
            lines.append("  an earlier version made it, without checksums of all its files")
        return "\n".join(lines)


def _counted(number: int, noun: str, remark: str) -> list[str]:
    return [f"{number:,} {noun}{'s' if number != 1 else ''} {remark}"] if number else []


def _endings(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    names = [f"{count:,} {ending}" for ending, count in ordered[:_ENDINGS_NAMED]]
    if len(ordered) > _ENDINGS_NAMED:
        names.append(f"{len(ordered) - _ENDINGS_NAMED} other endings")
    return f"{total:,} file{'s' if total != 1 else ''} ({', '.join(names)})"
