r"""Where a long text can be cut so that its tokens stay those of the whole text.

A tokenizer's model sees the pre-tokens of a text one by one. So the tokens of two pieces are those
of the whole where each pre-token, and all that decides where one ends, lies on one side of the cut.
Two kinds of cuts are such places under the rules of many published tokenizers:

- *line*: before a letter that follows the end of a line, where the line ends in no white space. The
  end of the line is matched by itself (`\s*[\r\n]+`, `\s+`) or with the punctuation before it
  (`[^\s\p{L}\p{N}]+[\r\n]*`), and no rule has a letter after the end of a line. The one rule that
  looks ahead, `\s+(?!\S)`, takes the end of the line alone or leaves it to the next rule, which
  does the same: a run of white space of length one is one pre-token both ways.
- *space*: before a space between two letters. No rule matches a letter and a space after it.

`proven_cuts` reads a `tokenizer.json`, and allows a kind only where each of its rules is known.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any
from unicodedata import ucd_3_2_0 as oldest  # letters of old are letters in every library

_WINDOW_BYTES = 1 << 16
_LONGEST_CHARACTER = 4  # bytes of UTF-8
_LETTER = r"[^\W\d_]"
_LINE = rf"(?<=\S\n)(?={_LETTER})"
_SPACE = rf"(?<={_LETTER})(?= {_LETTER})"


@dataclass(frozen=True)
class TextCuts:
    """Where a text may be cut.

    Attributes:
        line: Before a letter at the beginning of a line, after a line that ends in no white space.
        space: Before a space between two letters.
        anywhere: Between any two characters.
        proven: The tokens of the pieces are those of the whole text. False: no kind of cut is known
            to keep them, and a text that has to be cut is cut between two lines.
    """

    line: bool = False
    space: bool = False
    anywhere: bool = True
    proven: bool = True

    @property
    def _pattern(self) -> "re.Pattern[str]":
        return re.compile("|".join([_LINE] * self.line + [_SPACE] * self.space))

    def find(self, text: str, start: int) -> int:
        """The first proven cut of a text at or after `start`, or -1."""
        if self.anywhere:
            return start if start < len(text) else -1
        if not (self.line or self.space):
            return -1
        for found in self._pattern.finditer(text, start):
            position = found.start()
            before, after = text[position - 1], text[position]
            if _is_letter(text[position + 1] if after == " " else after) and (
                before == "\n" or _is_letter(before)
            ):
                return position
        return -1

    def find_in_bytes(self, data: bytes, start: int) -> int:
        """The same in UTF-8; the first few bytes of `data` give context only."""
        begin = max(0, start - 2 * _LONGEST_CHARACTER)
        while begin < len(data):
            # A window begins and ends within characters, which are no places for a cut.
            text = data[begin : begin + _WINDOW_BYTES].decode("utf-8", errors="surrogateescape")
            position = _LONGEST_CHARACTER
            while (position := self.find(text, position)) >= 0:
                offset = begin + len(text[:position].encode("utf-8", errors="surrogateescape"))
                if offset >= start:
                    return offset
                position += 1
            begin += _WINDOW_BYTES - 4 * _LONGEST_CHARACTER
        return -1

    def part_end(self, data: bytes, sought: int, longest: int) -> tuple[int, bool]:
        """Where to cut the beginning of a text, and whether the tokens stay those of the whole.

        Args:
            data: The beginning of the text, in UTF-8.
            sought: The first position for a proven cut.
            longest: From this size on, the text is cut in any case: at its last line, or else
                character.

        Returns:
            The position, and True if it is proven; position 0 if more of the text has to be read.
        """
        if self.proven and not self.anywhere:
            cut = self.find_in_bytes(data, sought)
            if cut >= 0:
                return cut, True
            if len(data) < longest:
                return 0, True
        line_end = data.rfind(b"\n", max(0, sought))
        cut = line_end + 1 if line_end >= 0 else character_start(data, len(data) - 1)
        return cut, self.anywhere


def character_start(data: bytes, position: int) -> int:
    """The last beginning of a character of UTF-8 at or before a position; it, if there is none."""
    for start in range(position, max(0, position - _LONGEST_CHARACTER), -1):
        if start == len(data) or not 0x80 <= data[start] < 0xC0:
            return start
    return position


ANYWHERE = TextCuts()
UNPROVEN = TextCuts(anywhere=False, proven=False)


def _is_letter(character: str) -> bool:
    """True for a letter, and what a normalizer makes of it begins with one."""
    first = unicodedata.normalize("NFKD", character)[0]
    return oldest.category(character)[0] == "L" == oldest.category(first)[0]


def proven_cuts(content: dict[str, Any], end_of_document: str) -> TextCuts:
    """Where a `tokenizer.json` lets a text be cut.

    Args:
        content: The content of the file.
        end_of_document: The token that ends documents, which a text may spell.
    """
    kinds = _kept_by_normalizer(content.get("normalizer"))
    steps = _steps(content.get("pre_tokenizer"))
    kinds &= _BOTH.intersection(*map(_kept_apart, steps)) & _NONE.union(*map(_separated, steps))
    found_in_text = [token for token in content.get("added_tokens") or [] if not token["special"]]
    for token in found_in_text:
        if token.get("lstrip") or token.get("rstrip"):
            kinds = _NONE
    for spelling in [end_of_document, *(token["content"] for token in found_in_text)]:
        kinds -= {"line"} if "\n" in spelling else _NONE
        kinds -= {"space"} if " " in spelling else _NONE
    if not kinds:
        return UNPROVEN
    return TextCuts("line" in kinds, "space" in kinds, anywhere=False)


_BOTH = frozenset({"line", "space"})
_NONE: frozenset[str] = frozenset()
# Change characters one by one or, at a cut, as if the text ended there.
_LOCAL_NORMALIZERS = (
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"),
)
# The alternatives of the patterns by which published tokenizers split a text.
_CONTRACTION = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)|\(\?i:'[a-z'|]+\)|'\(\?i:\[[a-z]+\](?:\|[a-z]+)*\)"
)
_LETTER_RULES = frozenset(
    {
        # With a character before the letters, which ends no line.
        *(r"\p{L}+", r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+"),
        *(r" ?[\p{L}\p{M}]+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"),
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    }
)
_CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Two alternatives that together match any letters.
_CASED_RULES = frozenset(
    rf"[^\r\n\p{{L}}\p{{N}}]?{letters}{ending}"
    for letters in (f"{_CAPITALS}*{_SMALL}+", f"{_CAPITALS}+{_SMALL}*")
    for ending in ("", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
)
_OTHER_RULES = frozenset(
    {
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        "[一-龥぀-ゟ゠-ヿ]+",
        *(r"\p{N}", r"\p{N}+", r" ?\p{N}+", r"\p{N}{1,3}", r"\p{N}{1,3}+", r"\d", r"[0-9]"),
        # Punctuation, with the ends of lines after it.
        *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]++", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),
        *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*"),
        *(r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[\p{P}\p{S}]+[\r\n]*"),
        *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+", r"\s++$"),
    }
)


def _kept_by_normalizer(step: dict[str, Any] | None) -> frozenset[str]:
    """The cuts at which a normalizer changes two pieces as it changes the whole."""
    if step is not None and step["type"] == "Sequence":
        return _BOTH.intersection(*map(_kept_by_normalizer, step["normalizers"]))
    return _BOTH if step is None or step["type"] in _LOCAL_NORMALIZERS else _NONE


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The pre-tokenizers that a text goes through."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [each for part in step["pretokenizers"] for each in _steps(part)]
    return [step]


def _kept_apart(step: dict[str, Any]) -> frozenset[str]:
    """The cuts that no match of a pre-tokenizer spans, wherever its matches begin."""
    kind = step["type"]
    if kind == "ByteLevel":  # a prefix goes before a piece that begins with no space
        return frozenset({"space"}) if step["add_prefix_space"] else _BOTH
    if kind == "Metaspace":
        return frozenset({"space"})
    if kind == "Split":
        known = all(_is_known(rule) for rule in _rules(step))
        return _BOTH if known and step["behavior"] in ("Isolated", "Removed") else _NONE
    if kind == "Punctuation":
        return _BOTH if step.get("behavior", "Isolated") == "Isolated" else _NONE
    return (
        _BOTH if kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Digits") else _NONE
    )


def _separated(step: dict[str, Any]) -> frozenset[str]:
    """The cuts at which a pre-tokenizer always cuts the text itself."""
    kind = step["type"]
    if kind == "ByteLevel":
        return _BOTH if step.get("use_regex", True) else _NONE
    if kind == "Metaspace":
        return frozenset({"space"}) if step.get("split", True) else _NONE
    if kind == "Split":
        # Letters and white space are all matched, so nothing between two matches spans a cut.
        rules = _rules(step)
        letters = _LETTER_RULES.intersection(rules) or len(_CASED_RULES.intersection(rules)) > 1
        return _BOTH if letters and r"\s+" in rules else _NONE
    return _BOTH if kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit") else _NONE


def _is_known(rule: str) -> bool:
    known = rule in _LETTER_RULES or rule in _CASED_RULES or rule in _OTHER_RULES
    return known or _CONTRACTION.fullmatch(rule) is not None


def _rules(step: dict[str, Any]) -> list[str]:
    """The alternatives of a pattern; the pattern itself if it is a literal text."""
    pattern = step["pattern"].get("Regex")
    if pattern is None:
        return [step["pattern"].get("String", "")]
    rules, depth, escaped, in_class = [""], 0, False, False
    for character in pattern:
        if not escaped and not in_class:
            depth += (character == "(") - (character == ")")
        if not escaped and character in "[]":
            in_class = character == "["
        if character == "|" and not depth and not in_class and not escaped:
            rules.append("")
            continue
        rules[-1] += character
        escaped = character == "\\" and not escaped
    return [rule.replace("\r", r"\r").replace("\n", r"\n") for rule in rules]
